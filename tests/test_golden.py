"""The bundle that is committed: what was written once is read for ever."""

import shutil
from pathlib import Path

import pytest

from sdgm_edge.runtime import Generator, read_bundle, verify

GOLDEN = Path(__file__).parent / "data" / "golden.sdgm"
SENTENCE = (
    " a time there was a small river that rang like a bell. The bell rang once, and the river answered it"
)


def test_it_is_small_and_verifies():
    assert GOLDEN.stat().st_size < 200_000
    report = verify(GOLDEN, providers="cpu")
    assert report.ok
    assert [v.variant for v in report.variants] == ["fp32", "int8", "q4"]


@pytest.mark.parametrize("variant", ["fp32", "int8", "q4"])
def test_it_says_what_it_learned(variant):
    generator = Generator.load(GOLDEN, variant, providers="cpu")
    text = generator.generate("Once upon", temperature=0, max_new_tokens=80).text
    assert text.startswith(SENTENCE)


def test_it_is_the_same_as_a_folder(tmp_path):
    folder = read_bundle(GOLDEN).save(tmp_path / "golden")
    assert verify(folder, providers="cpu").ok
    assert read_bundle(folder).save(tmp_path / "again.sdgm").read_bytes() == GOLDEN.read_bytes()


def test_its_mixture_tells_familiar_from_strange():
    generator = Generator.load(GOLDEN, "fp32", providers="cpu")
    familiar = generator.typicality("Once upon a time there was a small river").mean()
    assert familiar > generator.typicality("qz%%#XJ 77 vvvv }}{{").mean()


def test_it_can_be_moved(tmp_path):
    shutil.copy(GOLDEN, tmp_path / "elsewhere.sdgm")
    assert verify(tmp_path / "elsewhere.sdgm", providers="cpu").ok
