import math

import numpy as np
import pytest
import torch

from sdgm_edge import evaluation
from sdgm_edge.evaluation import mixing_sample, overlapping_nll, reconstruction_cosine, score, total_nll
from sdgm_edge.models import SDGM, ModelConfig, build_model
from sdgm_edge.runtime import TokenizerError
from sdgm_edge.tokenization import BEGIN_ID, train_bpe, train_words

TEXT = "the cat sat on the mat\nthe dog sat on the cat\n" * 30


def make_model(vocab_size, **changes):
    torch.manual_seed(0)
    return SDGM(
        ModelConfig(vocab_size=vocab_size, width=16, num_atoms=8, num_layers=2, window=32, **changes)
    ).eval()


@pytest.mark.parametrize("copy_window", [0, 5])
@pytest.mark.parametrize("count", [2, 255, 256, 257, 258, 600])
def test_every_token_is_scored_once_with_all_that_came_before(count, copy_window):
    model = make_model(40, copy_window=copy_window)
    tokens = np.random.default_rng(count).integers(0, 40, count)
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.from_numpy(tokens)[None, :-1]).logits_BTV[0], -1)
    expected = -log_p[torch.arange(count - 1), torch.from_numpy(tokens[1:])].sum().item()
    assert total_nll(model, tokens) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("layer", "window"), [("clock", 48), ("gpt2", 300)])
@pytest.mark.parametrize("lanes", [1, 2])
def test_how_much_is_read_at_once_does_not_show(layer, window, lanes, monkeypatch):
    torch.manual_seed(0)
    model = build_model(ModelConfig(vocab_size=40, layer=layer, width=16, num_atoms=8, window=window))
    tokens = np.random.default_rng(0).integers(0, 40, 900)
    assert evaluation._window(model, 1) > evaluation.WINDOW
    got = total_nll(model, tokens, lanes)
    monkeypatch.setattr(evaluation, "_window", lambda model, lanes: 7)
    assert total_nll(model, tokens, lanes) == pytest.approx(got, rel=1e-5)


def test_lanes_score_every_token_once_too():
    model = make_model(40)
    for parameter in model.parameters():
        parameter.data.zero_()  # every token now costs ln 40, with or without a context
    for count in (9, 100, 1001):
        tokens = np.arange(count) % 40
        assert total_nll(model, tokens, lanes=8) == pytest.approx((count - 1) * math.log(40), rel=1e-5)


def test_validating_leaves_the_model_as_it_was():
    model = make_model(40).train()
    total_nll(model, np.arange(30))
    assert model.training
    with pytest.raises(RuntimeError, match="index 40 is out of bounds"):
        total_nll(model, np.array([1, 40]))  # the second is no token of it
    assert model.training


def test_score_counts_the_text_as_it_stands():
    tokenizer = train_bpe([TEXT], 270)
    model = make_model(270)
    result = score(model, tokenizer, TEXT)
    ids = tokenizer.encode(TEXT)
    assert (result.num_tokens, result.num_bytes) == (len(ids), len(TEXT))
    assert result.num_words == len(TEXT.split()) + TEXT.count("\n")
    assert result.nll == pytest.approx(total_nll(model, np.array([BEGIN_ID, *ids])), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(result.nll / len(TEXT) / math.log(2))


def test_bits_per_byte_is_refused_where_words_are_unknown():
    tokenizer = train_words([TEXT])
    model = make_model(tokenizer.vocab_size)
    assert score(model, tokenizer, "the cat\n").bits_per_byte > 0
    with pytest.raises(TokenizerError, match="<unk>"):
        _ = score(model, tokenizer, "the zebra\n").bits_per_byte


def test_mixing_sample_is_chosen_by_its_seed():
    model = make_model(40)
    tokens = np.random.default_rng(0).integers(0, 40, 500)
    one, again, other = (mixing_sample(model, tokens, 100, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.shape == (6 * 16, 16)
    assert len(mixing_sample(model, tokens[:10], 100)) == 20 * 5  # a text shorter than a window will do


@torch.no_grad()
def test_cosine_of_the_reconstruction_is_that_of_the_whole_text():
    model = make_model(40)
    tokens = np.random.default_rng(0).integers(0, 40, 500)  # longer than one window
    whole = model.features(torch.from_numpy(tokens)[:, None], model.initial_state())
    cosine = torch.nn.functional.cosine_similarity(whole.rebuilt_TBD, whole.embedded_TBD, -1).mean()
    assert reconstruction_cosine(model, tokens) == pytest.approx(float(cosine), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("copy_window", [0, 3])
@pytest.mark.parametrize("num_tokens", [2, 4, 5, 9, 10, 150])
def test_overlapping_windows_score_every_token_once_with_half_a_window_before_it(num_tokens, copy_window):
    torch.manual_seed(0)
    shape = {"layer": "gpt2", "width": 16, "window": 8, "glu_width": 16, "copy_window": copy_window}
    model = build_model(ModelConfig(vocab_size=40, **shape))
    tokens = np.random.default_rng(0).integers(0, 40, num_tokens)
    expected = 0.0
    for place in range(1, num_tokens):
        start = max(0, (place - 1) // 4 - 1) * 4
        logits = model(torch.from_numpy(tokens[None, start:place])).logits_BTV[0, -1]
        expected -= float(torch.log_softmax(logits, -1)[tokens[place]])
    assert overlapping_nll(model, tokens, lanes=3) == pytest.approx(expected, rel=1e-5)
    assert model.training
