import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import fuzz_bundle
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from sdgm_edge.runtime.protobuf import changed, field

from sdgm_edge.runtime import (
    BundleError,
    Generator,
    Mixture,
    SdgmError,
    encode_arrays,
    encode_json,
    read_bundle,
    write_bundle,
)
from sdgm_edge.runtime import bundle as bundle_module

FORMS = ["tiny.sdgm", "tiny"]


@pytest.fixture(params=FORMS)
def path(request, tmp_path):
    return tiny.write(tmp_path / request.param)


@pytest.fixture
def folder(tmp_path):
    return tiny.write(tmp_path / "tiny")


def edit_manifest(folder, **changes):
    """Change fields of a folder's manifest; None removes one."""
    file = folder / "manifest.json"
    manifest = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}
    file.write_text(json.dumps(manifest))


def config(**changes):
    return encode_json(
        {"vocab_size": 300, "state_size": 9, "mixing_size": 8, "chunk": 16, "model": {}} | changes
    )


def golden_rows(tokens, logits):
    return {"tokens": tokens, "logits": logits}


def generation(**changes):
    return encode_json({"begin_token": 0, "end_tokens": [], "sampling": {}} | changes)


def variant(file, parity=None):
    return {"file": file, "parity": parity, "accuracy": None}


# Reading what is right


def test_all_of_a_bundle_is_read(path):
    bundle = read_bundle(path)
    assert (bundle.config.vocab_size, bundle.config.chunk) == (tiny.VOCAB, tiny.CHUNK)
    assert bundle.config.model == {"a": 1}
    assert list(bundle.manifest.variants) == ["fp32", "int8"]
    assert bundle.variant().file == "model.onnx"
    assert bundle.variant("int8").accuracy == {"loss": 0.1}
    assert bundle.generation.begin_token == 0
    assert bundle.generation.end_tokens == [0]
    assert bundle.generation.sampling.top_p == 0.95
    assert isinstance(bundle.mixture, Mixture)
    assert bundle.tokenizer.get_vocab_size() == tiny.VOCAB
    assert bundle.read("README.md") == b"# tiny\n"
    assert len(bundle.manifest.golden.tokens["fp32"]) == 4
    bundle.check_all()


def test_a_folder_gives_a_path_to_its_graph_and_a_file_gives_bytes(tmp_path):
    folder, single = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "a.sdgm")
    assert read_bundle(folder).graph("int8") == folder / "model_int8.onnx"
    assert read_bundle(single).graph("int8") == (folder / "model_int8.onnx").read_bytes()


def test_the_mixture_and_the_card_may_be_absent(tmp_path):
    path = tiny.write(tmp_path / "tiny", {"gmm": b"", "README": b""})
    assert read_bundle(path).mixture is None


def test_files_that_the_manifest_does_not_name_are_left_alone_in_a_folder(folder):
    (folder / ".DS_Store").write_bytes(b"?")
    (folder / "notes.txt").symlink_to("/nowhere")
    read_bundle(folder).check_all()


def test_a_file_that_the_manifest_does_not_name_is_not_read(path):
    with pytest.raises(BundleError, match=r"no such file: expected .*tokenizer\.json.*, got 'notes\.txt'"):
        read_bundle(path).read("notes.txt")


def test_a_variant_that_is_not_there_is_refused(path):
    with pytest.raises(BundleError, match="no such variant: expected fp32 or int8, got 'q4'"):
        read_bundle(path).variant("q4")


# Reading what is wrong


def test_something_else_is_not_a_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"it has no manifest\.json"):
        read_bundle(tmp_path)
    with pytest.raises(BundleError, match="there is no such bundle"):
        read_bundle(tmp_path / "nothing")


def test_a_training_run_is_named_as_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(BundleError, match=r"no manifest\.json; `sdgm-edge export .*` makes one of it"):
        read_bundle(tmp_path)


def test_each_file_is_needed(folder):
    for name in tiny.files():
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(
            BundleError, match=rf"{name} is cut or missing: expected {len(data)} bytes, got none"
        ):
            read_bundle(folder)
        (folder / name).write_bytes(data)


