import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sdgm_edge.runtime.errors import ParameterError, StateError
from sdgm_edge.runtime.sampling import (
    Sampler,
    SamplingParams,
    _draw,
    _draw_of_many,
    _largest,
    _nucleus,
    _passes,
    _Window,
)

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.5], np.float32)
NEGLIGIBLE = (
    1e-9  # p-value: a wrong distribution gives 0, a right one is this unlucky once in a billion seeds
)


def sampler(vocab_size=6, context_ids=(), **params):
    return Sampler(SamplingParams(**params), vocab_size, context_ids)


def tokens(logits, count, context_ids=(), allowed=None, **params):
    one = sampler(len(logits), context_ids, **params)
    return [one.sample(logits, allowed).token for _ in range(count)]


def kept_by_definition(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probability of each token after the filters, from a full sort in float64: the definition."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-weights, kind="stable")
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        mass = weights[order].cumsum()
        order = order[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]
    order = order[weights[order] >= min_p]
    kept = np.zeros_like(weights)
    kept[order] = weights[order] / weights[order].sum()
    return kept


# Parameters


BAD = [
    (
        {"max_new_tokens": 0},
        "max_new_tokens: expected an integer of at least 1, got 0; ask for at least one token",
    ),
    ({"max_new_tokens": 2.5}, "max_new_tokens: expected an integer of at least 1, got 2.5"),
    ({"top_k": True}, "top_k: expected an integer of at least 0, got True; 0 keeps all tokens"),
    (
        {"seed": -1},
        "seed: expected an integer of at least 0 and at most 18446744073709551615, got -1; None draws",
    ),
    (
        {"logprobs": 1001},
        "logprobs: expected an integer of at least 0 and at most 1000, got 1001; None is off",
    ),
    (
        {"repetition_window": 0},
        "repetition_window: expected an integer of at least 1 and at most 1024, got 0",
    ),
    (
        {"temperature": -1},
        "temperature: expected a number from 0 to 100, got -1; 0 is greedy, 1 is the model's own",
    ),
    ({"temperature": math.nan}, "temperature: expected a number from 0 to 100, got nan"),
    ({"temperature": "hot"}, "temperature: expected a number from 0 to 100, got 'hot'"),
    ({"temperature": None}, "temperature: expected a number from 0 to 100, got None"),
    ({"temperature": 10**400}, "temperature: expected a number from 0 to 100, got 1000"),
    ({"seed": 10**5000}, "18446744073709551615, got int that is too long to show"),
    ({"stop": ["x" * 1000, ""]}, "xxx…; give a list"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias: expected an integer of at least 0, got '999"),
    ({"repetition_window": 1025}, "repetition_window: expected an integer of at least 1 and at most 1024"),
    ({"cls": 1}, "unknown sampling parameter: expected one of max_new_tokens, temperature"),
    ({"temperature": 1e-4}, "temperature: expected 0, or at least 0.001, got 0.0001; 0 is greedy"),
    ({"top_p": 1.5}, "top_p: expected a number from 0 to 1, got 1.5; 1 keeps all tokens"),
    ({"top_p": 0}, "top_p: expected a number above 0, got 0.0; use temperature=0 for greedy decoding"),
    ({"min_p": 2}, "min_p: expected a number from 0 to 1, got 2; 0 keeps all tokens"),
    ({"repetition_penalty": 0}, "repetition_penalty: expected a number from 0.1 to 10, got 0; 1 is off"),
    (
        {"no_repeat_ngram_size": 9, "repetition_window": 8},
        "no_repeat_ngram_size: expected at most the repetition_window of 8, got 9; lengthen the window",
    ),
    ({"logit_bias": [1]}, "logit_bias: expected a mapping from ids to numbers, got [1]; give a dict such as"),
    (
        {"logit_bias": {"the": 1}},
        "logit_bias: expected an integer of at least 0, got 'the'; the keys are ids",
    ),
    ({"logit_bias": {3: 101}}, "logit_bias[3]: expected a number from -100 to 100, got 101; choose a value"),
    (
        {"banned_tokens": "the"},
        "banned_tokens: expected a sequence of token ids, got 'the'; give a list such as",
    ),
    (
        {"banned_tokens": [-1]},
        "banned_tokens: expected an integer of at least 0, got -1; give token ids, not text",
    ),
    (
        {"forced_tokens": [1], "banned_tokens": [1]},
        "forced_tokens: expected no banned token, got 1; take it out",
    ),
    (
        {"stop": ["a", ""]},
        "stop: expected texts of at least one character, got ['a', '']; give a list such as",
    ),
    ({"stop": 5}, "stop: expected texts of at least one character, got 5"),
    ({"prior_strength": 1.1}, "prior_strength: expected a number from 0 to 1, got 1.1; 0 is the plain model"),
    (
        {"prior_mode": "none"},
        "prior_mode: expected 'posterior' or 'prior', got 'none'; 'prior' ignores context",
    ),
    (
        {"steer": "x", "prior_strength": 1},
        "steer: expected an integer of at least 0, got 'x'; give one component",
    ),
    ({"steer": {0: -1}, "prior_strength": 1}, "steer[0]: expected a number from 0 to 1e+06, got -1"),
    (
        {"steer": 1},
        "prior_strength: expected a number above 0, without which steer and prior_mode='prior' do",
    ),
    ({"prior_mode": "prior"}, "prior_strength: expected a number above 0"),
    ({"top_kk": 3}, "unknown sampling parameter: expected one of max_new_tokens, temperature"),
    ({"max_tokens": 3}, "got 'max_tokens'; did you mean max_new_tokens?"),
    ({"temp": 1}, "got 'temp'; did you mean temperature?"),
    ({"zzz": 1}, "got 'zzz'; see docs/sampling.md"),
]


@pytest.mark.parametrize(("params", "message"), BAD)
def test_a_parameter_that_cannot_be_is_refused(params, message):
    with pytest.raises(ParameterError) as error:
        SamplingParams.from_dict(params)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_field_is_described():
    import inspect

    from sdgm_edge.runtime import parameters

    source = inspect.getsource(parameters.SamplingParams)
    for name in SamplingParams.__dataclass_fields__:
        after = source.split(f"\n    {name}: ")[1].split("\n")[1]
        assert after.startswith('    """'), name


def test_values_are_normalised():
    params = SamplingParams(stop="\n", banned_tokens=np.array([1, 2]), seed=np.int64(3), temperature=1)
    assert (params.stop, params.banned_tokens, params.seed) == (("\n",), (1, 2), 3)
    assert type(params.seed) is int
    assert type(params.temperature) is float


def test_replace_checks_as_well():
    assert SamplingParams(top_k=5).replace(top_p=0.5) == SamplingParams(top_k=5, top_p=0.5)
    with pytest.raises(ParameterError, match="did you mean top_p"):
        SamplingParams().replace(topp=0.5)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(ParameterError, match=r"sampling parameters: expected a mapping, got \[\]"):
        SamplingParams.from_dict([])


ids = st.integers(0, 40)
params_strategy = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.integers(1, 10**6),
        "temperature": st.just(0) | st.floats(0.001, 100),
        "top_k": st.integers(0, 100),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.1, 10),
        "repetition_window": st.integers(8, 1024),
        "no_repeat_ngram_size": st.integers(0, 8),
        "logit_bias": st.dictionaries(ids, st.floats(-100, 100)),
        "banned_tokens": st.lists(st.integers(0, 20)),
        "forced_tokens": st.lists(st.integers(21, 40)),
        "stop": st.lists(st.text(min_size=1)),
        "seed": st.none() | st.integers(0, 2**64 - 1),
        "logprobs": st.none() | st.integers(0, 1000),
        "prior_strength": st.floats(0.1, 1),
    },
)


