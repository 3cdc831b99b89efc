import subprocess
import sys

import numpy as np
import tiny
from hypothesis import given
from hypothesis import strategies as st
from sdgm_edge.runtime.parameters import SamplingParams
from sdgm_edge.runtime.uniform import Uniform


@given(st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**32 - 1, 2**32, 2**128 - 1]), st.integers(0, 3))
def test_the_numbers_are_those_of_numpy(seed, stream):
    sequence = np.random.SeedSequence(seed, spawn_key=(stream,))
    expected = np.random.Generator(np.random.PCG64(sequence)).random(20)
    ours = Uniform(seed, stream)
    assert [ours.random() for _ in range(20)] == expected.tolist()
    if seed < 2**64:
        assert SamplingParams(seed=seed).rng(stream).random() == expected[0]


def test_without_a_seed_no_two_are_the_same():
    assert Uniform(None).random() != Uniform(None).random()


def test_a_first_token_is_drawn_without_what_takes_long_to_import(tmp_path):
    bundle = tiny.write(tmp_path / "tiny")
    code = f"""
import sys
from sdgm_edge.runtime import Generator
gen = Generator.load({str(bundle)!r}, providers="cpu")
gen.generate("the", seed=1, max_new_tokens=1)
print(*[name for name in ("numpy.random", "random", "secrets", "difflib") if name in sys.modules])
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""
