from dataclasses import replace

import numpy as np
import pytest
import torch
import trained
from sdgm_edge.export.atoms import Reduction, strengths, strongest_first, with_atoms
from sdgm_edge.export.screening import written

from sdgm_edge.export import export_run, pipeline
from sdgm_edge.runtime import Generator, Mixture, UsageError, read_bundle, verify

K = trained.CONFIGS["ringing"]["num_atoms"]


def some_ids(shape=(12, 2), seed=0):
    return torch.randint(trained.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_strength_is_what_an_atom_adds_by_hand():
    model, ids = trained.model(), some_ids()
    mixing, added = [], []
    hooks = [
        block.atoms.synthesis.register_forward_pre_hook(lambda _, inputs: mixing.append(inputs[0]))
        for block in model.blocks
    ]
    found = strengths(model, ids)
    for hook in hooks:
        hook.remove()
    for block, c_TBM in zip(model.blocks, mixing, strict=True):
        weight = block.atoms.synthesis.weight.detach()
        for atom in range(K):
            alone = torch.zeros_like(c_TBM)
            alone[..., [atom, K + atom]] = c_TBM[..., [atom, K + atom]].detach()
            added.append((alone @ weight.T).square().sum(-1).mean().sqrt())
    torch.testing.assert_close(torch.cat(found).float(), torch.stack(added), rtol=1e-4, atol=1e-6)


def test_all_atoms_are_the_same_model():
    model, ids = trained.model(), some_ids((2, 9))
    same = with_atoms(model, [torch.arange(K)] * 2)
    for got, expected in zip(same(ids), model(ids), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_atoms_that_add_nothing_are_found_and_leave_nothing_behind():
    """Silence all but a few atoms of each layer: the model of these few is the same."""
    model = with_atoms(trained.model(), [torch.arange(K)] * 2)
    loud = [torch.tensor([1, 4, 7]), torch.tensor([0, 8, 9])]
    with torch.no_grad():
        for block, atoms in zip(model.blocks, loud, strict=True):
            silent = [k for k in range(K) if k not in atoms]
            block.atoms.synthesis.weight[:, silent + [K + k for k in silent]] = 0
    fewer, ids = strongest_first(replace(trained.run(), model=model), 3).model, some_ids((2, 9))
    torch.testing.assert_close(fewer(ids).logits_BTV, model(ids).logits_BTV, rtol=1e-5, atol=1e-5)
    for block, whole, atoms in zip(fewer.blocks, model.blocks, loud, strict=True):
        assert set(block.atoms.omega.tolist()) == set(whole.atoms.omega[atoms].tolist())


def test_the_strongest_come_first_and_the_model_is_the_same():
    run, ids = trained.run(), some_ids((2, 9))
    ordered = strongest_first(run)
    assert ordered.config == run.config
    expected, got = run.model(ids), ordered.model(ids)
    torch.testing.assert_close(got.logits_BTV, expected.logits_BTV, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got.mixing_BTM, expected.mixing_BTM)
    torch.testing.assert_close(got.mixing_BTM.sort().values, expected.mixing_BTM.sort().values)
    for found in strengths(ordered.model, written(run.model)):
        assert (found.diff() <= 1e-6).all()


def test_fewer_are_the_first_of_all_in_order():
    ordered, fewer = strongest_first(trained.run()), strongest_first(trained.run(), 4)
    first = with_atoms(ordered.model, [torch.arange(4)] * 2).state_dict()
    for name, weight in fewer.model.state_dict().items():
        torch.testing.assert_close(weight, first[name], rtol=0, atol=0)


def test_the_strongest_lose_less_than_the_weakest():
    model, ids = trained.model(), written(trained.model())
    order = [s.argsort() for s in strengths(model, ids)]
    with torch.no_grad():
        expected = model(ids.T).logits_BTV

    @torch.no_grad()
    def lost(kept):
        fewer = with_atoms(model, [atoms.sort().values for atoms in kept])
        return float((fewer(ids.T).logits_BTV - expected).square().mean())

    assert lost([o[-5:] for o in order]) < 0.5 * lost([o[:5] for o in order])


def test_the_mixture_goes_with_the_atoms():
    run = trained.run()
    rng = np.random.default_rng(0)
    run.prior["means"][:] = rng.normal(size=run.prior["means"].shape)
    order = strengths(run.model, written(run.model))[-1].argsort(descending=True)
    for count in (K, 4):
        fewer = strongest_first(run, count)
        assert fewer.config.num_atoms == count
        assert fewer.config.mixing_size == fewer.prior["means"].shape[1] == 2 * count
        halves = torch.cat([order[:count], order[:count] + K]).numpy()
        np.testing.assert_array_equal(fewer.prior["means"], run.prior["means"][:, halves])
        assert Mixture(**fewer.prior).size == 2 * count
    assert strongest_first(trained.run(prior=False), 4).prior is None


@pytest.mark.parametrize("count", [0, K + 1])
def test_a_budget_is_between_one_and_all(count):
    with pytest.raises(UsageError, match=f"atoms: expected 1 to the {K} of each layer, got {count}"):
        strongest_first(trained.run(), count)


def test_clocks_have_no_budget():
    with pytest.raises(UsageError, match="atoms: expected a run of ringing atoms, got the layer 'clock'"):
        strongest_first(trained.run("clock"), 2)


def test_a_bundle_of_few_atoms_is_smaller_and_passes_every_gate(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "load_run", lambda folder: trained.run())
    monkeypatch.setattr(pipeline, "SPEED_SECONDS", 0.001)
    monkeypatch.chdir(tmp_path)
    all_of_them = export_run("runs/tale", "all", (32, 8, 4))
    few = export_run("runs/tale", None, (32, 8, 4), atoms=3)
    assert all_of_them.reduction is None
    assert few.path.name == few.name == "tale-3-atoms"
    assert few.reduction == Reduction(3, K, few.reduction.loss_increase)
    increase = few.reference.bits_per_byte / all_of_them.reference.bits_per_byte - 1
    assert few.reduction.loss_increase == pytest.approx(increase, rel=1e-4)
    assert few.to_dict()["atoms"] == {"kept": 3, "of": K, "loss_increase": few.reduction.loss_increase}
    assert f"strongest 3 of {K} in each layer" in (few.path / "README.md").read_text("utf-8")
    assert verify(few.path, providers="cpu").ok
    bundles = read_bundle(few.path), read_bundle(all_of_them.path)
    for variant in ("fp32", "int8", "q4"):
        sizes = [bundle.manifest.files[bundle.variant(variant).file][1] for bundle in bundles]
        assert sizes[0] < sizes[1]
    assert bundles[0].config.state_size < bundles[1].config.state_size
    assert bundles[0].manifest.model_id != bundles[1].manifest.model_id
    assert [bundle.manifest.atoms.num_atoms for bundle in bundles] == [3, K]
    assert [bundle.manifest.atoms.state for bundle in bundles] == [10, 10]
    # Three atoms are no number of pairs, as codes of int8 are left out; blocks of q4 hold 16, more than all.
    assert [bundle.manifest.atoms.steps for bundle in bundles] == [{"fp32": 1}, {"fp32": 1, "int8": 2}]
    gen = Generator.load(few.path, providers="cpu")
    assert gen.generate("Once", max_new_tokens=4, prior_strength=0.2, seed=1).tokens