@given(params_strategy, st.none() | ids | st.dictionaries(ids, st.floats(0, 10)))
def test_json_round_trip(values, steer):
    if "prior_strength" in values:
        values |= {"steer": steer, "prior_mode": "prior"}
    params = SamplingParams(**values)
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params


# Choosing


def test_greedy_takes_the_likeliest_and_of_equals_the_first():
    assert tokens(LOGITS, 3, temperature=0) == [1, 1, 1]


def test_top_k_of_one_is_greedy_even_with_ties():
    assert set(tokens(LOGITS, 50, top_k=1, seed=1)) == {1}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 2.5, "top_k": 7},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_p": 0.95},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(params):
    logits = np.random.default_rng(5).standard_normal(300).astype(np.float32) * 2
    expected = kept_by_definition(logits, **params)
    counts = np.bincount(tokens(logits, 20_000, seed=11, **params), minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    common = kept & (expected * counts.sum() >= 5)
    observed = [*counts[common], counts[kept & ~common].sum()]
    wanted = [*expected[common] * counts.sum(), expected[kept & ~common].sum() * counts.sum()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted).pvalue > NEGLIGIBLE
    shifted = np.roll(wanted, 1)
    assert (
        chisquare(observed, shifted * sum(observed) / shifted.sum()).pvalue < NEGLIGIBLE
    )  # the test can fail


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([-8.0, -3.0, -1.0, 0.0, 0.5, 2.0, 2.5]), min_size=1, max_size=200),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 12),
    st.sampled_from([0.11, 0.53, 0.93, 1.0]),  # of a half, two equal tokens are one, but for rounding
    st.sampled_from([0.0, 0.019, 0.23, 1.0]),
    st.integers(0, 99),
)
def test_each_draw_is_the_one_that_the_definition_gives(logits, temperature, top_k, top_p, min_p, seed):
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits = np.array(logits, np.float32)
    params = SamplingParams(seed=seed, **filters)
    cumulative = kept_by_definition(logits, **filters).cumsum()
    uniform = params.rng().random()
    token = Sampler(params, len(logits)).sample(logits).token
    assert cumulative[token] >= uniform - 1e-6
    assert uniform + 1e-6 >= (cumulative[token - 1] if token else 0)
    assert np.diff(cumulative, prepend=0)[token] > 0


