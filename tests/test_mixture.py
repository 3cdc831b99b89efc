import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from sdgm_edge.runtime.errors import BundleError, ParameterError
from sdgm_edge.runtime.mixture import Mixture
from sklearn.mixture import GaussianMixture

G, M = 3, 5
WEIGHTS = [0.2, 0.5, 0.3]
NEGLIGIBLE = 1e-9
TOLERANCE = 1e-9  # float64 on both sides; the terms that cancel are some hundreds of times the result


def parameters(seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return WEIGHTS, rng.standard_normal((G, M)) * spread, rng.uniform(0.3, 2, (G, M))


def by_sklearn(weights, means, variances):
    judge = GaussianMixture(G, covariance_type="diag")
    judge.weights_, judge.means_, judge.covariances_ = np.array(weights), means, variances
    judge.precisions_cholesky_ = 1 / np.sqrt(variances)
    return judge


@pytest.fixture
def mixture():
    return Mixture(*parameters())


@given(st.integers(0, 10_000), st.integers(1, 40), st.floats(0.1, 30))
def test_density_and_responsibilities_are_those_of_sklearn(seed, length, scale):
    ours, judge = Mixture(*parameters(seed, scale)), by_sklearn(*parameters(seed, scale))
    c_TM = np.random.default_rng(seed + 1).standard_normal((length, M)) * scale
    np.testing.assert_allclose(
        ours.log_density(c_TM), judge.score_samples(c_TM), rtol=TOLERANCE, atol=TOLERANCE
    )
    np.testing.assert_allclose(ours.responsibilities(c_TM), judge.predict_proba(c_TM), atol=TOLERANCE)


def test_the_comparison_with_sklearn_can_fail(mixture):
    weights, means, variances = parameters()
    c_TM = np.zeros((1, M))
    means[0, 0] += 1e-3
    assert abs(by_sklearn(weights, means, variances).score_samples(c_TM) - mixture.log_density(c_TM)) > 1e-6


def test_vectors_far_from_everything(mixture):
    c_TM = np.full((1, M), 1e6)
    assert np.isfinite(mixture.log_density(c_TM)).all()
    assert mixture.responsibilities(c_TM).sum() == pytest.approx(1)


def test_a_component_of_weight_zero_is_never_drawn():
    _, means, variances = parameters()
    mixture = Mixture([0.0, 1.0, 0.0], means, variances)
    assert mixture.responsibilities(means)[:, 1].tolist() == [1, 1, 1]
    assert np.isfinite(mixture.log_density(means)).all()


# Drawing: the components lie so far apart that each draw tells which one it is from


def components_of(draws, means):
    return np.argmin(((np.array(draws)[:, None] - means) ** 2).sum(-1), axis=1)


def drawn(count=4000, c=None, **how):
    means = np.eye(G, M) * 1000
    mixture, rng = Mixture(WEIGHTS, means, np.full((G, M), 1e4)), np.random.default_rng(3)
    c = means.mean(axis=0) + 9 * np.array([1, 0, -1, 0, 0]) if c is None else c
    counts = np.bincount(
        components_of([mixture.draw(c, rng, **how) for _ in range(count)], means), minlength=G
    )
    return counts, mixture.responsibilities(c[None])[0]


def test_posterior_draws_follow_the_responsibilities():
    counts, responsibilities = drawn(mode="posterior")
    assert responsibilities.min() > 0.05
    assert chisquare(counts, responsibilities * counts.sum()).pvalue > NEGLIGIBLE
    assert chisquare(counts, np.roll(responsibilities, 1) * counts.sum()).pvalue < NEGLIGIBLE


def test_prior_draws_follow_the_weights_whatever_the_context():
    for c in (None, np.eye(G, M)[2] * 1000):
        counts, _ = drawn(c=c, mode="prior")
        assert chisquare(counts, np.array(WEIGHTS) * counts.sum()).pvalue > NEGLIGIBLE


def test_steering_by_factors():
    counts, responsibilities = drawn(steer={0: 3.0, 2: 0.0})
    expected = responsibilities * [3, 1, 0]
    assert counts[2] == 0
    assert chisquare(counts[:2], (expected / expected.sum() * counts.sum())[:2]).pvalue > NEGLIGIBLE


def test_steering_pins_a_component():
    assert drawn(50, steer=1)[0].tolist() == [0, 50, 0]
    assert drawn(50, steer=np.int64(2), mode="prior")[0].tolist() == [0, 0, 50]


def test_components_that_are_never_drawn_are_no_way_out_of_steering():
    with pytest.raises(ParameterError, match="expected a component that can be drawn"):
        Mixture([1.0, 0.0], np.zeros((2, M)), np.ones((2, M))).check_steer({0: 0.0})


def test_steering_away_from_the_only_likely_component_finds_the_next():
    counts, _ = drawn(50, c=np.eye(G, M)[0] * 1000, steer={0: 0.0})
    assert counts[0] == 0
    assert counts.sum() == 50


def test_draws_are_normal_around_their_mean():
    _, means, variances = parameters()
    mixture, rng = Mixture(*parameters()), np.random.default_rng(9)
    draws = np.array([mixture.draw(means[1], rng, steer=1) for _ in range(3000)])
    assert draws.dtype == np.float32
    standard = (draws - means[1]) / np.sqrt(variances[1])
    assert min(kstest(column, "norm").pvalue for column in standard.T) > NEGLIGIBLE


def test_the_same_seed_draws_the_same(mixture):
    one, same = (mixture.draw(np.zeros(M), np.random.default_rng(4)) for _ in range(2))
    np.testing.assert_array_equal(one, same)


# The report


def test_report_tells_what_each_component_stands_for():
    rng = np.random.default_rng(2)
    weights, means, variances = parameters(spread=20)
    mixture = Mixture(weights, means, variances)
    places = rng.choice(G, 3000, p=weights)
    c_TM = means[places] + rng.standard_normal((3000, M)) * np.sqrt(variances[places])
    tokens = np.where(
        rng.random(3000) < 0.5, 10 + places, rng.integers(0, 10, 3000)
    )  # half of them tell the component
    tokens[:9] = np.arange(90, 99)  # seen once
    reports = mixture.report(c_TM, tokens)
    assert [r.component for r in reports] == [1, 2, 0]
    for report in reports:
        assert report.weight == WEIGHTS[report.component]
        assert report.share == pytest.approx(np.mean(places == report.component), abs=0.01)
        assert report.tokens[0][0] == 10 + report.component
        assert report.tokens[0][1] == pytest.approx(1 / report.share, rel=0.05)
        assert all(1 < lift < 0.8 / report.share for token, lift in report.tokens if token >= 90)
        assert report.spread == pytest.approx(np.sqrt(variances[report.component].mean()))
        assert len(report.tokens) == 8


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w, m, v: (w[:2], m, v),
            r"expected weights \(G,\), means \(G, M\), variances \(G, M\), got \[\(2,\)",
        ),
        (
            lambda w, m, v: (w, m[:, 1:], v),
            r"expected weights \(G,\), means \(G, M\), variances \(G, M\), got",
        ),
        (
            lambda w, m, v: (w, m[0], v[0]),
            r"expected weights \(G,\), means \(G, M\), variances \(G, M\), got",
        ),
        (lambda w, m, v: (w, m * np.nan, v), "expected finite means, got NaN or infinity"),
        (lambda w, m, v: (w, m, v * np.inf), "expected finite variances, got NaN or infinity"),
        (lambda w, m, v: ([np.nan, 0, 1], m, v), "expected finite weights, got NaN or infinity"),
        (lambda w, m, v: (w, m, v * 0), "expected positive variances, got 0"),
        (
            lambda w, m, v: ([0.2, 0.5, 0.4], m, v),
            "expected weights of at least 0 with the sum 1, got the sum 1.1",
        ),
        (lambda w, m, v: ([1.2, -0.5, 0.3], m, v), "expected weights of at least 0 with the sum 1"),
    ],
)
def test_arrays_that_make_no_mixture(change, message):
    with pytest.raises(
        BundleError, match=f"mixture: {message}.*; gmm.npz is damaged: export the bundle again"
    ):
        Mixture(*change(*parameters()))