def test_a_flipped_bit_in_any_file_is_found(folder):
    rng = np.random.default_rng(0)
    for name in tiny.files():
        data = bytearray((folder / name).read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        with pytest.raises(BundleError, match=f"{name} is damaged: expected sha256"):
            read_bundle(folder).check_all()
        (folder / name).write_bytes(whole)


def test_a_damaged_graph_is_found_when_it_is_opened(path, tmp_path):
    data = path.read_bytes() if path.is_file() else (path / "model.onnx").read_bytes()
    graph = tiny.files()["model.onnx"]
    place = data.index(graph) + len(graph) // 2
    data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    (path if path.is_file() else path / "model.onnx").write_bytes(data)
    bundle = read_bundle(path)
    with pytest.raises(BundleError, match=r"model\.onnx is damaged|readable zip"):
        bundle.graph()
    bundle.graph("int8")


def test_a_link_in_place_of_a_file_is_refused(folder, tmp_path):
    (folder / "README.md").rename(tmp_path / "elsewhere")
    (folder / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"README\.md"):
        read_bundle(folder).check_all()


def test_the_single_file_holds_nothing_that_its_manifest_does_not_name(folder):
    files = {name: (folder / name).read_bytes() for name in [*tiny.files(), "manifest.json"]}
    path = folder.with_suffix(".sdgm")
    path.write_bytes(fuzz_bundle.pack(files | {"more": b""}))
    with pytest.raises(BundleError, match=r"unknown file.*'more'"):
        read_bundle(path)


def test_the_number_of_parameters_is_told_where_it_is_known(path, tmp_path):
    assert read_bundle(path).manifest.num_parameters is None
    assert read_bundle(tiny.write(tmp_path / "told", num_parameters=7)).manifest.num_parameters == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zip"}, "not a bundle: expected format 'sdgm-bundle'"),
        ({"version": 2}, "a newer version: expected 1, got 2; upgrade with: pip install"),
        ({"version": 0}, "version: expected 1, got 0"),
        ({"version": True}, "version: expected 1, got True"),
        ({"name": None}, "missing field: expected name"),
        ({"extra": 1}, "unknown field.*'extra'"),
        ({"name": ""}, "name: expected 1 to 200 characters"),
        ({"name": 3}, "name: expected str, got 3"),
        ({"name": "x\x1b[2J"}, r"name: expected characters that can be printed, got 'x\\x1b\[2J'"),
        ({"default": "q4"}, "default: expected one of .*, got 'q4'"),
        ({"model_id": "abc"}, "model_id: expected 64 hexadecimal digits"),
        ({"made_with": {"onnx": 1}}, "made_with: expected versions as text"),
        ({"made_with": {"onnx": "1\x07"}}, r"made_with: expected .* printed, got '1\\x07'"),
        ({"made_with": {"\x9b2J": "1"}}, r"made_with: expected .* printed, got '\\x9b2J'"),
        ({"num_parameters": 0}, "num_parameters: expected a number from 1, got 0"),
        ({"num_parameters": "4M"}, "num_parameters: expected int or null, got '4M'"),
        ({"atoms": 3}, "atoms: expected dict or null, got 3"),
        ({"atoms": {"count": 4, "state": 1}}, "atoms: missing field: expected steps"),
        ({"atoms": {"count": 0, "state": 1, "steps": {}}}, "count: expected a number from 1, got 0"),
        ({"atoms": {"count": 4, "state": 0, "steps": {}}}, "state: expected a number from 1, got 0"),
        ({"atoms": {"count": 4, "state": 3, "steps": {}}}, "state: expected at most 9 numbers .*, got 12"),
        ({"atoms": {"count": 3, "state": 1, "steps": {}}}, "expected a divisor of mixing_size 8, got 3"),
        ({"atoms": {"count": 4, "state": 1, "steps": {"q4": 2}}}, "steps: expected names among .*, got 'q4'"),
        ({"atoms": {"count": 4, "state": 1, "steps": {"int8": 3}}}, "int8: expected a divisor of 4, got 3"),
        ({"files": {"../x": {"sha256": "0" * 64, "bytes": 1}}}, r"unsafe file name.*'\.\./x'"),
        ({"files": {"config.json": {"sha256": "0" * 64}}}, "missing field: expected bytes"),
        ({"files": {"config.json": {"sha256": "0", "bytes": 1}}}, "64 hexadecimal digits and a size"),
        ({"files": {}}, "missing file: expected config.json"),
        ({"variants": {}}, "unknown file"),
        ({"variants": {"int2": {}}}, "unknown variant: expected fp32 or int8 or q4 or fp16, got 'int2'"),
        ({"variants": {"fp32": variant("../m.onnx")}}, r"a file model….onnx"),
        ({"variants": {"fp32": variant("model.onnx", 1)}}, "parity: expected dict or null"),
        (
            {"variants": {"fp32": variant("model.onnx", {"max": {"of": ["\x1b"]}})}},
            r"variants: fp32: expected .* printed, got '\\x1b'",
        ),
        (
            {"variants": {v: variant("model.onnx") for v in ("fp32", "q4")}},
            "variants: expected a file for each",
        ),
        ({"golden": {"prompt": "", "ids": [300], "variants": {}}}, "no token: expected 0 to 299, got 300"),
        ({"golden": {"prompt": "", "ids": [True], "variants": {}}}, "no token: expected 0 to 299, got True"),
        ({"golden": {"prompt": "", "ids": [], "variants": {"q4": {}}}}, "names among"),
        (
            {"golden": {"prompt": "", "ids": [], "variants": {"fp32": golden_rows([1], [])}}},
            "logits: expected 1 rows, got 0",
        ),
        (
            {"golden": {"prompt": "", "ids": [], "variants": {"fp32": golden_rows([1], [["a"]])}}},
            "logits: expected rows of numbers",
        ),
        (
            {"golden": {"prompt": "", "ids": [], "variants": {"fp32": golden_rows([1], [[10**400]])}}},
            "logits: expected rows of numbers that float32 holds",
        ),
        (
            {"golden": {"prompt": "", "ids": [], "variants": {"fp32": golden_rows([1], [[-1e39]])}}},
            "logits: expected rows of numbers that float32 holds",
        ),
        (
            {"golden": {"prompt": "", "ids": [], "variants": {"fp32": golden_rows([1], [[0] * 301])}}},
            "at most 300 logits a token, got 301",
        ),
    ],
)  # fmt: skip
def test_a_wrong_manifest_names_what_is_wrong(folder, changes, message):
    edit_manifest(folder, **changes)
    with pytest.raises(BundleError, match=message) as e:
        read_bundle(folder)
    assert "\n" not in str(e.value)
    assert str(folder) in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "valid JSON"),
        ('{"format": "sdgm-bundle", "format": "sdgm-bundle"}', "a field is there twice"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": ["\\ud800"]}', "valid JSON.*surrogates not allowed"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ('{"a": ' + "1" * 5000 + "}", "valid JSON"),
        ("[" * 100_000, "valid JSON"),
        ("\ud800", "valid JSON"),
        ("[]", "not a bundle"),
    ],
)
def test_a_manifest_that_is_no_json_is_refused(folder, text, message):
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BundleError, match=message):
        read_bundle(folder)


