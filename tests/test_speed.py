"""How fast a bundle is: that the right thing is timed, in the right place; never how long it took."""

import os
import subprocess
import sys
import time

import pytest
import tiny

from sdgm_edge.runtime import (
    BundleError,
    Engine,
    Generator,
    ParameterError,
    SpeedTest,
    Spent,
    measure_speed,
    pinned,
    read_bundle,
    spent,
    time_graph,
)
from sdgm_edge.runtime import speed as module

AFFINITY = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no such call here")
QUICK = {"prompt_tokens": 20, "tokens": 5, "depths": (7, 0, 40), "repeats": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("speed") / "tiny", num_parameters=1234)


@pytest.fixture(scope="module")
def measured(bundle):
    told = []
    return measure_speed(bundle, "int8", **QUICK, progress=told.append), told


# The report


def test_every_test_is_there_with_its_repetitions(measured):
    speed, _ = measured
    names = ["pp20", "tg5", "tg5 @ d7", "tg5 @ d40", "encode", "sample", "decode"]
    assert [test.name for test in speed.tests] == names
    assert [test.tokens for test in speed.tests][:4] == [20, 5, 5, 5]
    for test in speed.tests:
        assert len(test.times) == QUICK["repeats"]
        assert test.tokens_per_second > 0
        assert test.tokens_per_cpu_second > 0


def test_it_says_of_what(bundle, measured):
    speed, told = measured
    assert (speed.name, speed.variant, speed.provider, speed.threads) == ("tiny", "int8", "cpu", 1)
    assert (speed.path, speed.num_parameters) == (str(bundle), 1234)
    assert speed.footprint.variant == "int8"
    assert speed.footprint.file == (bundle / "model_int8.onnx").stat().st_size
    assert speed.footprint.state == 4 * tiny.STATE
    assert speed.machine["cores"] == os.cpu_count()
    assert told[0].startswith(f"{bundle}: int8, 1 thread: reading 40 tokens")
    assert any("round 2 of 2" in line for line in told)


def test_the_same_as_plain_values(measured):
    speed, _ = measured
    told = speed.to_dict()
    test = told["tests"][1]
    assert test["name"] == "tg5"
    assert test["tokens_per_second"] == speed.tests[1].tokens_per_second
    assert test["seconds"] == [t.wall for t in speed.tests[1].times]
    assert told["footprint"]["state"] == 4 * tiny.STATE
    assert told["disturbance"] == speed.disturbance


def test_figures_of_a_test():
    times = (Spent(0.5, 0.4), Spent(0.25, 0.2), Spent(0.2, 0.25))
    test = SpeedTest(name="tg10", tokens=10, times=times)
    assert (test.tokens_per_second, test.tokens_per_cpu_second) == (40, 40)
    assert test.spread == (50 - 20) / 2


def test_disturbance_is_what_the_clock_tells_more(measured):
    from dataclasses import replace

    speed, _ = measured
    test = SpeedTest(name="tg10", tokens=10, times=(Spent(0.5, 0.2), Spent(0.25, 0.3)))
    assert replace(speed, tests=(test,)).disturbance == pytest.approx(0.5)
    assert replace(speed, tests=(test,), threads=2).disturbance == 0


# What is timed


@pytest.fixture
def recorded(bundle, monkeypatch):
    """A generator, and what its graph is run on: how many tokens, and how many there are then."""
    runs, last = [], Engine.last

    def record(self, ids, state, blend=None):
        logits_V, state = last(self, ids, state, blend)
        runs.append((len(ids), int(state[0, -1])))
        return logits_V, state

    monkeypatch.setattr(Engine, "last", record)
    return Generator.load(bundle), runs


def test_a_prompt_has_as_many_tokens_as_it_says_with_the_begin_token(recorded):
    generator, runs = recorded
    (_, count, work), *_ = module._model_tests(generator, 20, 5, ())
    work()
    assert (count, runs) == (20, [(16, 16), (4, 20)])


def test_depth_is_fed_in_chunks_beforehand_and_tokens_one_by_one(recorded):
    generator, runs = recorded
    _, near, far = module._model_tests(generator, 20, 5, (100, 0))
    assert runs[0] == (1, 1)
    assert max(length for length, _ in runs[1:-1]) == tiny.CHUNK
    assert len(runs) == 1 + -(-100 // tiny.CHUNK)
    assert runs[-1][1] == 101
    for name, work, depth in (("tg5", near[2], 0), ("tg5 @ d100", far[2], 100)):
        for _ in range(2):  # every repetition begins there again
            runs.clear()
            work()
            assert runs == [(1, 1 + depth + i) for i in range(1, 6)], name


def test_a_graph_without_a_bundle_is_timed_in_the_same_way(bundle, monkeypatch):
    found = read_bundle(bundle)
    engine, runs, last = Engine(found.graph(), found.config, "tiny"), [], Engine.last
    monkeypatch.setattr(
        Engine, "last", lambda self, ids, *rest: (runs.append(len(ids)), last(self, ids, *rest))[1]
    )
    test = time_graph(engine, tokens=6, repeats=3)
    assert (test.name, test.tokens, len(test.times)) == ("tg6", 6, 3)
    assert sum(runs) == 1 + 4 * 6
    assert set(runs) == {1}


def test_text_goes_each_way(bundle):
    works = {name: (count, work) for name, count, work in module._text_tests(Generator.load(bundle), 7)}
    assert list(works) == ["encode", "sample", "decode"]
    assert works["sample"][0] == 7
    assert works["decode"][0] == module.PASSES * module.TEXT_TOKENS
    for _, work in works.values():
        work()


def test_a_call_is_timed_by_both_clocks():
    busy = spent(lambda: sum(i * i for i in range(100_000)))
    idle = spent(lambda: time.sleep(0.05))
    assert busy.wall > 0
    assert busy.cpu > 0
    assert idle.wall >= 0.05 > idle.cpu


# Where it runs


@AFFINITY
def test_it_is_kept_to_as_many_cpus_as_it_has_threads():
    before = os.sched_getaffinity(0)
    with pinned(1) as cpus:
        assert os.sched_getaffinity(0) == set(cpus) == {max(before)}
        started = subprocess.run(
            [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"],
            capture_output=True,
            text=True,
        )
        assert started.stdout.split() == [str(max(before))]
    assert os.sched_getaffinity(0) == before


@AFFINITY
def test_more_threads_than_cpus_are_left_alone():
    before = os.sched_getaffinity(0)
    with pinned(len(before) + 1) as cpus:
        assert cpus == ()
        assert os.sched_getaffinity(0) == before


def test_a_system_that_lets_no_process_choose(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pinned(1) as cpus:
        assert cpus == ()


@AFFINITY
def test_cpus_are_given_back_after_an_error():
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), pinned(1):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


# What goes wrong


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0}, {"threads": 1.0}, {"prompt_tokens": 0}, {"tokens": 0}, {"repeats": 0},
        {"depths": (0, -1)}, {"depths": (1.5,)},
    ],
)  # fmt: skip
def test_parameters_have_a_range(bundle, wrong):
    with pytest.raises(ParameterError, match=f"{next(iter(wrong))}: expected a whole number from [01], got"):
        measure_speed(bundle, **wrong)


def test_unknown_variants_are_named(bundle):
    with pytest.raises(BundleError, match="no such variant: expected fp32 or int8, got 'q4'"):
        measure_speed(bundle, "q4")
