"""`sdgm-edge generate` as a person meets it: real processes on a tiny bundle."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from sdgm_edge.runtime import Generator, encode_json

POSIX = pytest.mark.skipif(os.name == "nt", reason="terminals, signals and pipes of another kind")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundles/tiny` in it."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write(folder / "bundles/tiny")
    return folder


@pytest.fixture(scope="module")
def generator(home: Path) -> Generator:
    return Generator.load(home / "bundles/tiny")


def command(*arguments: object) -> list[str | bytes]:
    told = (a if isinstance(a, bytes) else str(a) for a in arguments)
    return [sys.executable, "-m", "sdgm_edge", "generate", *told]


def generate(
    folder: Path, *arguments: object, stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, env=os.environ | environment, **source
    )


def told(folder: Path, *arguments: object, stdin: bytes | None = None) -> dict[str, Any]:
    """The one JSON object that it prints."""
    done = generate(folder, *arguments, "--json", stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_drafts_change_no_text_and_are_told(home: Path, generator: Generator) -> None:
    prompt, params = "Once upon Once upon Once upon", ("-n", 60, "-s", 1, "--temp", 0.2)
    plain = told(home, "-p", prompt, *params)
    drafted = told(home, "-p", prompt, *params, "--draft", 8)
    assert drafted["tokens"] == plain["tokens"]
    assert plain["drafted"] is None
    assert drafted["drafted"].keys() == {"proposed", "accepted", "calls"}
    assert drafted["drafted"]["calls"] == 60 - drafted["drafted"]["accepted"]


def test_text_alone_on_stdout(home: Path, generator: Generator) -> None:
    done = generate(home, "-p", "Once upon", "-n", 20, "-s", 1)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = generator.generate("Once upon", heal=True, max_new_tokens=20, seed=1).text
    assert done.stdout.decode() == expected


KNOBS = [
    ("--temp 0.7 --top-k 9 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.3 --no-repeat-ngram-size 2 "
     "--stop e --stop qu -t 2 --providers cpu",
     {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3,
      "no_repeat_ngram_size": 2, "stop": ["e", "qu"]}),
    ("--temperature 0 --prior-strength 0.5 --steer 1", {"temperature": 0, "prior_strength": 0.5, "steer": 1}),
    ("--prior-strength 1 --prior-mode prior --steer 0=2,2=0",
     {"prior_strength": 1, "prior_mode": "prior", "steer": {0: 2, 2: 0}}),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "params"), KNOBS, ids=["sampling", "pinned", "prior"])
def test_flags_are_the_parameters(
    home: Path, generator: Generator, flags: str, params: dict[str, Any]
) -> None:
    record = told(home, "-p", "Once upon", "-n", 30, "-s", 5, *flags.split())
    expected = generator.generate("Once upon", heal=True, max_new_tokens=30, seed=5, **params)
    assert record["tokens"] == expected.tokens
    assert (record["text"], record["finish_reason"]) == (expected.text, expected.finish_reason)
    assert record["stop"] == expected.stop


def test_json_tells_all(home: Path, generator: Generator) -> None:
    record = told(home, "-p", "Once", "-n", 4, "-s", 2, "--logprobs", 3, "--variant", "int8")
    int8 = Generator.load(generator.bundle.path, variant="int8")
    expected = int8.generate("Once", heal=True, max_new_tokens=4, seed=2, logprobs=3)
    assert record["tokens"] == expected.tokens
    assert record["logprobs"] == pytest.approx(expected.logprobs, abs=1e-6)
    assert [[(t["token"], t["text"]) for t in top] for top in record["top"]] == [
        [(i, int8.decode([i])) for i, _ in s.top] for s in expected.sampled
    ]
    assert (record["variant"], record["provider"], record["seed"]) == ("int8", "cpu", 2)
    assert record["model"] == "bundles/tiny"
    timing = record["timing"]
    assert (timing["prompt_tokens"], timing["new_tokens"]) == (expected.timing.prompt_tokens, 4)
    assert timing["seconds"] >= timing["prompt_seconds"] > 0


def test_a_fresh_seed_is_told_and_gives_the_text_again(home: Path) -> None:
    first = told(home, "-p", "Once", "-n", 20)
    assert told(home, "-p", "Once", "-n", 20, "-s", first["seed"])["tokens"] == first["tokens"]


def test_candidates(home: Path, generator: Generator) -> None:
    expected = generator.candidates("Once", 3, heal=True, max_new_tokens=6, seed=4)
    flags = ("-p", "Once", "-n", 6, "-s", 4, "-c", 3)
    plain = generate(home, *flags)
    heads = [f"--- {i} of 3, seed {seed} ---" for i, seed in ((1, 4), (2, 5), (3, 6))]
    texts = [f"{head}\n{e.text}\n" for head, e in zip(heads, expected, strict=True)]
    assert plain.stdout.decode() == "".join(texts)
    lines = [json.loads(line) for line in generate(home, *flags, "--json").stdout.splitlines()]
    assert [line["tokens"] for line in lines] == [e.tokens for e in expected]
    assert [line["seed"] for line in lines] == [4, 5, 6]


def test_healing_can_be_left_out(home: Path, generator: Generator) -> None:
    for flag, heal in (("--heal", True), ("--no-heal", False)):
        expected = generator.generate("Once upo", heal=heal, temperature=0, max_new_tokens=8)
        record = told(home, "-p", "Once upo", "--temp", 0, "-n", 8, flag)
        assert record["tokens"] == expected.tokens
        assert record["timing"]["prompt_tokens"] == expected.timing.prompt_tokens


def test_the_bundle_has_the_defaults_and_flags_win(tmp_path: Path) -> None:
    defaults = {"begin_token": 0, "end_tokens": [], "sampling": {"max_new_tokens": 3, "seed": 9}}
    tiny.write(tmp_path / "b.sdgm", {"generation_config": encode_json(defaults)})
    record = told(tmp_path, "-m", "b.sdgm", "-p", "Once")
    assert (len(record["tokens"]), record["seed"]) == (3, 9)
    record = told(tmp_path, "-m", "b.sdgm", "-p", "Once", "-n", 5, "-s", 8)
    assert (len(record["tokens"]), record["seed"]) == (5, 8)


def test_prompts_of_files_and_stdin_end_before_their_last_line_end(home: Path, tmp_path: Path) -> None:
    flags = ("-n", 8, "--temp", 0)
    expected = told(home, "-p", "Once\nupon", *flags)["tokens"]
    for content in (b"Once\nupon\n", b"Once\nupon"):
        (tmp_path / "prompt.txt").write_bytes(content)
        assert told(home, "-f", tmp_path / "prompt.txt", *flags)["tokens"] == expected
        assert told(home, *flags, stdin=content)["tokens"] == expected
        assert told(home, "-f", "-", *flags, stdin=content)["tokens"] == expected
    assert told(home, "-p", "Once\nupon", *flags, stdin=b"not read")["tokens"] == expected


def test_a_long_prompt(home: Path, tmp_path: Path, generator: Generator) -> None:
    text = (tiny.TEXT + "\n") * (150_000 // len(tiny.TEXT))
    (tmp_path / "long.txt").write_text(text)
    record = told(home, "-f", tmp_path / "long.txt", "-n", 2, "--no-heal")
    assert record["timing"]["prompt_tokens"] == len(generator.encode(text[:-1])) > 30_000


def test_no_prompt_begins_a_text(home: Path, generator: Generator) -> None:
    expected = generator.generate(None, temperature=0, max_new_tokens=8).tokens
    assert told(home, "-n", 8, "--temp", 0)["tokens"] == expected  # stdin is /dev/null


@POSIX
def test_a_terminal_is_not_waited_for(home: Path, generator: Generator) -> None:
    import pty

    master, slave = pty.openpty()
    flags = ("-n", 8, "--temp", 0)
    with subprocess.Popen(command(*flags), cwd=home, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        shown = b""
        try:
            while part := os.read(master, 4096):
                shown += part
        except OSError:  # Linux's way to say that the other end is closed
            pass
    os.close(master)
    assert process.returncode == 0
    expected = generator.generate(None, temperature=0, max_new_tokens=8).text
    assert shown.decode() == f"{expected}\n".replace("\n", "\r\n")  # the shell's prompt has its own line


def test_the_newest_bundle_is_taken(tmp_path: Path) -> None:
    for age, path in enumerate(
        ("bundles/old/manifest.json", "bundles/two/new.sdgm", "bundles/.x/manifest.json")
    ):
        target = tmp_path / path
        tiny.write(target.parent if target.suffix == ".json" else target)
        os.utime(target, (age, age))
    (tmp_path / "bundles/gone.sdgm").symlink_to("nowhere")
    assert told(tmp_path, "-p", "Once", "-n", 1)["model"] == "bundles/two/new.sdgm"


@POSIX
def test_a_state_is_kept_where_nobody_reads_on(home: Path, tmp_path: Path, generator: Generator) -> None:
    state = tmp_path / "s.state"
    process = subprocess.Popen(
        command("-p", "Once", "--temp", 0, "-n", 20_000, "--state", state),
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(20)
    process.stdout.close()
    process.wait()
    assert generator.load_session(state).position > 1


def test_a_state_goes_on(home: Path, tmp_path: Path, generator: Generator) -> None:
    state = tmp_path / "s.state"
    whole = generator.generate("Once upon", heal=True, temperature=0, max_new_tokens=12).tokens
    first = told(home, "-p", "Once upon", "--temp", 0, "-n", 7, "--state", state)["tokens"]
    assert first + told(home, "--temp", 0, "-n", 5, "--state", state)["tokens"] == whole
    session = generator.load_session(state)
    expected = generator.generate(" a time", session=session, temperature=0, max_new_tokens=4).tokens
    more = told(home, "--temp", 0, "-n", 4, "--no-heal", "--state", state, "-p", " a time")["tokens"]
    assert more == expected


@POSIX
def test_ctrl_c_ends_quietly_and_keeps_what_was_generated(
    home: Path, tmp_path: Path, generator: Generator
) -> None:
    state = tmp_path / "s.state"
    with subprocess.Popen(
        command("-p", "Once", "--temp", 0, "-n", 10**9, "--state", state),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        shown = b""
        while len(shown) < 64:  # it is flushed as it comes
            part = process.stdout.read(64)
            assert part, "it ended before it was interrupted"
            shown += part
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert (process.returncode, errors) == (130, b"")
    session = generator.load_session(state)
    read = generator.generate("Once", heal=True, max_new_tokens=1).timing.prompt_tokens
    count = session.position - read
    expected = generator.generate("Once", heal=True, temperature=0, max_new_tokens=count)
    assert (shown + rest).decode() == expected.text
    assert session.tokens[-min(count, 1000) :] == expected.tokens[-1000:]


@POSIX
def test_a_reader_that_has_had_enough(home: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("-p", "Once", "-n", 50),
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_an_output_that_lacks_characters_escapes_them(home: Path) -> None:
    flags = ("-p", "Once", "-n", 40, "-s", 1)
    plain = generate(home, *flags).stdout.decode()
    assert not plain.isascii()
    done = generate(home, *flags, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == plain.encode("ascii", "backslashreplace")


def test_what_it_cost_is_logged(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdgm_edge", "-v", "generate", "-p", "Once", "-n", "9", "-s", "1"],
        cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0
    assert "tokens read" in done.stderr
    assert "ended by length" in done.stderr
    assert "INFO" not in done.stdout


def test_the_lines_of_the_readme_run(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    bundle = tiny.write(tmp_path / "bundles/mine")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = Generator.load(bundle).generate("Once upon a time", max_new_tokens=64, temperature=0.8, seed=1)
    assert done.stdout.decode() == f"{expected.text}\n"


BAD: list[tuple[tuple[object, ...], int, str]] = [
    (("-p", ""), 2, "--prompt is empty: expected text; to begin from nothing, leave it out"),
    (("-p", b"caf\xe9"), 2, "--prompt is not UTF-8"),
    (("-p", "a", "-f", "b"), 2, "--prompt and --file both give a prompt"),
    (("-f", "none.txt"), 1, "none.txt: cannot be read: No such file"),
    (("-f", "bundles"), 1, "bundles: cannot be read"),
    (("-f", "latin1.txt"), 1, "latin1.txt is not UTF-8: invalid continuation byte at byte 3; convert it"),
    (("-f", "empty.txt"), 1, "empty.txt is empty: expected a prompt"),
    (("-p", "a", "--temp", -1), 2, "temperature: expected a number from 0 to 100, got -1.0"),
    (("-p", "a", "--top-p", 0), 2, "top_p: expected a number above 0"),
    (("-p", "a", "--top-k", -3), 2, "top_k: expected an integer of at least 0"),
    (("-p", "a", "--min-p", 1.5), 2, "min_p: expected a number from 0 to 1"),
    (("-p", "a", "--repetition-penalty", 0), 2, "repetition_penalty: expected"),
    (("-p", "a", "--no-repeat-ngram-size", 999), 2, "no_repeat_ngram_size: expected at most"),
    (("-p", "a", "-n", 0), 2, "max_new_tokens: expected an integer of at least 1"),
    (("-p", "a", "-s", -1), 2, "seed: expected"),
    (("-p", "a", "-t", 0), 2, "threads: expected"),
    (("-p", "a", "-c", 0), 2, "--candidates: expected a number of texts from 1, got 0"),
    (("-p", "a", "--stop", ""), 2, "stop: expected texts of at least one character"),
    (("-p", "a", "--logprobs", 2), 2, "--logprobs are told in JSON: add --json"),
    (("-p", "a", "--logprobs", -2, "--json"), 2, "logprobs: expected"),
    (("-p", "a", "--steer", "1"), 2, "prior_strength: expected a number above 0, without which steer"),
    (("-p", "a", "--steer", "one"), 2, "--steer: expected a component such as 3, or factors such as 3=2,5=0"),
    (("-p", "a", "--steer", "9", "--prior-strength", 1), 2, "steer: expected"),
    (("-p", "a", "--steer", "1=2,1=0", "--prior-strength", 1), 2, "each once, got '1=2,1=0'"),
    (("-p", "a", "--prior-strength", 2), 2, "prior_strength: expected a number from 0 to 1"),
    (
        ("-p", "a", "--prior-strength", 1, "--prior-mode", "x"),
        2,
        "prior_mode: expected 'posterior' or 'prior'",
    ),
    (("-p", "a", "--providers", "tpu"), 2, "providers: expected"),
    (("-p", "a", "--variant", "q4"), 1, "no such variant: expected fp32 or int8, got 'q4'"),
    (("-p", "a", "-m", "none.sdgm"), 1, "none.sdgm: there is no such bundle"),
    (("-p", "a", "-m", "latin1.txt"), 1, "latin1.txt: "),
    (("-p", "a", "--state", "empty.txt/s.state"), 1, "s.state: cannot be written"),
    (("-p", "a", "--state", "bundles"), 1, "bundles: cannot be read"),
    (("-p", "a", "--state", "latin1.txt"), 1, "latin1.txt: "),
    (("-p", "a", "--state", "s" * 300), 1, "cannot be written: File name too long"),
    (("-p", "a", "--state", "s", "-c", 2), 2, "--state goes on with one text"),
]


@pytest.mark.parametrize(("flags", "exit_code", "message"), BAD, ids=lambda value: None)
def test_bad_input_is_one_named_error(
    home: Path, flags: tuple[object, ...], exit_code: int, message: str
) -> None:
    (home / "latin1.txt").write_bytes(b"caf\xe9 au lait")
    (home / "empty.txt").write_bytes(b"\n")
    done = generate(home, *flags)
    error = done.stderr.decode()
    assert done.stdout == b""
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert done.returncode == exit_code


def test_an_empty_pipe_is_no_prompt_but_a_mistake(home: Path) -> None:
    done = generate(home, stdin=b"")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: standard input is empty: expected a prompt")
