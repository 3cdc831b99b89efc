import pytest

from sdgm_edge.models import (
    GPT2_SMALL,
    MIXERS,
    PRESETS,
    build_model,
    count_parameters,
    preset,
    scaled,
    sized,
)


@pytest.mark.parametrize("layer", ["ringing", "clock", *MIXERS])
@pytest.mark.parametrize("budget", [200_000, 4_000_000, 23_000_000])
@pytest.mark.parametrize("copy_window", [0, 64])
def test_a_model_has_the_size_that_is_asked_for(layer, budget, copy_window):
    config = sized(layer, budget, vocab_size=1000, window=64, dropout=0.1, copy_window=copy_window)
    assert count_parameters(config) == pytest.approx(budget, rel=0.05)
    assert (config.layer, config.window, config.dropout) == (layer, 64, 0.1)
    assert config.copy_window == copy_window


def test_what_is_counted_is_what_is_built():
    for layer, copy_window in (("ringing", 0), ("gpt2", 0), ("gpt2", 9), ("fnet", 9)):
        config = sized(layer, 100_000, vocab_size=300, copy_window=copy_window)
        assert count_parameters(config) == build_model(config).num_parameters


def test_gpt2_small_is_that_of_the_original():
    assert count_parameters(GPT2_SMALL) == 124_439_808 + GPT2_SMALL.vocab_size  # and a bias of the logits


def test_the_papers_model_keeps_its_shape():
    config = scaled(preset("paper", vocab_size=10_000), 22_800_000)
    assert count_parameters(config) == pytest.approx(22_800_000, rel=0.05)
    assert config.width == pytest.approx(2 * config.num_atoms, rel=0.01)
    assert not config.residual


def test_the_product_preset_is_the_size_that_it_is_compared_at():
    assert count_parameters(PRESETS["edge-micro"]) == pytest.approx(
        count_parameters(sized("ringing", 4_000_000, vocab_size=4096)), rel=0.05
    )


def test_a_size_that_cannot_be_had_is_told():
    with pytest.raises(
        ValueError, match=r"no lstm model of 2 layers has 100 parameters within 5%: .* vocabul"
    ):
        sized("lstm", 100, vocab_size=300)
