"""The command line: thin commands over the library.

A command is one function. What it needs is imported inside it, so that `sdgm-edge --help` answers at once and
a device without torch can run what a device runs. Results go to stdout, progress and logs to stderr.
"""

import logging
import os
import sys
from typing import Annotated

import typer

from . import __version__

app = typer.Typer(
    name="sdgm-edge",
    help="From a text file to a small language model that runs on a device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXTRAS = {
    "torch": "train",
    "sklearn": "train",
    "safetensors": "train",
    "matplotlib": "train",
    "tensorboard": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
}
_debug = False


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sdgm-edge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Log more; -vv logs all.")
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What holds for all commands, given before the command."""
    global _debug
    _debug = debug
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)


def main() -> None:
    """Run the command line and exit: 0 fine, 1 failed, 2 misuse, 130 interrupted."""
    try:
        try:
            app(prog_name="sdgm-edge")
        finally:
            if sys.stdout:  # there is none where the caller closed it
                sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has had enough: leave nothing to flush, and say nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if _debug:
            raise
        message, exit_code = _explain(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(exit_code)


def _explain(error: Exception) -> tuple[str, int]:
    """One line and an exit code for an error."""
    if isinstance(error, ModuleNotFoundError) and (name := (error.name or "").partition(".")[0]) in _EXTRAS:
        return f"{name} is not installed; type: pip install 'sdgm-edge[{_EXTRAS[name]}]'", 1
    from sdgm_edge.runtime import SdgmError

    if isinstance(error, SdgmError):
        return " ".join(str(error).split()), error.exit_code
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected {what}; `sdgm-edge --debug …` shows where: please report it", 1
