import math

import pytest
import torch
from sdgm_edge.models.ring import ring_chunks, ring_naive, ring_steps
from sdgm_edge.models.scan import LOG_DECAY_FLOOR
from tolerances import FORMS, GRADIENT


def problem(steps):
    generator = torch.Generator().manual_seed(steps)
    v = torch.randn(steps, 3, 5, generator=generator)
    f = torch.empty(steps, 3, 5).uniform_(math.exp(LOG_DECAY_FLOOR), 1, generator=generator)
    omega = torch.tensor([0.0, 1e-3, 0.3, 2.0, math.pi])
    z = torch.randn(3, 2, 5, generator=generator)
    return [t.requires_grad_() for t in (v, f, omega, z)]


@pytest.mark.parametrize("form", [ring_steps, ring_chunks])
@pytest.mark.parametrize("steps", [1, 2, 15, 16, 17, 61, 128])
def test_forms_agree_with_the_definition_in_values_and_gradients(form, steps):
    inputs = problem(steps)
    expected, got = ring_naive(*inputs), form(*inputs)
    torch.testing.assert_close(got, expected, atol=FORMS, rtol=FORMS)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    for name, a, e in zip(
        ("v", "f", "omega", "z"),
        torch.autograd.grad((got * weights).sum(), inputs),
        expected_grads,
        strict=True,
    ):
        atol = GRADIENT * max(1.0, e.abs().max().item())
        torch.testing.assert_close(
            a, e, atol=atol, rtol=GRADIENT, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_are_those_of_finite_differences():
    inputs = [t.detach()[..., :2].double().requires_grad_() for t in problem(4)]
    assert torch.autograd.gradcheck(ring_steps, inputs)


def test_an_undamped_atom_that_is_not_struck_turns_by_its_frequency():
    v, f, omega = torch.zeros(7, 1, 1), torch.ones(7, 1, 1), torch.tensor([0.3])
    z = ring_steps(v, f, omega, torch.tensor([[[1.0], [0.0]]]))
    torch.testing.assert_close(z[-1, 0, :, 0], torch.tensor([math.cos(2.1), math.sin(2.1)]))


@pytest.mark.parametrize("reaches", [1.0, 1e-6, 1e-9])
def test_chunks_hold_small_gradients_at_the_strongest_damping(reaches):
    v, _, omega, z = problem(64)
    f = torch.full_like(v, math.exp(LOG_DECAY_FLOOR), requires_grad=True)
    inputs = [v, f, omega, z]
    expected = torch.autograd.grad(ring_naive(*(t.double() for t in inputs)).sum() * reaches, inputs)
    got = torch.autograd.grad(ring_chunks(*inputs).sum() * reaches, inputs)
    for a, e in zip(got, expected, strict=True):
        assert (a - e).norm() < 1e-2 * e.norm()


def test_chunks_hold_large_numbers_at_the_strongest_damping():
    v, f = torch.full((64, 1, 2), 1e6), torch.full((64, 1, 2), math.exp(LOG_DECAY_FLOOR))
    omega, z = torch.tensor([0.0, 2.0]), torch.zeros(1, 2, 2)
    expected = ring_steps(v, f, omega, z)
    torch.testing.assert_close(ring_chunks(v, f, omega, z), expected, atol=1e6 * FORMS, rtol=FORMS)