def test_what_is_too_large_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setitem(bundle_module.CAPS, "tokenizer.json", 100)
    with pytest.raises(BundleError, match=r"tokenizer\.json is too large: expected at most 100 bytes"):
        read_bundle(folder)
    with open(folder / "manifest.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match=r"manifest\.json is too large"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": b"[]"}, "expected an object"),
        ({"config": encode_json({"vocab_size": 300})}, "missing field: expected chunk"),
        ({"config": config(model={"kind": "\x1b[2J"})}, r"model: expected .* printed, got '\\x1b\[2J'"),
        (
            {"config": config(state_size=0)},
            "state_size: expected 1 to",
        ),
        (
            {"config": config(vocab_size=301)},
            "the tokenizer of another model: expected 301 tokens from 0 .* got 300",
        ),
        (
            {"config": config(mixing_size=9)},
            "means: expected vectors of 9 numbers as in config.json, got 8",
        ),
        ({"tokenizer": b"{}"}, "expected a tokenizer"),
        ({"tokenizer": b"\xff\xfe"}, "expected a tokenizer"),
        ({"generation_config": b"{}"}, "missing field: expected begin_token"),
        (
            {"generation_config": generation(begin_token=300)},
            "no token: expected 0 to 299, got 300",
        ),
        (
            {"generation_config": generation(sampling={"top_q": 1})},
            "sampling: unknown sampling parameter",
        ),
        ({"gmm": b"PK"}, "damaged or not a bundle"),
        ({"gmm": encode_arrays({"weights": np.ones(1)})}, "expected weights, means and variances"),
        (
            {"gmm": encode_arrays(tiny.mixture() | {"means": np.full((3, tiny.MIXING), np.nan)})},
            "array means: expected finite numbers",
        ),
        ({"gmm": encode_arrays(tiny.mixture() | {"weights": np.ones(3)})}, "mixture: expected weights"),
        ({"gmm": encode_arrays(tiny.mixture() | {"variances": np.zeros((3, 8))})}, "positive variances"),
    ],
)  # fmt: skip
def test_wrong_content_is_refused_when_written_and_when_read(tmp_path, changes, message):
    target = tmp_path / "tiny"
    with pytest.raises(BundleError, match=message):
        tiny.write(target, changes)
    assert list(tmp_path.iterdir()) == []
    right = tiny.write(target)
    files = fuzz_bundle.seal({n: (right / n).read_bytes() for n in os.listdir(right)} | tiny.files(**changes))
    single = tmp_path / "wrong.sdgm"
    single.write_bytes(fuzz_bundle.pack(files))
    with pytest.raises(BundleError, match=message):
        read_bundle(single)