def test_the_same_seed_gives_the_same_tokens():
    logits = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)

    def text(seed):
        one = sampler(64, seed=seed)
        return [one.sample(row).token for row in logits]

    assert text(4) == text(4)
    assert text(4) != text(5)
    assert text(None) != text(None)


def test_a_seed_means_the_same_tokens_on_every_machine():
    logits = np.arange(16, dtype=np.float32) / 4
    assert tokens(logits, 12, seed=7) == [15, 5, 13, 15, 14, 9, 6, 14, 5, 11, 13, 15]
    assert tokens(logits, 9, seed=7, top_p=0.9, temperature=0.8) == [15, 9, 14, 15, 15, 11, 10, 15, 9]


def test_logits_are_not_changed():
    before = LOGITS.copy()
    tokens(LOGITS, 3, [1, 2], repetition_penalty=2, banned_tokens=[0], logit_bias={1: 5}, seed=1)
    np.testing.assert_array_equal(LOGITS, before)


def test_tokens_of_probability_zero_are_never_drawn():
    logits = np.full(200, -np.inf, np.float32)
    logits[[70, 130]] = [0, 1]
    assert set(tokens(logits, 100, seed=1)) == {70, 130}
    assert set(tokens(logits, 100, seed=1, top_k=9)) == {70, 130}
    assert set(tokens(logits, 100, seed=1, top_p=0.99)) == {70, 130}


def test_logits_further_apart_than_float32_holds():
    logits = np.array([-3e38, 3e38, 0], np.float32)
    for params in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert tokens(logits, 3, seed=1, temperature=0.001, **params) == [1, 1, 1]


# Penalties, bans and constraints


def test_the_penalty_counts_each_distinct_token_once():
    once = sampler(context_ids=[3], repetition_penalty=1.3)._adjust(LOGITS, None).copy()
    often = sampler(context_ids=[3] * 50, repetition_penalty=1.3)._adjust(LOGITS, None).copy()
    np.testing.assert_array_equal(once, often)
    assert once[3] < LOGITS[3]
    np.testing.assert_array_equal(np.delete(once, 3), np.delete(LOGITS, 3))


def test_the_penalty_weakens_likely_and_unlikely_tokens_whatever_the_logits_are_counted_from():
    for shift in (0.0, -50.0, 7.0):
        logits = (LOGITS + shift).astype(np.float32)
        seen = sampler(context_ids=[1, 4], repetition_penalty=1.5)._adjust(logits, None) - shift
        zero = math.log(np.exp(LOGITS).sum() / len(LOGITS))
        expected = [(LOGITS[1] - zero) / 1.5 + zero, (LOGITS[4] - zero) * 1.5 + zero]
        np.testing.assert_allclose(seen[[1, 4]], expected, atol=1e-5)
        assert (seen[[1, 4]] < LOGITS[[1, 4]]).all()


