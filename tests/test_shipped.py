"""The model that comes with the package."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sdgm_edge.config import load_config
from sdgm_edge.models import ModelConfig
from sdgm_edge.runtime import BundleError, Generator, pretrained, read_bundle, verify

ROOT = Path(__file__).parent.parent
LIMIT = 12e6


def test_it_is_small_and_whole():
    bundle = read_bundle(pretrained())
    assert pretrained().stat().st_size <= LIMIT
    assert list(bundle.manifest.variants) == ["int8"]
    assert verify(pretrained()).ok


def test_it_speaks_where_no_model_is_named(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sdgm_edge",
        "generate",
        "-p",
        "The game",
        "-n",
        "8",
        "-s",
        "1",
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["model"] == str(pretrained())
    assert len(told["tokens"]) == 8


def test_it_has_a_name_unless_something_else_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_bundle("wikitext-2").path == pretrained()
    (tmp_path / "wikitext-2").mkdir()
    with pytest.raises(BundleError, match="wikitext-2: not a bundle"):
        read_bundle("wikitext-2")


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_it_can_be_drafted_and_says_the_same(temperature):
    gen = Generator.load(pretrained(), providers="cpu")
    prompt = "The first game was released in May. The second game was released in June. The third game was"
    params = {"temperature": temperature, "seed": 5, "max_new_tokens": 120, "logprobs": 1}
    plain, drafted = (gen.generate(prompt, draft=draft, **params) for draft in (0, 16))
    assert drafted.sampled == plain.sampled
    assert drafted.text == plain.text
    assert drafted.drafted.accepted or temperature, "what it says greedily runs into a circle"


def test_it_runs_with_fewer_atoms_and_foresees_less():
    text = (ROOT / "models/pretrained/README.md").read_text(encoding="utf-8")[:1000]
    gens = [Generator.load(pretrained(), providers="cpu", atoms=count) for count in (704, 352, 88)]
    assert [gen.atoms for gen in gens] == [704, 352, 88]
    sizes, nlls = [gen.bundle.size() for gen in gens], [gen.score(text).nll for gen in gens]
    assert sizes == sorted(sizes, reverse=True)
    assert nlls == sorted(nlls)


def test_its_card_is_of_this_model():
    bundle = read_bundle(pretrained())
    card = (ROOT / "models/pretrained/README.md").read_text(encoding="utf-8")
    assert f"{bundle.manifest.num_parameters / 1e6:.1f} million parameters" in card
    assert f"{pretrained().stat().st_size / 1e6:.1f} MB" in card
    assert f"a state of {bundle.config.state_size * 4 / 1e3:.0f} KB" in card
    assert "CC BY-SA" in card


def test_it_is_what_its_recipe_describes():
    """Exported as the recipe says, by which its head looks further back than in training."""
    described = load_config(Path("wikitext-2")).model
    recipe = (ROOT / "models/recipes/wikitext-2.toml").read_text("utf-8")
    [window] = re.findall(r"--copy-window (\d+)", recipe)
    expected = replace(described, copy_window=int(window))
    assert ModelConfig.from_dict(read_bundle(pretrained()).config.model) == expected
