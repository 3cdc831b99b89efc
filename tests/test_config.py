import json
from pathlib import Path

import pytest

from sdgm_edge.config import PRESET_RUNS, RECIPES, RunConfig, load_config
from sdgm_edge.runtime import ConfigError


@pytest.mark.parametrize("name", PRESET_RUNS)
def test_presets_round_trip_through_json(name):
    config = load_config(preset=name)
    assert config.preset == name
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "edge-nano"\n[corpus]\ntrain = ["a.txt"]\n[training]\nepochs = 9\nseed = 4\n')
    config = load_config(path, training={"epochs": 2})
    assert (config.preset, config.training.epochs, config.training.seed) == ("edge-nano", 2, 4)
    assert config.corpus.train == ("a.txt",)
    assert config.model == load_config(preset="edge-nano").model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training\n", "is not a readable TOML file"),
        ("[training]\nepoch = 3", r"run.toml: a key of \[training\] must be one of .*epochs.*, got 'epoch'"),
        ("[trainig]\n", "a table or key must be one of corpus, loss, model, preset, training, got 'trainig'"),
        ('preset = "edge"', "preset must be one of paper, edge-nano, edge-micro, edge-small, got 'edge'"),
        ("model = 3", r"model must be a table like \[model\], got 3"),
        ("[model]\nwidth = -1", "model.width must be a whole number of at least 1, got -1"),
        ("[loss]\nprior = -1.0", "loss.prior must be a number of at least 0"),
        ('[corpus]\ntokenizer = "char"', "corpus.tokenizer must be bpe or word, got 'char'"),
        (
            '[corpus]\ntrain = "a.txt"',
            r"corpus.train must be a list such as train = \['my.txt'\], got 'a.txt'",
        ),
        ("[corpus]\nvalid = [1]", r"corpus.valid must be a list such as valid = \['my.txt'\], got \(1,\)"),
        ("[corpus]\nvocab_size = 10", "corpus.vocab_size must be a whole number of at least 257"),
        ("[training]\nlearning_rate = 0.0", "training.learning_rate must be a number above 0"),
        ('[training]\nclip = "much"', r"training.clip must be a number in \[0, inf\), got 'much'"),
        (
            "[training]\nsampled_words = -1",
            "training.sampled_words must be a whole number of at least 0, got -1",
        ),
        ("[training]\nexact_part = 1.5", r"training.exact_part must be a number in \[0, 1.0\), got 1.5"),
        ('[training]\noptimizer = "sgd"', "training.optimizer must be adamw, adam or muon"),
        ("[training]\nseed = 4294967296", "training.seed must be less than 2"),
        ("[corpus]\nvocab_size = 70000", "corpus.vocab_size must be at most 65536 for bpe, got 70000"),
        ("preset = [1]", r"preset must be one of paper, edge-nano, .*, got \[1\]"),
        ('[training]\nschedule = "step"', "training.schedule must be cosine or constant"),
        ("[model]\nlayer = 'fnet'\n[loss]\nprior = 1.0", "a model of layer 'fnet' has no dictionary"),
        ("[training]\ncarry_state = 1", "training.carry_state must be true or false"),
        (
            "[training]\nbatch_size = true",
            "training.batch_size must be a whole number of at least 1, got True",
        ),
    ],
)
def test_each_mistake_is_named(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"none.toml: no such config file; check the path given to --config, or name a recipe",
    ):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".toml") for path in RECIPES.iterdir()))
def test_a_recipe_is_taken_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_config(Path(name), training={"seed": 5})
    assert recipe.training.seed == 5
    assert recipe != load_config(preset=recipe.preset, training={"seed": 5})


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wikitext-2").write_text('preset = "edge-nano"')
    assert load_config(Path("wikitext-2")) == load_config(preset="edge-nano")


def test_a_folder_of_a_recipes_name_is_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_config(Path("wikitext-2"))
    Path("wikitext-2").mkdir()  # as the text of that recipe lies in one
    assert load_config(Path("wikitext-2")) == recipe


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.toml").write_text('preset = "edge-nano"', encoding="utf-8-sig")
    assert load_config(tmp_path / "c.toml").preset == "edge-nano"


def test_the_size_of_the_vocabulary_is_the_corpus_s(tmp_path):
    (tmp_path / "c.toml").write_text("[model]\nvocab_size = 300")
    with pytest.raises(
        ConfigError, match=r"model.vocab_size is as large as .* got 300; set corpus.vocab_size"
    ):
        load_config(tmp_path / "c.toml")


def test_the_example_of_the_guide_is_valid(tmp_path):
    guide = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    path = tmp_path / "guide.toml"
    path.write_text(guide.split("```toml\n")[1].split("```")[0])
    config = load_config(path)
    assert (config.model.copy_window, config.corpus.train) == (64, ("book.txt", "notes/"))
