"""Prepared weights: made once, mapped by all, refused where they are not as they were made."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny

from sdgm_edge.runtime import (
    BundleError,
    CacheError,
    Generator,
    ParameterError,
    measure_footprint,
    prepare,
    read_bundle,
)
from sdgm_edge.runtime import prepared as module

POSIX = pytest.mark.skipif(os.name == "nt", reason="owners and modes of another kind")
MAPPED = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
DATA = "model.onnx.data"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDGM_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("prepared") / "tiny.sdgm")


@pytest.fixture
def entry(cache, path):
    return prepare(read_bundle(path), "int8")


def text(path, **options):
    return Generator.load(path, **options).generate("Once", max_new_tokens=20, seed=3, logprobs=0)


@pytest.mark.parametrize("kind", ["tiny", "tiny.sdgm"])
@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_it_says_the_same(cache, tmp_path, kind, variant):
    path = tiny.write(tmp_path / kind)
    plain = text(path, variant=variant, providers="cpu")
    for _ in range(2):  # made, then found
        assert text(path, variant=variant, prepared=True).logprobs == plain.logprobs
    assert len(os.listdir(cache / "prepared")) == 1


@pytest.mark.parametrize("variant", ["fp32", "int8", "q4"])
def test_real_kernels_say_the_same_or_are_refused(cache, variant):
    golden = Path(__file__).parent / "data/golden.sdgm"
    plain = text(golden, variant=variant, providers="cpu")
    refused = ""
    try:
        packed = text(golden, variant=variant, prepared=True)
    except CacheError as e:
        refused = str(e)
    if refused:
        assert variant == "q4"  # whose matrices here are small, which ONNX Runtime packs wrongly
        assert "q4 cannot be prepared: expected the logits that it gives unprepared" in refused
    else:
        assert packed.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_what_computes_something_else_is_not_kept(cache, path, monkeypatch):
    def wrong(graph, target):
        target.write_bytes(tiny.graph(seed=9).SerializeToString())

    monkeypatch.setattr(module, "save_optimized", wrong)
    with pytest.raises(CacheError, match=r"int8 cannot be prepared: expected the logits .*difference of \d"):
        prepare(read_bundle(path), "int8")
    assert os.listdir(cache / "prepared") == []


def test_what_cannot_be_saved_is_told(cache, path, monkeypatch):
    real = module.save_optimized
    monkeypatch.setattr(module, "save_optimized", lambda graph, target: real(graph, target / "none/model"))
    with pytest.raises(CacheError, match=r"int8 cannot be prepared in .*: SystemError.*; go without prep"):
        prepare(read_bundle(path), "int8")
    assert os.listdir(cache / "prepared") == []


@pytest.mark.skipif(os.name == "nt", reason="limits of another kind")
def test_a_full_disk_is_told_in_one_line(cache, path):
    code = """
import resource, signal, sys
from sdgm_edge.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # the system refuses more, as a full disk does
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "prepare", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    place, _, why = done.stderr.partition(": the cache cannot be used: ")
    assert place.startswith(f"error: {cache}/prepared/")
    remedy = "free some space, name another folder in SDGM_EDGE_CACHE, or go without preparing"
    assert why == f"File too large; {remedy}\n"
    assert os.listdir(cache / "prepared") == []


def test_it_is_made_once_and_private(entry, path):
    again = prepare(read_bundle(path), "int8")
    assert (entry.made, again.made) == (True, False)
    assert (again.folder, again.num_bytes) == (entry.folder, entry.num_bytes)
    assert sorted(os.listdir(entry.folder)) == ["model.onnx", DATA, "prepared.json"]
    assert entry.num_bytes == sum(file.stat().st_size for file in entry.folder.iterdir())
    assert os.listdir(entry.folder.parent) == [entry.folder.name]
    if os.name == "posix":
        assert {file.stat().st_mode & 0o777 for file in entry.folder.iterdir()} == {0o600}
        assert {f.stat().st_mode & 0o777 for f in (entry.folder, entry.folder.parent)} == {0o700}


@MAPPED
def test_the_weights_are_mapped_from_the_file(entry, path):
    gen = Generator.load(path, "int8", prepared=True)
    gen.generate("Once", max_new_tokens=1)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(entry.folder) in line]
    assert [line.split()[-1] for line in lines] == [str(entry.folder / DATA)] * len(lines) != []


