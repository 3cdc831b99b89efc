"""Finding a model for a device: the wishes, the search, the figures; costs are made up but for one test."""

import json
import math
from dataclasses import replace

import pytest
import trained
from sdgm_edge.export.calibration import DEPTH, Calibration, calibrate, line, shape
from sdgm_edge.export.planning import Costs, Wishes, plan_model, plan_toml
from sdgm_edge.export.sizing import GraphSize, graph_size, stand_in_tokenizer
from sdgm_edge.export.variants import VARIANTS

from sdgm_edge.config import load_config
from sdgm_edge.export import calibration, export_run, pipeline, planning
from sdgm_edge.models import PRESETS, count_parameters
from sdgm_edge.runtime import ConfigError, ParameterError, read_bundle

MADE_UP = Calibration(
    seconds=[(0, 100e-6), (10_000_000, 400e-6)],
    screened=[],
    layer_seconds=20e-6,
    memory=[(0, 75e6), (10_000_000, 95e6)],
)
"""A layer takes 20 µs and a megabyte 30 µs; a process of 75 MB takes twice the bytes of its graph more."""
WISHES = Wishes(bundle=2e6, vocab_size=512, bits=(8,))


@pytest.fixture
def made_up(monkeypatch):
    asked = []

    def told(variant, vocab_size, largest, *_):
        asked.append((variant.name, vocab_size, largest))
        return MADE_UP

    monkeypatch.setattr(planning, "calibrate", told)
    monkeypatch.setattr(planning, "DEPTHS", (2, 3, 4))
    return asked


# What is proposed


def test_the_proposed_model_is_the_widest_that_keeps_every_wish(made_up):
    report = plan_model(WISHES)
    assert [(name, vocab_size) for name, vocab_size, _ in made_up] == [("int8", 512)]
    proposed = report.proposed
    assert proposed.misses(WISHES) == []
    assert proposed.bits == 8
    config = proposed.config
    wider = Costs(WISHES).of(shape(config.num_layers, config.width + 32, 512), 8)
    assert [miss[:12] for miss in wider.misses(WISHES)] == ["a bundle of "]
    assert proposed.num_parameters >= planning.NEAR * report.alternatives[0].num_parameters


def test_alternatives_keep_the_wishes_too_and_come_the_largest_first(made_up):
    report = plan_model(replace(WISHES, bits=(8, 4)))
    alternatives = report.alternatives
    assert all(candidate.misses(report.wishes) == [] for candidate in alternatives)
    sizes = [candidate.num_parameters for candidate in alternatives]
    assert sizes == sorted(sizes, reverse=True)
    assert report.proposed not in alternatives
    assert len({c.config.num_layers for c in (*alternatives, report.proposed)}) == len(planning.DEPTHS)
    assert {c.bits for c in alternatives} == {8, 4}
    assert {c.config.vocab_size for c in alternatives} == {512, 1024}
    assert [c.preset for c in alternatives if c.preset] == ["edge-nano"]


def test_speed_and_memory_bind_where_they_are_asked_for(made_up):
    free = plan_model(WISHES).proposed
    quick = plan_model(replace(WISHES, speed=8000)).proposed
    small = plan_model(replace(WISHES, memory=77e6)).proposed
    assert quick.tokens_per_second >= 8000 > free.tokens_per_second
    assert small.peak <= 77e6 < free.peak
    assert max(quick.num_parameters, small.num_parameters) < free.num_parameters


def test_bits_are_taken_in_the_order_that_they_are_given(made_up):
    assert plan_model(replace(WISHES, bits=(4, 8))).proposed.bits == 4
    least = planning.bundle_size(shape(2, 32, 512), 4)
    assert plan_model(replace(WISHES, bits=(32, 4), bundle=least)).proposed.bits == 4


def test_memory_that_is_not_told_keeps_no_limit_and_is_none(monkeypatch):
    monkeypatch.setattr(planning, "calibrate", lambda *_: replace(MADE_UP, memory=None))
    assert plan_model(replace(WISHES, memory=1.0)).proposed.peak is None


def test_parameters_and_bytes_are_those_of_the_model(made_up):
    candidate = plan_model(WISHES).proposed
    assert candidate.num_parameters == count_parameters(candidate.config)
    assert candidate.graph == graph_size(candidate.config, VARIANTS[8]).total
    assert candidate.state == 4 * candidate.config.state_size
    assert candidate.bundle - candidate.graph > len(stand_in_tokenizer(512))


def test_the_report_is_plain_json(made_up):
    report = plan_model(WISHES)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["wishes"] == {"bundle": 2e6, "speed": 0, "memory": None, "vocab_size": 512, "bits": [8]}
    assert told["proposed"]["config"]["width"] == report.proposed.config.width
    assert len(told["alternatives"]) == len(report.alternatives)


def test_a_real_export_has_the_parameters_and_bytes_that_were_told(made_up, monkeypatch, tmp_path):
    run = trained.run()
    monkeypatch.setattr(pipeline, "load_run", lambda folder: run)
    monkeypatch.setattr(pipeline, "SPEED_SECONDS", 0.001)
    export_run("runs/tale", tmp_path / "made", [8], force=True)
    told, manifest = Costs(WISHES).of(run.config, 8), read_bundle(tmp_path / "made").manifest
    assert told.graph == manifest.files["model_int8.onnx"][1]
    assert told.num_parameters == manifest.num_parameters
    # A tokenizer learnt from a text, golden tokens and a card differ a little.
    size = sum(path.stat().st_size for path in (tmp_path / "made").iterdir())
    assert told.bundle == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("name", planning.EDGE)
