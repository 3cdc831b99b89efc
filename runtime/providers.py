"""The one place where ONNX Runtime is imported, set up and given a graph.

It is imported when the first graph is opened and not before, with its telemetry switched off (releases since
1.29 send it unless `ORT_DISABLE_TELEMETRY=1` stands in the environment when they are imported). Which
execution provider a session really has is asked of the session: the list of available ones names CUDA
wherever the GPU package is installed, with a GPU or without.

One thread by default: a token of a small model takes less time than waking a second one. The memory of a run
is planned, one block for each shape of the inputs, and comes from ONNX Runtime's arena: a token takes a tenth
to a seventh less time (of 111 and 315 µs 94 and 286), and after prompts of all lengths a
process holds no more than without. Planned without the arena it holds 90 MB more; the arena alone gains
nothing. What logits of many tokens leave in the arena is given back (`TIDY`). After loading, freed memory is
given back to the system where the C library can, which is as much as the model itself.
"""

import ctypes
import importlib
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .container import AGAIN, shown
from .errors import BundleError, ParameterError, ProviderError

INSTALL = "pip install 'sdgm-edge[cpu]'"
INSTALL_GPU = "pip uninstall -y onnxruntime && pip install 'sdgm-edge[gpu]'"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_QUIET = 4  # ONNX Runtime's log severity: fatal alone; what fails is raised as well
_MOST_THREADS = 1024
TIDY = ("memory.enable_memory_arena_shrinkage", "cpu:0")
"""An entry of a run's options: give the arena's memory back afterwards."""


class Opened(NamedTuple):
    """A graph that is ready to run."""

    session: Any
    """onnxruntime.InferenceSession."""
    provider: str
    """The execution provider that it really has, by its short name: cpu, cuda, …"""
    reason: str
    """Why that one."""


def note(message: str, *values: object) -> None:
    """Log for those who want to know more. Nobody listens in a program that has not imported `logging`, and
    to do so takes a thirtieth of the time to its first token."""
    if (logging := sys.modules.get("logging")) is not None:
        logging.getLogger(__package__).info(message, *values)