@pytest.mark.parametrize("changed", ["graph", "onnxruntime", "cpu", "cores"])
def test_another_graph_release_or_cpu_has_an_entry_of_its_own(entry, path, tmp_path, monkeypatch, changed):
    if changed == "graph":
        path = tiny.write(tmp_path / "b", {"model_int8": tiny.graph(seed=9).SerializeToString()})
    elif changed == "onnxruntime":
        monkeypatch.setattr(module.onnxruntime(), "__version__", "9.9.9")
    elif changed == "cpu":
        monkeypatch.setattr(module, "cpu_identity", lambda: {"flags": "fpu"})
    else:
        alone = module.usable_cores() == 1
        monkeypatch.setattr(module, "usable_cores", lambda: 2 if alone else 1)
    other = prepare(read_bundle(path), "int8")
    assert other.made
    assert other.folder != entry.folder


def test_the_identity_of_the_cpu_does_not_drift():
    assert module.cpu_identity() == module.cpu_identity()
    assert all(isinstance(value, str) and value for value in module.cpu_identity().values())
    if sys.platform == "linux":
        assert len(module.cpu_identity()) > 1


RACE = """
import sys
from pathlib import Path
from sdgm_edge.runtime import prepare, prepared, read_bundle
real = prepared.save_optimized
def together(graph, target):  # both are writing before either is done
    real(graph, target)
    print("written", flush=True)
    sys.stdin.readline()
prepared.save_optimized = together
entry = prepare(read_bundle(sys.argv[1]), "int8")
print(entry.folder)
"""