def test_presets_are_of_the_family(name):
    config = PRESETS[name]
    assert shape(config.num_layers, config.width, config.vocab_size) == config


# The config file


@pytest.mark.parametrize(("depth", "width"), [(3, 128), (5, 96), (8, 640)])
def test_train_reads_the_config(tmp_path, made_up, depth, width):
    candidate = Costs(WISHES).of(shape(depth, width, 512), 8)
    path = tmp_path / "plan.toml"
    path.write_text(plan_toml(candidate))
    run = load_config(path)
    assert run.corpus.vocab_size == 512
    assert replace(run.model, vocab_size=512, dropout=0.0, atom_dropout=0.0) == candidate.config
    assert run.preset == (candidate.preset or run.preset)


def test_a_preset_needs_no_more_than_its_name(made_up):
    candidate = Costs(WISHES).of(replace(PRESETS["edge-nano"], vocab_size=512), 8)
    assert plan_toml(candidate) == 'preset = "edge-nano"\n\n[corpus]\nvocab_size = 512\n'


# Wishes that cannot be kept


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"bundle": 5e4},
            r"2 layers of width 32, 512 tokens, 8 bits\) has a bundle of 0\.1\d MB, where at most 0\.05",
        ),
        ({"bundle": 5e4, "bits": (8, 4)}, "512 tokens, 4 bits"),
        ({"speed": 1e6}, r"has 9,\d{3} tokens/s, where 1,000,000 are asked for; ask for no more than that"),
        ({"memory": 70e6}, r"has 75\.\d MB of memory, where at most 70\.0 MB is asked for"),
        ({"speed": 1e6, "memory": 70e6}, r"tokens/s, where .* and 75\.\d MB of memory"),
    ],
)
def test_an_impossible_wish_names_what_is_nearest(made_up, changes, told):
    with pytest.raises(ParameterError, match=told) as e:
        plan_model(replace(WISHES, **changes))
    assert "\n" not in str(e.value)


def test_what_is_too_large_is_told_before_anything_is_measured(made_up):
    with pytest.raises(ParameterError, match="a bundle of"):
        plan_model(replace(WISHES, bundle=1000.0))
    assert made_up == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"bundle": 0.0}, "bundle: expected a number above 0, got 0"),
        ({"bundle": math.nan}, "bundle: expected a number above 0, got nan"),
        ({"speed": -1.0}, "speed: expected a number from 0, got -1"),
        ({"memory": -5.0}, "memory: expected a number above 0, got -5"),
        ({"bits": ()}, "bits: expected at least one"),
    ],
)
def test_wishes_have_a_range(wrong, told):
    with pytest.raises(ParameterError, match=told):
        Wishes(**wrong)


def test_a_vocabulary_without_all_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocab_size: expected 257 to"):
        plan_model(Wishes(vocab_size=200))


# What is measured


def test_a_line_goes_through_its_points_and_straight_on():
    points = [(1, 10.0), (2, 20.0), (4, 30.0)]
    assert [line(points, x) for x in (1, 2, 3, 4)] == [10, 20, 25, 30]
    assert (line(points, 0), line(points, 6)) == (0, 40)


def test_models_with_a_screened_head_have_a_line_of_their_own():
    measured = replace(MADE_UP, screened=[(1_000_000, 200e-6), (2_000_000, 300e-6)])
    whole, screened = GraphSize(1_000_000, 1_000_000), GraphSize(9_000_000, 1_000_000)
    assert measured.tokens_per_second(DEPTH, screened) == pytest.approx(5000)
    assert measured.tokens_per_second(DEPTH, whole) == pytest.approx(1 / 130e-6)
    assert measured.tokens_per_second(DEPTH + 2, whole) == pytest.approx(1 / 170e-6)
    assert MADE_UP.tokens_per_second(DEPTH, screened) == pytest.approx(1 / 370e-6)


@pytest.mark.parametrize("largest", [64, 128, 160, 192, 512])
def test_both_lines_have_two_points_at_least(largest):
    edge = 128  # 65,536 · 128 weights are the first that are screened
    widths = calibration._widths(65_536, largest, VARIANTS[8])
    assert widths == sorted(set(widths))
    assert sum(width < edge for width in widths) >= 2
    assert sum(width >= edge for width in widths) >= 2 or largest < edge
    assert min(widths) >= 32
    assert not calibration.is_large(shape(DEPTH, 96, 65_536), 8)
    assert calibration.is_large(shape(DEPTH, edge, 65_536), 8)


def test_calibration_measures_models_of_the_kind(monkeypatch):
    monkeypatch.setattr(calibration, "TOKENS", 4)
    told = []
    measured = calibrate(VARIANTS[8], 300, 128, stand_in_tokenizer(300), told.append)
    sizes = [graph_size(shape(DEPTH, width, 300), VARIANTS[8]) for width in (32, 64, 128)]
    assert [x for x, _ in measured.seconds] == [size.total for size in sizes]
    assert measured.screened == []
    values = [y for _, y in measured.seconds]
    assert values[0] > 0
    assert values == sorted(values)
    assert measured.layer_seconds >= 0
    assert measured.tokens_per_second(DEPTH, sizes[0]) == pytest.approx(1 / values[0])
    assert measured.memory is None or [x for x, _ in measured.memory] == [sizes[0].total, sizes[2].total]
    assert told == ["int8: timing untrained models", "int8: starting fresh processes"]
