import numpy as np
import pytest
import trained
from sdgm_edge.export.gates import Accuracy
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.search import Found, mixed_precision, sensitivity
from sdgm_edge.export.variants import VARIANTS


def tokens(count=400):
    return np.random.default_rng(0).integers(0, trained.VOCAB, count).tolist()


def loss(increase):
    return Accuracy(1.0, 2.0, 3.0, increase, increase, 0.01, 1, 1, "0" * 64)


@pytest.fixture
def searched():
    model = trained.model()
    weights = weights_of(model)
    return model, weights, VARIANTS[4].plan(weights)


@pytest.mark.parametrize("needed", range(1, 10))
def test_as_few_matrices_are_raised_as_stay_within_the_limit(searched, needed):
    model, weights, plan = searched
    assert len(plan) == 9
    tried = []

    def attempt(chosen):
        raised = [name for name in chosen if chosen[name] == "q8"]
        tried.append(len(raised))
        return Found(chosen, b"", loss(0.0 if len(raised) >= needed else 0.02))

    told = []
    found = mixed_precision(model, weights, plan, tokens(), attempt, told.append)
    assert found.accuracy.within
    assert sum(precision == "q8" for precision in found.plan.values()) == needed
    assert found.plan.keys() == plan.keys()
    assert len(tried) == len(set(tried)) <= 5
    assert any(f"q4: {needed} of 9 matrices at 8 bits lose 0.00%" in message for message in told)


def test_where_8_bits_do_not_help_it_says_so(searched):
    found = mixed_precision(
        *searched, tokens(), lambda plan: Found(plan, b"", loss(0.5)), lambda message: None
    )
    assert not found.accuracy.within


def test_the_matrix_that_suffers_most_comes_first_and_the_model_is_left_as_it_was(searched):
    model, weights, plan = searched
    before = weights_of(model)
    kept = {name: weight.copy() for name, weight in before.items()}
    order = sensitivity(model, weights, plan, tokens(), lambda message: None)
    assert sorted(order) == sorted(plan)
    for name, weight in weights_of(model).items():
        np.testing.assert_array_equal(weight, kept[name])
    # A matrix that rounding leaves alone costs nothing, so it cannot come before one that it destroys.
    exact = dict.fromkeys(plan, "fp32") | {"embedding.weight": "q4"}
    costs = []
    sensitivity(model, weights, exact, tokens(), costs.append)
    assert sum("costs 0.000%" in message for message in costs) == len(plan) - 1
