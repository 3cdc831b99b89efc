"""The command line as a person meets it: real processes, and commands of a test's own for what goes wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "onnxruntime", "numpy", "onnx", "sklearn", "tokenizers", "matplotlib"}

COMMANDS = """
import errno, sys, time
from pathlib import Path
from sdgm_edge import cli

@cli.app.command()
def fail(name: str) -> None:
    import sdgm_edge.runtime
    raise getattr(sdgm_edge.runtime, name)("first line;\\n  second line")

@cli.app.command()
def lack(module: str) -> None:
    raise ModuleNotFoundError(f"No module named {module!r}", name=module)

@cli.app.command()
def exhaust(what: str) -> None:
    raise {"room": OSError(errno.ENOSPC, "No space left", "a/file"),
           "right": PermissionError(errno.EACCES, "Permission denied", "a/file"),
           "torch": RuntimeError("can't\\nallocate memory"), "python": MemoryError()}[what]

@cli.app.command()
def slip() -> None:
    raise ValueError("a slip")

@cli.app.command()
def count(upto: int) -> None:
    for number in range(upto):
        print(number)

@cli.app.command()
def wait() -> None:
    print("waiting", flush=True)
    time.sleep(60)

@cli.app.command()
def log() -> None:
    import logging
    for level in (logging.WARNING, logging.INFO, logging.DEBUG):
        logging.getLogger("sdgm_edge.anything").log(level, "said")