@cache
def onnxruntime() -> Any:
    """The onnxruntime module, imported with its telemetry off.

    Raises:
        ProviderError: it is not installed, or broken.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        ort: Any = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as e:
        raise ProviderError(f"onnxruntime is not installed; type: {INSTALL}") from e
    except ImportError as e:
        if isinstance(e.__cause__, KeyboardInterrupt):  # its C code met a Ctrl-C
            raise e.__cause__ from None
        raise ProviderError(
            f"onnxruntime cannot be loaded: {line(e)}; type: {INSTALL} --force-reinstall"
        ) from e
    ort.set_default_logger_severity(_QUIET)
    if hasattr(ort, "disable_telemetry_events"):
        ort.disable_telemetry_events()  # a host program may have imported it before
    return ort


def open_graph(
    graph: Path | bytes,
    where: object,
    *,
    providers: str | Sequence[str] = "auto",
    threads: int | None = None,
    reuse: bool = True,
    reason: str = "asked for",
) -> Opened:
    """Make a session for `graph` on the providers that are asked for.

    `providers`: "auto" takes CUDA where it starts and the CPU otherwise; a name or several ("cpu", "cuda", or
    ONNX Runtime's own names) must all be there. `reuse`: look for values that can take the place of others,
    which takes a third of the time in which a session is made; a run's memory is planned anyway, and it
    matters only where single values are large. `reason`: why providers that are named are taken.

    Raises:
        ParameterError: no such provider, or a number of threads that makes no sense.
        ProviderError: ONNX Runtime or a provider that was asked for is not there.
        BundleError: ONNX Runtime refuses the graph.
    """
    if threads is not None:
        check_threads(threads)
    ort = onnxruntime()
    options = _options(ort, threads or 1)
    options.enable_mem_reuse = reuse
    if providers != "auto":
        wanted = _full_names(ort, _listed(providers))
        return _explicit(ort, graph, where, wanted, options, reason)
    if CUDA not in ort.get_available_providers():
        session = _session(ort, graph, where, [CPU], options)
        return _opened(session, "onnxruntime without GPU support is installed")
    try:
        session = _session(ort, graph, where, [CUDA, CPU], options)
    except BundleError as e:
        session = _session(ort, graph, where, [CPU], options)
        return _opened(session, f"CUDA could not be started: {line(e.__cause__ or e)}")
    works = CUDA in session.get_providers()
    return _opened(session, "CUDA starts here" if works else "CUDA could not be started")


def check_threads(threads: int) -> None:
    """Refuse a number of threads that makes no sense.

    Raises:
        ParameterError: it is none from 1 to 1024.
    """
    if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
        raise ParameterError(
            f"threads: expected 1 to {_MOST_THREADS}, got {shown(threads)}; leave it out for 1"
        )


def _explicit(
    ort: Any, graph: Path | bytes, where: object, wanted: list[str], options: Any, reason: str
) -> Opened:
    available = ort.get_available_providers()
    missing = [name for name in wanted if name not in available]
    if not missing:
        session = _session(ort, graph, where, wanted, options)
        missing = [name for name in wanted if name not in session.get_providers()]
        if not missing:
            return _opened(session, reason)
    name, listed = _short(missing[0]), missing[0] in available
    got = "one that does not start" if listed else ", ".join(map(_short, available))
    remedy = "install a build of onnxruntime that has it"
    if name == "cuda":
        remedy = "check the NVIDIA driver, CUDA and cuDNN" if listed else f"type: {INSTALL_GPU}"
    raise ProviderError(
        f"provider {name} is not there: expected {name}, got {got}; {remedy}, or use providers='cpu'"
    )


def names_cpu(providers: str | Sequence[str]) -> bool:
    """Whether the CPU is asked for, and nothing else."""
    return {_short(name) for name in _listed(providers)} == {"cpu"}


def _listed(providers: str | Sequence[Any]) -> list[Any]:
    return [providers] if isinstance(providers, str) else list(providers)


def _full_names(ort: Any, names: list[Any]) -> list[str]:
    known = {_short(name): name for name in ort.get_all_providers()}
    full = []
    for name in names:
        if _short(name) not in known:
            raise ParameterError(
                f"providers: expected some of {', '.join(known)}, got {shown(name)}; "
                "use 'cpu', or 'auto' by itself"
            )
        full.append(known[_short(name)])
    if not full:
        raise ParameterError("providers: expected at least one, got none; use 'auto' or 'cpu'")
    return full


def save_optimized(graph: Path | bytes, target: Path) -> None:
    """Write a graph as this CPU runs it: optimized, its weights packed, in a file beside it that is mapped.

    Raises:
        ProviderError: ONNX Runtime is not there.
        BundleError: ONNX Runtime refuses the graph, or cannot write.
    """
    ort = onnxruntime()
    options = _options(ort, 1)
    options.optimized_model_filepath = str(target)
    for key, value in (
        ("optimized_model_external_initializers_file_name", f"{target.name}.data"),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(f"session.{key}", value)
    _session(ort, graph, target, [CPU], options)
    _give_memory_back()


def _options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = True
    options.log_severity_level = _QUIET
    return options


def _session(ort: Any, graph: Path | bytes, where: object, providers: list[str], options: Any) -> Any:
    source = str(graph) if isinstance(graph, Path) else graph
    # CUDA takes TF32 for float32 unless told not to, of whose 24 bits it reads 11.
    settings = [{"use_tf32": "0"} if name == CUDA else {} for name in providers]
    try:
        session = ort.InferenceSession(
            source, options, providers=providers, provider_options=settings, enable_fallback=0
        )
    except Exception as e:  # ONNX Runtime raises a dozen unrelated classes
        raise BundleError(f"{where}: ONNX Runtime refuses the graph: {line(e)}; {AGAIN}") from e
    session.disable_fallback()
    session._model_bytes = None  # kept for a fallback that is switched off
    return session


def _opened(session: Any, reason: str) -> Opened:
    provider = _short(session.get_providers()[0])
    note("running on %s: %s", provider, reason)
    _give_memory_back()
    return Opened(session, provider, reason)


def _give_memory_back() -> None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    trim(0)


def _short(name: Any) -> str:
    return name.removesuffix("ExecutionProvider").lower() if isinstance(name, str) else ""


def line(e: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    return re.sub(r"\s+", " ", str(e)).strip()[:200]