def test_two_processes_prepare_at_once(cache, path):
    race = [sys.executable, "-c", RACE, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(race, **pipes) as one, subprocess.Popen(race, **pipes) as two:
        assert [one.stdout.readline(), two.stdout.readline()] == ["written\n"] * 2
        folders = [process.communicate("\n")[0].strip() for process in (one, two)]
        assert (one.returncode, two.returncode) == (0, 0)
    assert folders[0] == folders[1]
    assert os.listdir(cache / "prepared") == [Path(folders[0]).name]
    assert text(path, variant="int8", prepared=True).tokens


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    status = file.stat()
    with open(file, "r+b") as opened:  # in place, and with the old date
        opened.write(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit(record, **changes):
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


TAMPERED = {
    "weights": (lambda folder: flip(folder / DATA), "sha256"),
    "graph": (lambda folder: flip(folder / "model.onnx"), "sha256"),
    "cut": (lambda folder: os.truncate(folder / DATA, 100), "sha256"),
    "gone": (lambda folder: (folder / DATA).unlink(), "got others"),
    "more": (lambda folder: (folder / "more").touch(0o600), "got others"),
    "release": (lambda folder: edit(folder / "prepared.json", onnxruntime="1"), "got others"),
    "no files": (lambda folder: edit(folder / "prepared.json", files=[]), "damaged prepared.json"),
    "no record": (lambda folder: (folder / "prepared.json").unlink(), "damaged prepared.json"),
    "no json": (lambda folder: (folder / "prepared.json").write_text("{"), "damaged prepared.json"),
}


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("what", TAMPERED)
def test_what_is_not_as_it_was_made_is_refused(entry, path, what, thorough):
    change, told = TAMPERED[what]
    change(entry.folder)
    with pytest.raises(CacheError, match=f"the prepared form is not used: expected .*{told}.*; remove "):
        prepare(read_bundle(path), "int8", thorough=thorough)


def test_weights_that_were_not_touched_are_not_hashed_again_unless_asked(entry, path, monkeypatch):
    hashed = []
    real = module._account
    monkeypatch.setattr(module, "_account", lambda file: hashed.append(file.name) or real(file))
    prepare(read_bundle(path), "int8", thorough=False)
    assert hashed == ["model.onnx"] if os.name == "posix" else ["model.onnx", DATA]
    hashed.clear()
    os.utime(entry.folder / DATA)  # as a backup that was put back: another date, the same bytes
    prepare(read_bundle(path), "int8", thorough=False)
    prepare(read_bundle(path), "int8")
    assert hashed == ["model.onnx", DATA] * 2


@POSIX
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
@pytest.mark.parametrize("what", ["root", "entry", "file"])
def test_what_others_may_write_to_is_refused(entry, path, what, mode):
    place = {"root": entry.folder.parent, "entry": entry.folder, "file": entry.folder / DATA}[what]
    place.chmod(mode)
    with pytest.raises(CacheError, match=r"expected one that you alone may write to, got [d-]rwx"):
        Generator.load(path, "int8", prepared=True)


@POSIX
def test_what_belongs_to_others_is_refused(entry, path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: os.stat(entry.folder).st_uid + 1)
    if os.stat(entry.folder).st_uid == 0:  # root's own are everybody's to use
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(entry.folder, 12345, -1)
    with pytest.raises(CacheError, match="expected one of your own, got one of user"):
        prepare(read_bundle(path), "int8")


@POSIX
def test_links_are_refused(entry, path, tmp_path):
    moved = tmp_path / "moved"
    entry.folder.rename(moved)
    entry.folder.symlink_to(moved)
    with pytest.raises(CacheError, match="expected a folder or a regular file, got a link"):
        prepare(read_bundle(path), "int8")


def test_a_cache_that_cannot_be_written_is_told(path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDGM_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"the cache cannot be used: .*; free some space, name another"):
        prepare(read_bundle(path), "int8")


@POSIX
def test_a_user_without_a_home_is_told_where_to_name_a_cache(path, monkeypatch):
    for name in ("SDGM_EDGE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2_000_000_001)  # whom no file of users names
    with pytest.raises(CacheError, match=r"no home folder to keep a cache in.*SDGM_EDGE_CACHE"):
        prepare(read_bundle(path), "int8")


def test_a_graph_that_is_refused_leaves_nothing_behind(cache, path, tmp_path):
    broken = tiny.write(tmp_path / "broken", {"model_int8": b"no graph"})
    with pytest.raises(BundleError, match="int8: ONNX Runtime refuses the graph"):
        prepare(read_bundle(broken), "int8")
    assert os.listdir(cache / "prepared") == []


def test_what_killed_writers_left_is_removed_after_a_day(entry, path):
    old, new = (entry.folder.parent / f".{name}.partial" for name in ("old", "new"))
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    prepare(read_bundle(path), "fp32")
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("providers", ["cuda", ["cuda", "cpu"], [5]])
def test_only_the_cpu_takes_prepared_weights(cache, path, providers):
    with pytest.raises(ParameterError, match="providers: expected cpu, which alone takes prepared weights"):
        Generator.load(path, providers=providers, prepared=True)
    assert not cache.exists()


@pytest.mark.parametrize("providers", ["CPUExecutionProvider", ("cpu",)])
def test_the_cpu_has_several_names(cache, path, providers):
    assert Generator.load(path, providers=providers, prepared=True).provider == "cpu"


def test_a_footprint_can_be_that_of_prepared_weights(cache, path):
    measured = measure_footprint(path, ["int8"], tokens=1, repeats=1, prepared=True)
    assert measured.prepared
    assert len(os.listdir(cache / "prepared")) == 1


# The command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sdgm_edge", *map(str, arguments)],
        capture_output=True, stdin=subprocess.DEVNULL, text=True, encoding="utf-8",
    )  # fmt: skip


def test_the_command_prepares_every_variant(cache, path):
    done = command("prepare", path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert [(entry["variant"], entry["made"]) for entry in told] == [("fp32", True), ("int8", True)]
    assert {Path(entry["folder"]).parent for entry in told} == {cache / "prepared"}
    done = command("prepare", path, "--variant", "int8")
    assert done.returncode == 0
    assert "made now" in done.stdout


def test_processes_that_load_at_once_from_an_empty_cache_say_the_same(cache, path):
    asked = ("generate", "-m", path, "-p", "Once", "-n", "9", "-s", "1", "--prepared", "--no-heal")
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: command(*asked), range(3)))
    assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 3
    assert len({one.stdout for one in done}) == 1
    (entry,) = (cache / "prepared").iterdir()
    assert prepare(read_bundle(path)).folder == entry, "whole, every hash"


@POSIX
def test_loading_refuses_a_cache_that_others_may_write_to(cache, path):
    asked = ("generate", "-m", path, "-p", "Once", "-n", "1", "--prepared")
    assert command(*asked).returncode == 0
    (cache / "prepared").chmod(0o777)
    done = command(*asked)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {cache / 'prepared'}: the prepared form is not used: expected one")
    assert command(*asked[:-1]).returncode == 0, "without it the bundle runs as before"


def test_bench_measures_what_is_prepared_and_prepares_it(cache, path):
    small = ("-p", "4", "-n", "2", "-r", "1", "-d", "0", "--json")
    done = command("bench", path, "--prepared", "--variant", "int8", *small)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert len(os.listdir(cache / "prepared")) == 1


def test_generate_takes_what_is_prepared(cache, path):
    flags = ("-p", "Once", "-n", "9", "-s", "1", "--no-heal")
    plain = command("generate", "-m", path, *flags)
    done = command("generate", "-m", path, *flags, "--prepared")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == plain.stdout != ""
    (folder,) = (cache / "prepared").iterdir()
    flip(folder / DATA)
    done = command("generate", "-m", path, *flags, "--prepared")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {folder / DATA}: the prepared form is not used: expected sha256")
