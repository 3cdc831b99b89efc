import math

import pytest
import torch
from sdgm_edge.models.scan import LOG_DECAY_FLOOR, scan_chunks, scan_naive, scan_steps
from tolerances import FORMS, GRADIENT


def problem(steps, least_log_f=LOG_DECAY_FLOOR):
    generator = torch.Generator().manual_seed(steps)
    log_f = torch.empty(steps, 3, 1, 5).uniform_(least_log_f, 0, generator=generator)
    b = torch.randn(steps, 3, 2, 5, generator=generator)
    h = torch.randn(3, 2, 5, generator=generator)
    return [t.requires_grad_() for t in (log_f, b, h)]


@pytest.mark.parametrize("steps", [1, 2, 15, 16, 17, 61, 128])
@pytest.mark.parametrize("form", ["steps", "chunks"])
def test_forms_agree_with_the_naive_one_in_values_and_gradients(form, steps):
    log_f, b, h = problem(steps)
    expected = scan_naive(torch.exp(log_f), b, h)
    got = scan_steps(torch.exp(log_f), b, h) if form == "steps" else scan_chunks(log_f, b, h)
    torch.testing.assert_close(got, expected, atol=FORMS, rtol=FORMS)
    weights = torch.randn_like(expected)
    for name, a, e in zip(
        ("log f", "b", "h"),
        torch.autograd.grad((got * weights).sum(), (log_f, b, h)),
        torch.autograd.grad((expected * weights).sum(), (log_f, b, h)),
        strict=True,
    ):
        torch.testing.assert_close(
            a, e, atol=GRADIENT, rtol=GRADIENT, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_chunks_stay_finite_at_the_strongest_damping_and_not_below_it():
    log_f, b, h = problem(64)
    strongest = torch.full_like(log_f, LOG_DECAY_FLOOR)
    torch.testing.assert_close(
        scan_chunks(strongest, b, h), scan_naive(torch.exp(strongest), b, h), atol=FORMS, rtol=FORMS
    )
    assert not scan_chunks(strongest * 3, b, h).isfinite().all()  # why the floor is part of the model


def test_a_constant_gate_gives_the_geometric_sum():
    f, steps = 0.5, 20
    h = scan_steps(torch.full((steps, 1, 1, 1), f), torch.ones(steps, 1, 2, 1), torch.zeros(1, 2, 1))
    assert math.isclose(h[-1, 0, 0, 0].item(), (1 - f**steps) / (1 - f), rel_tol=1e-6)