def test_a_graph_that_keeps_its_weights_elsewhere_is_refused(tmp_path):
    model = tiny.graph()
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location="../weights.bin")
    path = tiny.write(tmp_path / "tiny", {"model": model.SerializeToString()})
    with pytest.raises(
        BundleError, match=r"model\.onnx refers to other files: expected all weights inside it"
    ):
        read_bundle(path).graph()


def value_before_key(tensor, **entries):
    """The tensor with external data whose fields stand in the other order, which protobuf allows."""
    made = [field(2, value.encode()) + field(1, key.encode()) for key, value in entries.items()]
    return tensor.SerializeToString() + b"".join(field(13, entry) for entry in made)


def test_external_data_are_refused_whatever_the_order_of_their_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny.graph()
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head")
    data = head.raw_data
    (tmp_path / "secret.bin").write_bytes(data)
    model.graph.initializer.remove(head)
    head.ClearField("raw_data")
    head.data_location = onnx.TensorProto.EXTERNAL
    tensor = value_before_key(head, location="secret.bin", offset="0", length=str(len(data)))
    graph = changed(model.SerializeToString(), {7: lambda graph: bytes(graph) + field(5, tensor)})
    onnxruntime.InferenceSession(graph)  # reads the file outside
    path = tiny.write(tmp_path / "tiny.sdgm", {"model": graph})
    with pytest.raises(BundleError, match=r"model\.onnx refers to other files: .*; export it again with"):
        Generator.load(path)


def test_memory_stays_low_whatever_is_declared(folder):
    edit_manifest(folder, files={n: {"sha256": "0" * 64, "bytes": 2**50} for n in tiny.files()})
    with pytest.raises(BundleError, match=f"expected {2**50} bytes"):
        read_bundle(folder)


def test_mutations_give_sdgm_errors_and_nothing_else(tmp_path):
    fuzzer = fuzz_bundle.Fuzzer(tmp_path, seed=7)
    for _ in range(250):
        fuzzer.one()
    assert fuzzer.refused > 150


# Writing


@pytest.mark.parametrize("form", FORMS)
def test_the_same_content_gives_the_same_bytes(tmp_path, form):
    def content(path):
        return path.read_bytes() if path.is_file() else {f.name: f.read_bytes() for f in path.iterdir()}

    first = content(tiny.write(tmp_path / form))
    os.utime(tmp_path / form, (0, 0))
    assert content(tiny.write(tmp_path / form)) == first
    assert content(tiny.write(tmp_path / "elsewhere" / form)) == first


def test_folder_and_file_turn_into_each_other(tmp_path):
    folder, single = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "a.sdgm")
    again = read_bundle(folder).save(tmp_path / "b.sdgm")
    assert again.read_bytes() == single.read_bytes()
    back = read_bundle(single).save(tmp_path / "b")
    assert {f.name: f.read_bytes() for f in back.iterdir()} == {
        f.name: f.read_bytes() for f in folder.iterdir()
    }


def test_a_damaged_bundle_is_not_saved(folder, tmp_path):
    (folder / "README.md").write_bytes(b"# tinY\n")
    with pytest.raises(BundleError, match="damaged"):
        read_bundle(folder).save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_is_replaced_even_a_damaged_one(tmp_path, form):
    path = tiny.write(tmp_path / form)
    if path.is_file():
        path.write_bytes(path.read_bytes()[:-100])
    else:
        (path / "model.onnx").unlink()
    tiny.write(path, name="other")
    assert read_bundle(path).manifest.name == "other"
    assert [p.name for p in tmp_path.iterdir()] == [form]