def test_the_penalty_forgets_what_left_its_window():
    one = sampler(context_ids=[1, 2, 3], repetition_penalty=2, repetition_window=2)
    adjusted = one._adjust(LOGITS, None)
    assert adjusted[1] == LOGITS[1]
    assert adjusted[2] < LOGITS[2]


def test_what_was_sampled_is_penalised():
    logits = np.zeros(100, np.float32)
    logits[[8, 9]] = [5, 6]
    assert tokens(logits, 3, temperature=0, repetition_penalty=2) == [9, 8, 9]


@given(
    st.lists(st.integers(0, 3), max_size=9) | st.lists(st.integers(0, 3), min_size=30, max_size=60),
    st.integers(1, 5),
    st.integers(5, 12),
)
def test_ngrams_of_the_window_are_found(history, size, window):
    one = _Window(window, history[:7])
    for token in history[7:]:
        one.push(token)
    recent = history[-window:]
    assert one.ids.tolist() == recent
    start = recent[len(recent) - size + 1 :] if size > 1 else []
    runs = [recent[i : i + size] for i in range(len(recent) - size + 1)]
    assert sorted(one.completing(size)) == sorted(run[-1] for run in runs if run[:-1] == start)


def test_no_ngram_occurs_twice():
    text = tokens(np.zeros(6, np.float32), 30, seed=2, no_repeat_ngram_size=2)
    assert max(Counter(pairwise(text)).values()) == 1


def test_a_word_that_is_completed_is_no_repetition():
    rules = {"no_repeat_ngram_size": 1, "repetition_penalty": 10.0, "temperature": 0}
    assert tokens(LOGITS, 1, context_ids=range(6), allowed=np.array([2, 4]), **rules) == [
        2 if LOGITS[2] >= LOGITS[4] else 4
    ]


def test_bias_and_bans():
    assert tokens(LOGITS, 1, temperature=0, logit_bias={4: 50}) == [4]
    assert 1 not in tokens(LOGITS, 200, seed=1, banned_tokens=[1])
    assert tokens(LOGITS, 1, temperature=0, logit_bias={1: 100}, banned_tokens=[1]) == [3]


def test_forced_tokens_come_first_and_wait_for_a_constraint_to_end():
    one = sampler(forced_tokens=[5, 0], temperature=0)
    chosen = [one.sample(LOGITS, allowed).token for allowed in (np.array([2, 4]), None, None, None)]
    assert chosen == [2, 5, 0, 1]


@pytest.mark.parametrize("allowed", [np.array([2, 4]), np.array([0, 0, 1, 0, 1, 0], bool)])
def test_only_allowed_tokens(allowed):
    assert set(tokens(LOGITS, 200, allowed=allowed, seed=1)) == {2, 4}


@pytest.mark.parametrize(
    ("params", "context", "allowed"),
    [
        ({"banned_tokens": range(6)}, (), None),
        ({"no_repeat_ngram_size": 1}, range(6), None),
        ({"repetition_penalty": 2, "banned_tokens": [2]}, [2], np.array([2])),
        ({}, (), np.array([], int)),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_no_token_left(params, context, allowed, temperature):
    one = sampler(context_ids=list(context), temperature=temperature, **params)
    with pytest.raises(
        ParameterError, match="sampling: expected at least one token to choose from, got 'none'; ban"
    ):
        one.sample(LOGITS, allowed)


@pytest.mark.parametrize("name", ["banned_tokens", "forced_tokens", "logit_bias"])
def test_ids_beyond_the_vocabulary(name):
    value = {6: 1.0} if name == "logit_bias" else [6]
    with pytest.raises(
        ParameterError, match=f"{name}: expected ids below 6, got 6; use this model's tokenizer"
    ):
        sampler(**{name: value})


# Damaged logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"top_k": 3}, {"logprobs": 2}, {"repetition_penalty": 2}]
)
def test_logits_that_are_no_numbers(value, params):
    logits = LOGITS.copy()
    logits[4] = value
    with pytest.raises(
        StateError, match=r"logits: expected finite numbers, got (nan|inf); .* `sdgm-edge verify`"
    ):
        sampler(context_ids=[0], **params).sample(logits)


def test_logits_of_another_shape():
    with pytest.raises(ParameterError, match=r"logits: expected shape \(6,\), got \(5,\); give one position"):
        sampler().sample(LOGITS[:5])


# Log-probabilities


def test_logprobs_are_those_of_the_model_before_anything_is_applied():
    log_softmax = LOGITS - np.log(np.exp(LOGITS).sum())
    one = sampler(temperature=0, logit_bias={4: 50}, top_k=1, logprobs=3)
    sampled = one.sample(LOGITS)
    assert sampled.token == 4
    assert sampled.logprob == pytest.approx(log_softmax[4], abs=1e-5)
    assert [token for token, _ in sampled.top] == [1, 3, 2]
    np.testing.assert_allclose([p for _, p in sampled.top], log_softmax[[1, 3, 2]], atol=1e-5)


def test_logprobs_of_the_token_alone_and_off():
    assert sampler(temperature=0, logprobs=0).sample(LOGITS).top == ()
    assert sampler(temperature=0, logprobs=0).sample(LOGITS).logprob is not None
    assert sampler(temperature=0).sample(LOGITS).logprob is None
    assert len(sampler(logprobs=99).sample(LOGITS).top) == len(LOGITS)


# The two building blocks


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.integers(0, 60))
def test_largest_is_a_stable_sort_cut_short(values, count):
    values = np.array(values, np.float32)
    assert _largest(values, count).tolist() == sorted(np.argsort(-values, kind="stable")[:count])


