"""What an export will weigh: against what exports do weigh."""

import numpy as np
import pytest
import tiny
import trained
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.variants import VARIANTS, build, bundle_config

from sdgm_edge.export import screening, sizing
from sdgm_edge.models import PRESETS, ModelConfig
from sdgm_edge.runtime import ConfigError, Engine, read_bundle


@pytest.mark.parametrize("bits", VARIANTS)
@pytest.mark.parametrize("name", trained.CONFIGS)
def test_the_size_of_a_graph_is_that_of_the_trained_one_to_the_byte(name, bits):
    model, variant = trained.model(name), VARIANTS[bits]
    weights = weights_of(model)
    exported = build(model.config, weights, variant.plan(weights))
    size = sizing.graph_size(model.config, variant)
    assert size == (len(exported), len(exported))
    assert len(sizing.untrained_graph(model.config, variant)) == len(exported)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_large_head_is_screened_as_the_exporter_would(monkeypatch, bits):
    monkeypatch.setattr(screening, "LEAST_WEIGHTS", 1)
    model, variant = trained.model(), VARIANTS[bits]
    weights, config = weights_of(model), model.config
    screen = screening.screen_for(model, variant.embedding)
    exported = build(config, weights, variant.plan(weights), screen)
    sizing.graph_size.cache_clear()
    size = sizing.graph_size(config, variant)
    sizing.graph_size.cache_clear()
    assert size.total == len(exported)
    assert size.total - size.read >= config.vocab_size * config.width * bits // 8
    assert len(sizing.untrained_graph(config, variant)) == len(exported)


def test_large_models_are_counted_without_being_made():
    config = ModelConfig(vocab_size=100_000, num_layers=12, width=4096, num_atoms=2048, glu_width=8192)
    total, _ = sizing.graph_size(config, VARIANTS[32])
    assert total > 2**32  # more than protobuf could write


def test_an_untrained_graph_runs_and_says_numbers():
    config, variant = trained.model().config, VARIANTS[8]
    engine = Engine(sizing.untrained_graph(config, variant), bundle_config(config), "untrained")
    logits_V, _ = engine.last([1, 2, 3], engine.zeros())
    assert np.isfinite(logits_V).all()
    assert np.ptp(logits_V) > 0


def test_an_untrained_bundle_is_as_large_as_is_said(tmp_path):
    config, variant = trained.model().config, VARIANTS[4]
    path = sizing.untrained_bundle(tmp_path / "made", config, variant, tiny.tokenizer_json())
    bundle = read_bundle(path)
    files = sizing.small_files(config, tiny.tokenizer_json())
    assert {name: len(data) for name, data in files.items()} | {
        variant.file: sizing.graph_size(config, variant).total
    } == {name: size for name, (_, size) in bundle.manifest.files.items()}
    assert bundle.manifest.num_parameters == trained.model().num_parameters
    assert bundle.mixture.size == config.mixing_size


@pytest.mark.parametrize("vocab_size", [257, 300, 2048, 20_000])
def test_a_stand_in_tokenizer_has_so_many_tokens(tmp_path, vocab_size):
    config = ModelConfig(vocab_size=vocab_size, width=16, num_atoms=4)
    tokenizer_json = sizing.stand_in_tokenizer(vocab_size)
    path = sizing.untrained_bundle(tmp_path / "made", config, VARIANTS[32], tokenizer_json)
    assert read_bundle(path).tokenizer.get_vocab_size() == vocab_size


def test_there_is_no_tokenizer_without_all_bytes():
    with pytest.raises(ConfigError, match="vocab_size: expected 257 to"):
        sizing.stand_in_tokenizer(256)


@pytest.mark.parametrize("name", PRESETS)
def test_weights_have_the_names_and_shapes_of_the_model_and_take_no_memory(name):
    weights = sizing.untrained_weights(PRESETS[name])
    assert weights["embedding.weight"].shape == (4096, PRESETS[name].width)
    assert weights["embedding.weight"].strides[0] == 0
    assert all(np.isfinite(array).all() for array in weights.values())