def test_what_is_no_bundle_is_not_replaced(tmp_path):
    (tmp_path / "text.sdgm").write_text("my novel")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "novel.txt").write_text("my novel")
    (tmp_path / "folder.sdgm").mkdir()
    mixed = tiny.write(tmp_path / "mixed")
    (mixed / "novel.txt").write_text("my novel")
    for name, why in (
        ("text.sdgm", "it is no bundle"),
        ("folder", "it also holds 'novel.txt'"),
        ("folder.sdgm", "it is no bundle"),
        ("mixed", "it also holds 'novel.txt'"),
    ):
        with pytest.raises(BundleError, match=f"will not be replaced: {why}; choose another place"):
            tiny.write(tmp_path / name)
    assert (tmp_path / "text.sdgm").read_text() == "my novel"
    assert (mixed / "novel.txt").read_text() == "my novel"


def test_an_empty_folder_may_become_a_bundle(tmp_path):
    (tmp_path / "empty").mkdir()
    read_bundle(tiny.write(tmp_path / "empty"))


def test_a_folder_that_cannot_be_replaced_is_put_back(folder, monkeypatch):
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(BundleError, match="cannot be written: No space left on device"):
        tiny.write(folder, name="other")
    assert os.listdir(folder.parent) == [folder.name]
    assert read_bundle(folder).manifest.name == "tiny"


def test_a_link_is_replaced_and_the_bundle_that_it_names_stays(folder):
    link = folder.with_name("link")
    link.symlink_to(folder.name)
    tiny.write(link, name="other")
    assert not link.is_symlink()
    assert [read_bundle(path).manifest.name for path in (folder, link)] == ["tiny", "other"]
    assert sorted(os.listdir(folder.parent)) == ["link", "tiny"]


def test_a_file_without_the_suffix_is_replaced_by_a_folder(tmp_path):
    path = tiny.write(tmp_path / "tiny.sdgm").rename(tmp_path / "tiny")
    assert tiny.write(path, name="other").is_dir()
    assert read_bundle(path).manifest.name == "other"
    assert os.listdir(tmp_path) == ["tiny"]


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(tmp_path, form, monkeypatch):
    path = tiny.write(tmp_path / form)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="cannot be written: No space left on device; free some space"):
        tiny.write(path, name="other")
    assert [p.name for p in tmp_path.iterdir()] == [form]
    assert read_bundle(path).manifest.name == "tiny"


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=r"cannot be written: .*; free some space, or choose a place"):
        tiny.write(tmp_path / "file" / "tiny")


@pytest.mark.parametrize("form", FORMS)
def test_a_writer_that_is_killed_half_way_leaves_no_partial_bundle(tmp_path, form):
    code = textwrap.dedent(f"""
        import os, signal, sys, tiny
        from pathlib import Path
        real, calls = os.fsync, 0
        def fsync(descriptor):
            global calls
            calls += 1
            if calls == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)
        os.fsync = fsync
        tiny.write(Path({str(tmp_path / form)!r}))
    """)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(tiny.__file__)}
    result = subprocess.run([sys.executable, "-c", code, "1"], env=environment, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / form).exists()
    left = [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]
    assert len(left) == 1
    tiny.write(tmp_path / form)
    assert left[0].exists(), "another writer may still be at work on it"
    old = time.time() - 2 * 24 * 3600
    os.utime(left[0], (old, old))
    tiny.write(tmp_path / form)
    assert [p.name for p in tmp_path.iterdir()] == [form]


def test_values_that_json_does_not_know_are_refused(tmp_path):
    for value in (float("nan"), object(), "\ud800"):
        with pytest.raises(BundleError, match="cannot be written as JSON"):
            encode_json({"a": value})


def test_the_arguments_of_write_bundle_are_checked(tmp_path):
    fields = tiny.fields()
    with pytest.raises(BundleError, match="default"):
        write_bundle(tmp_path / "b", tiny.files(), **(fields | {"default": "q4"}))
    with pytest.raises(BundleError, match="unknown file"):
        write_bundle(tmp_path / "b", tiny.files() | {"notes.txt": b""}, **fields)


def test_every_truncation_class_of_the_single_file_is_refused(tmp_path):
    path = tiny.write(tmp_path / "tiny.sdgm")
    data = path.read_bytes()
    places = {0, 1, 21, 22, 29, 30, 31, *range(0, len(data), len(data) // 60), len(data) - 23, len(data) - 1}
    for place in sorted(places):
        path.write_bytes(data[:place])
        with pytest.raises(SdgmError):
            Generator.load(path)