@pytest.mark.parametrize("count", [1, 40, 256, 257, 9000])
@pytest.mark.parametrize("size", [8191, 8192, 8193, 9500])
@pytest.mark.parametrize("levels", [2, 30, 10**6])
def test_largest_of_many_is_a_stable_sort_cut_short(count, size, levels):
    values = np.random.default_rng(levels).integers(0, levels, size).astype(np.float32)
    assert _largest(values, count).tolist() == sorted(np.argsort(-values, kind="stable")[:count])


def check_draw(weights, uniform, place, tolerance):
    assert weights[place] > 0
    cumulative = weights.cumsum(dtype=np.float64) / weights.sum(dtype=np.float64)
    assert cumulative[place] >= uniform - tolerance
    assert (cumulative[place - 1] if place else 0) <= uniform + tolerance


@given(st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 7.0]), min_size=1, max_size=300), st.floats(0, 1))
def test_draw_never_takes_what_weighs_nothing(weights, uniform):
    weights = np.array(weights)
    weights[len(weights) // 2] = 1
    padded = np.zeros(-(-len(weights) // 64) * 64, np.float32)
    padded[: len(weights)] = weights
    for u in (min(uniform, math.nextafter(1, 0)), 0.0, math.nextafter(1, 0)):
        check_draw(weights, u, _draw(weights, u), 1e-12)
        check_draw(padded, u, _draw_of_many(padded.reshape(-1, 64), u), 1e-6)  # rows are summed in float32


def test_rounding_at_either_end_of_a_cumulative_sum():
    assert _passes(np.array([0.0, 0.0, 1.0]), -1e-17) == 2
    assert _passes(np.array([1.0, 2.0, 2.0]), 2.0) == 1


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.05, 1.5, 6.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_nucleus_of_many_is_the_one_that_sorting_all_gives(top_p, spread, ties):
    logits = spread * np.random.default_rng(3).standard_normal(20_000)
    weights = np.exp(logits - logits.max())
    if ties:
        weights = np.exp2(np.round(np.log2(weights)))
    mass = top_p * weights.sum()
    order = np.argsort(-weights, kind="stable")
    count = int(weights[order].cumsum().searchsorted(mass)) + 1
    found = _nucleus(weights, mass)
    assert np.array_equal(found, np.sort(order[:count]))
    assert len(_nucleus(weights, 2 * weights.sum())) == len(weights)


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.05, 1.5, 2.5, 6.0, 100.0])
def test_top_p_keeps_the_same_whether_it_is_found_among_few_or_among_all(top_p, spread):
    logits = (spread * np.random.default_rng(3).standard_normal(20_000)).astype(np.float32)
    kept, weights = sampler(len(logits), top_p=top_p)._likeliest(logits, int(logits.argmax()))
    expected = kept_by_definition(logits, top_p=top_p)
    assert set(kept) == set(expected.nonzero()[0])
    np.testing.assert_allclose(weights / weights.sum(), expected[kept], rtol=1e-6)