def test_vectors_of_another_model(mixture):
    with pytest.raises(
        ParameterError, match=r"mixing vectors: expected shape \(T, 5\), got \(2, 4\); give those of"
    ):
        mixture.log_density(np.zeros((2, 4)))


@pytest.mark.parametrize("steer", [3, -1, {3: 1.0}])
def test_components_that_are_not_there(mixture, steer):
    with pytest.raises(
        ParameterError, match=r"steer: expected a component from 0 to 2, got (3|-1); .*inspect"
    ):
        mixture.draw(np.zeros(M), np.random.default_rng(0), steer=steer)


def test_steering_that_excludes_everything(mixture):
    with pytest.raises(
        ParameterError, match=r"steer: expected a component that can be drawn, got .*a factor above 0"
    ):
        mixture.draw(np.zeros(M), np.random.default_rng(0), steer={0: 0.0, 1: 0.0, 2: 0.0})


def test_an_unknown_mode(mixture):
    with pytest.raises(ParameterError, match="mode: expected 'posterior' or 'prior', got 'x'"):
        mixture.draw(np.zeros(M), np.random.default_rng(0), mode="x")


@pytest.mark.parametrize(("vectors", "tokens"), [(2, 3), (0, 0)])
def test_a_report_needs_a_token_for_each_vector(mixture, vectors, tokens):
    with pytest.raises(
        ParameterError, match=f"tokens: expected one for each of {vectors} mixing vectors, .*{tokens}"
    ):
        mixture.report(np.zeros((vectors, M)), [1] * tokens)