cli.main()
"""


def run(*arguments: str, program: tuple[str, ...] = ("-m", "sdgm_edge")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def try_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(*arguments, program=("-c", COMMANDS))


@pytest.mark.parametrize("program", [("-m", "sdgm_edge"), ("cli.py",)])
def test_help(program: tuple[str, ...]) -> None:
    done = run("--help", program=program)
    assert done.returncode == 0
    assert "Usage: sdgm-edge" in done.stdout
    assert done.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sdgm_edge import cli\n"
        "try:\n    cli.main()\nfinally:\n    print('IMPORTED', *sys.modules, file=sys.stderr)"
    )
    done = run("--help", program=("-c", code))
    imported = done.stderr.split("IMPORTED")[1].split()
    assert "sdgm_edge.cli" in imported
    assert not HEAVY & {name.partition(".")[0] for name in imported}


def test_what_draws_nothing_starts_without_what_draws() -> None:
    code = "import sys, sdgm_edge.cli; sys.exit('rich' in sys.modules)"
    assert run(program=("-c", code)).returncode == 0


def test_version() -> None:
    import sdgm_edge

    assert run("--version").stdout == f"sdgm-edge {sdgm_edge.__version__}\n"


def test_every_command_has_help() -> None:
    import typer.main

    from sdgm_edge import cli

    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        assert command.help, name
        helps = [getattr(parameter, "help", None) or "" for parameter in command.params]
        assert not [text for text in helps if "[" in text], "what stands in brackets is taken for markup"
        done = run(name, "--help")
        assert done.returncode == 0, done.stderr
        assert "Usage: sdgm-edge" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("compare missing.txt --models foo", "--models: expected sdgm, ringing"),
        ("compare missing.txt --params x", "--params: expected a number of parameters"),
        ("compare missing.txt --protocol foo", "--protocol: expected paper or best, got 'foo'"),
        ("compare missing.txt --minutes nan", "--minutes: expected a number from 0, got nan"),
        ("compare missing.txt --minutes -1", "--minutes: expected a number from 0, got -1.0"),
    ],
)
def test_misuse_is_told_before_the_text_is_read(arguments: str, told: str) -> None:
    done = run(*arguments.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert told in done.stderr


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["no-such-command"]])
def test_misuse(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "No such" in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ("--resume", "my.txt", "--seed", "0"),
            "expected none of its settings, got texts, --seed; leave them",
        ),
        (("--resume", "--epochs", "9"), "expected none of its settings, got --epochs; leave them out"),
        (("--device", "tpu"), "--device: expected one of auto, cpu, cuda, got 'tpu'"),
        (("--precision", "half"), "--precision: expected one of auto, bf16, float32, got 'half'"),
    ],
)
def test_training_refuses_what_it_would_not_heed(flags: tuple[str, ...], told: str) -> None:
    done = run("train", *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert told in done.stderr


@pytest.mark.parametrize(("name", "exit_code"), [("CorpusError", 1), ("ParityError", 1), ("ConfigError", 2)])
def test_error_is_one_line(name: str, exit_code: int) -> None:
    done = try_command("fail", name)
    assert done.returncode == exit_code
    assert done.stdout == ""
    assert done.stderr == "error: first line; second line\n"


def test_debug_shows_a_traceback() -> None:
    done = try_command("--debug", "fail", "CorpusError")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "CorpusError: first line" in done.stderr


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "train"), ("onnx_ir.passes", "export"), ("onnxruntime", "cpu")]
)
def test_missing_extra_gives_the_command_to_type(module: str, extra: str) -> None:
    done = try_command("lack", module)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: {module.split('.')[0]} is not installed; type: pip install 'sdgm-edge[{extra}]'\n"
    )


def test_slip_of_ours_asks_for_a_report() -> None:
    done = try_command("slip")
    assert done.returncode == 1
    assert done.stderr == (
        "error: unexpected ValueError: a slip; `sdgm-edge --debug …` shows where: please report it\n"
    )


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("room", "a/file cannot be written: No space left; free some space, or write elsewhere"),
        ("right", "a/file may not be used: Permission denied; check its permissions, or choose"),
        ("torch", "not enough memory: can't allocate memory; take a smaller model, batch_size"),
        ("python", "not enough memory: Python has no more; take a smaller model, batch_size"),
    ],
)
def test_what_the_machine_lacks_is_no_slip_of_ours(what: str, told: str) -> None:
    done = try_command("exhaust", what)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: {told}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_behind_stdout() -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [sys.executable, "-c", COMMANDS, "count", "3"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.stderr.startswith("error: the output cannot be written: No space left on device; free")
    assert process.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="a shell of another kind")
@pytest.mark.parametrize(("closed", "heard"), [(">&-", ""), ("2>&-", "0\n1\n")])
def test_a_closed_stream_is_no_error(closed: str, heard: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" count 2 {closed}', sys.executable, COMMANDS],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, heard, "")


def test_an_interrupt_while_it_is_imported() -> None:
    program = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sdgm_edge.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "from sdgm_edge.__main__ import main\n"
        "main()\n"
    )
    done = run("--version", program=("-c", program))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_interrupt() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS, "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
@pytest.mark.parametrize("upto", ["3", "100000"])
def test_reader_that_has_had_enough(upto: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS, "count", upto], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    _, errors = process.communicate()
    assert errors == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [([], ["WARNING"]), (["-v"], ["WARNING", "INFO"]), (["-vv"], ["WARNING", "INFO", "DEBUG"])],
)
def test_log_goes_to_stderr(flags: list[str], told: list[str]) -> None:
    done = try_command(*flags, "log")
    assert done.stdout == ""
    assert done.stderr == "".join(f"{level}: said\n" for level in told)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    environment = os.environ | {"_SDGM_EDGE_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        [sys.executable, "-m", "sdgm_edge"], env=environment, capture_output=True, text=True, check=True
    )
    assert "sdgm-edge" in done.stdout


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("compare", "--device"),
        ("compare", "--precision"),
        ("probe memory", "--device"),
        ("probe scale", "--device"),
    ],
)
def test_a_device_that_there_is_not_is_told_before_the_work(tmp_path: Path, command: str, flag: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdgm_edge", *command.split(), flag, "gpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {flag}: expected one of auto, ")
    assert list(tmp_path.iterdir()) == []
