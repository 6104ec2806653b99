"""Clocks keep time, nothing goes on beyond them, and the slowest rank's counts.

First the clocks of whole runs against another one; then the limits, on a clock that moves only by what work
is said to take.
"""
import functools
import itertools
import json
import math
import re
from time import monotonic, perf_counter, sleep
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import train_gpt as tg
from conftest import QUICK, SHALLOW, tiny_config, tiny_model

PHASE, ELAPSED = tg.Phase, tg.Phase.elapsed  # as they are before a test replaces them
WORK = {"train": (tg.Trainer, "step"), "adapt": (tg, "adapt")}  # what takes the time of a phase
SLEEP = {"train": 0.1, "adapt": 0.03}  # seconds more for every step and round


def replace_perf_counter(monkeypatch, clock):
    """Another clock for the whole script. The class of phases keeps the one that it was made with."""
    def make_phase(name, clock_name, began=None, *rest):
        return PHASE(name, clock_name, clock() if began is None else began, *rest)

    monkeypatch.setattr(tg.time, "perf_counter", clock)
    monkeypatch.setattr(tg, "Phase", make_phase)


# ---- Whole runs --------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """What a run says of its time, and what another clock says."""
    phases: dict[str, float]
    steps: list[dict]  # rows of metrics.jsonl
    seconds: float
    work: dict[str, float]  # seconds of all steps, the warm-up's among them, and of all rounds


def phases_hold_all_time(timed: Timed) -> bool:
    phases = sum(timed.phases.values()) - timed.phases["imports"]  # this process has begun long before
    return abs(timed.seconds - phases) < 0.35


def work_is_in_its_phase(timed: Timed) -> bool:
    phases = timed.phases
    return timed.work["train"] < phases["warm-up"] + phases["train"] and timed.work["adapt"] < phases["adapt"]


def steps_agree_with_their_rows(timed: Timed) -> bool:
    """A row has the time at which its step has ended, and the seconds of the clock at which it began."""
    ended, began = ([row[name] for row in timed.steps] for name in ("time", "seconds"))
    return 0.5 < (began[-1] - began[1]) / (ended[-2] - ended[0]) < 2


@pytest.fixture
def timed_run(run, monkeypatch, tmp_path):
    """timed_run(): a run whose steps and rounds take long. What is planted later is around them."""
    work = dict.fromkeys(WORK, 0.0)

    def slowed(phase, function):
        def slow_function(*args):
            began = monotonic()
            sleep(SLEEP[phase])
            result = function(*args)
            work[phase] += monotonic() - began
            return result

        return slow_function

    for phase, (owner, name) in WORK.items():
        monkeypatch.setattr(owner, name, slowed(phase, getattr(owner, name)))

    def call() -> Timed:
        began = monotonic()
        outcome = run(**QUICK, TRAIN_LOG_EVERY=1)
        seconds = monotonic() - began
        rows = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
        return Timed(outcome.result["phases"], [row for row in rows if row["kind"] == "step"], seconds, work)

    return call


def test_clocks_keep_time(timed_run):
    timed = timed_run()
    assert phases_hold_all_time(timed) and work_is_in_its_phase(timed), timed
    assert steps_agree_with_their_rows(timed), timed


def slow_phase(monkeypatch, phase):
    """The clock of a phase goes at a fifth of its speed."""
    monkeypatch.setattr(PHASE, "elapsed", lambda self: ELAPSED(self) / (5 if self.name == phase else 1))


def slow_machine(monkeypatch, phase):
    """Python's own clock loses four fifths of the time of a phase's work."""
    owner, name = WORK[phase]
    work = getattr(owner, name)
    lost = [0.0]

    def losing_work(*args):
        began = perf_counter()
        result = work(*args)
        lost.append(lost[-1] + 0.8 * (perf_counter() - began))
        return result

    monkeypatch.setattr(owner, name, losing_work)
    replace_perf_counter(monkeypatch, lambda: perf_counter() - lost[-1])


def time_given_away(monkeypatch, phase):
    """Four fifths of the time of a phase are counted as that of a later one, which is on no clock."""
    later = {"train": "export", "adapt": "report"}[phase]
    given = [0.0]

    def elapsed(self):
        seconds = ELAPSED(self)
        if self.name == phase:
            given[0] = 0.8 * seconds
        return seconds + given[0] * ((self.name == later) - (self.name == phase))

    monkeypatch.setattr(PHASE, "elapsed", elapsed)


@pytest.mark.parametrize("phase", ["train", "adapt"])
@pytest.mark.parametrize("cheat", [slow_phase, slow_machine, time_given_away])
def test_a_slow_clock_is_caught(timed_run, monkeypatch, cheat, phase):
    cheat(monkeypatch, phase)
    timed = timed_run()
    assert not work_is_in_its_phase(timed), timed
    assert phases_hold_all_time(timed) == (cheat is time_given_away), "which is why work is looked at"
    assert steps_agree_with_their_rows(timed) == (phase == "adapt"), timed


# ---- Limits, on a clock that is set by hand ----------------------------------------------------------------


class Clock:
    """Stands still but for what is said to take time."""
    now = 0.0

    def timed(self, seconds, function):
        """The same function, which takes so many seconds."""
        def takes_time(*args):
            self.now += seconds
            return function(*args)

        return takes_time


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    replace_perf_counter(monkeypatch, lambda: clock.now)
    return clock


def make_run(cfg, ranks) -> tg.Run:
    """A run whose log keeps its phases and writes nothing."""
    log = object.__new__(tg.RunLog)
    log.ranks, log.phases, log.files = ranks, [], {}
    return tg.Run(cfg, ranks, log, tg.Backend())


def test_adaptation_ends_before_its_clock(clock, monkeypatch):
    """Of 20 s the plain score takes 6 and a round .15: the last one ends past 99 % and within the clock."""
    cfg = tiny_config(**SHALLOW, TTT_BATCH_SIZE=1, EVAL_MAX_SECONDS=20)
    tokens = np.append(np.tile(np.append(1, np.arange(4, 36)), 60), 1)  # 60 documents, of three rounds each
    starts = np.arange(0, len(tokens) - 1, 33)
    val = tg.Validation(tokens, np.ones(len(tokens) - 1), starts, np.full(60, 33), 0)
    monkeypatch.setattr(tg, "evaluate", clock.timed(6, tg.evaluate))
    monkeypatch.setattr(tg, "run_round", clock.timed(0.15, tg.run_round))
    run = make_run(cfg, tg.Ranks())
    scored = tg.score(run, tiny_model(cfg).requires_grad_(False), val)
    assert 0 < scored.unadapted < len(tokens)
    assert 0.99 * 20 <= run.log.spent("scoring") < 20


class Buffers(tg.PackedLoader):
    """As much of a loader as a training loop asks for."""
    buffer_tokens = 128
    buffers_per_step = 8

    def __init__(self, cfg):
        self.cfg = cfg
        self.stages = [tg.Stage(0, 0, self.shape_at(0.0))]

    def buffers(self, indices, device):
        return itertools.repeat(None)


def make_trainer(ranks, step, **settings) -> tg.Trainer:
    """A trainer with a clock of 10 s less a reserve of 3, whose steps are `step`."""
    cfg = tiny_config(**{**SHALLOW, "MAX_WALLCLOCK_SECONDS": 10, "GPTQ_RESERVE_SECONDS": 3, **settings})
    trainer = tg.Trainer(make_run(cfg, ranks), tiny_model(cfg), Buffers(cfg))
    trainer.step = functools.partial(step, trainer.model)
    return trainer


def train(ranks, step, **settings) -> tuple[tg.Trainer, tg.GPT]:
    """Train by such a trainer; also what training returns."""
    trainer = make_trainer(ranks, step, **settings)
    return trainer, trainer.train(None)


def no_step(*args):
    return torch.zeros(())


@pytest.mark.parametrize("seconds", [0.03, 0.4, 1.1])
def test_training_takes_the_steps_that_fit_and_no_more(clock, seconds):
    trainer, _ = train(tg.Ranks(), clock.timed(seconds, no_step), ITERATIONS=1000)
    assert trainer.log.spent("training") == pytest.approx(trainer.steps * seconds)
    assert 7 - seconds < trainer.log.spent("training") <= 7


class SlowerRank(tg.Ranks):
    """A rank beside one by whose clock everything takes twice as long."""

    def all_reduce_max(self, value):
        return 2 * value


@pytest.mark.parametrize("ranks, seconds", [(tg.Ranks(), 1 / 16), (SlowerRank(), 1 / 32)])
def test_spans_grow_with_the_clock_of_the_slowest_rank(clock, ranks, seconds):
    """At .1 and .7 of its 112 steps, and two steps on, as a thread packs that many ahead."""
    trainer, _ = train(ranks, clock.timed(seconds, no_step), ITERATIONS=1000)
    assert trainer.steps == 112 and trainer.tokens == 112 * 1024
    later = [math.ceil(part * 112) + 2 for part in (0.1, 0.7)]
    assert trainer.loader.stages == [
        tg.Stage(first, first * 1024, tg.BufferShape(128, longest))
        for first, longest in zip((0, *later), (21, 42, 64))]


def test_steps_have_half_their_tokens_at_first(clock, monkeypatch):
    """Up to .2 of the clock and for two steps more, with lower rates. Tokens count, for momentum too."""
    lines, rows, momentum_steps = [], [], []
    monkeypatch.setattr(tg, "muon_momentum", lambda step, *others: momentum_steps.append(step))
    monkeypatch.setattr(tg.RunLog, "__call__", lambda log, message: lines.append(message))
    monkeypatch.setattr(tg.RunLog, "metrics", lambda log, kind, **row: rows.extend([row] * (kind == "step")))
    trainer, _ = train(tg.Ranks(), clock.timed(1 / 16, no_step), ITERATIONS=1000, SMALL_BATCH_FRAC=0.2,
                       WARMDOWN_FRAC=0.5, TRAIN_LOG_EVERY=50)
    change = math.ceil(0.2 * 112) + 2
    assert [(row["tokens"], row["lr"]) for row in rows[:56]] == [
        (512, 0.75)] * change + [(1024, 1.0)] * (56 - change)
    shapes = [(stage.shape.tokens, stage.shape.max_len) for stage in trainer.loader.stages]
    assert shapes == [(64, 21), (64, 42), (128, 42), (128, 64)]
    assert trainer.loader.stages[2].start == 512 * change
    assert trainer.tokens == sum(row["tokens"] for row in rows) == 512 * change + 1024 * (112 - change)
    assert momentum_steps == [step / 2 if step < change else step - change / 2 for step in range(112)]
    speeds = re.findall(r"tok/s:(\d+) ", "\n".join(lines))
    assert speeds[:3] == [str(16 * 512)] * 3 and speeds[4:] == [str(16 * 1024)] * 2


@pytest.mark.parametrize("settings", [
    dict(SMALL_BATCH_FRAC=0.2), dict(SMALL_BATCH_FRAC=0.35), dict(SMALL_BATCH_FRAC=0.7, ENABLE_LOOPING_AT=0),
    dict(SMALL_BATCH_FRAC=1, ENABLE_LOOPING_AT=1)])
def test_no_step_has_a_form_that_warm_up_has_not_run(clock, settings):
    seen = set()

    def step(model, batches, plan, *rates):
        seen.add((trainer.loader.stage_of(trainer.steps).shape, plan))
        return torch.zeros(())

    trainer = make_trainer(tg.Ranks(), clock.timed(1 / 16, step), ITERATIONS=1000, **QUICK, **settings)
    trainer.train(None)
    assert seen == trainer.forms()


class BusyGPU(tg.Ranks):
    """A rank of a GPU that computes, for .03 s each, the steps that it is sent."""

    def __init__(self, clock):
        super().__init__()
        self.on_gpu = True
        self.clock = clock
        self.free_at = 0.0
        self.most_ahead = 0.0  # seconds of work that it has been sent

    def step(self, *args):
        self.free_at = max(self.free_at, self.clock.now) + 0.03
        self.most_ahead = max(self.most_ahead, self.free_at - self.clock.now)
        return torch.zeros(())

    def all_reduce_(self, tensor):
        self.synchronize()  # as whoever reads the sum does
        return tensor

    def wait_until(self, time):
        self.clock.now = max(self.clock.now, time)

    def synchronize(self):
        self.wait_until(self.free_at)

    def record_event(self):
        return SimpleNamespace(synchronize=functools.partial(self.wait_until, self.free_at))


def test_steps_that_a_gpu_has_still_to_compute_fit_as_well(clock, monkeypatch):
    """The host runs ahead of a GPU: what it has sent is on the clock, too."""
    ranks = BusyGPU(clock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: ranks)
    trainer, _ = train(ranks, ranks.step, ITERATIONS=1000)
    assert trainer.log.spent("training") == pytest.approx(trainer.steps * 0.03)
    assert 7 - 2 * 0.03 < trainer.log.spent("training") <= 7


@pytest.mark.parametrize("steps, seconds", [(205, 0), (201, 0), (1000, 10)])  # 1000 do not fit into 10 s
def test_reported_times_include_the_reported_step(clock, monkeypatch, steps, seconds):
    ranks = BusyGPU(clock)
    lines, rows = [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: ranks)
    monkeypatch.setattr(tg.RunLog, "__call__", lambda log, message: lines.append(message))
    monkeypatch.setattr(tg.RunLog, "metrics", lambda log, kind, **row: rows.extend([row] * (kind == "step")))
    trainer, _ = train(ranks, ranks.step, ITERATIONS=steps, MAX_WALLCLOCK_SECONDS=seconds, TRAIN_LOG_EVERY=50)
    reports = re.findall(r"step:(\d+)/.* train_time:(\d+)ms .* tok/s:(\d+) ", "\n".join(lines))
    assert [int(step) for step, _, _ in reports] == [1, 2, 3, 50, 100, 150, 200, trainer.steps]
    for step, milliseconds, speed in reports:
        assert int(milliseconds) == 30 * int(step)
        assert int(speed) == pytest.approx(trainer.cfg.train_batch_tokens / 0.03, rel=1e-3)
    assert [row["step"] for row in rows] == [*range(1, trainer.steps + 1)]
    starts = np.diff([row["seconds"] for row in rows])
    assert starts[2:] == pytest.approx(0.03), "reports leave no mark on when steps are launched"


def test_the_host_is_two_steps_ahead_of_a_gpu(clock, monkeypatch):
    ranks = BusyGPU(clock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: ranks)
    trainer, _ = train(ranks, ranks.step, ITERATIONS=1000, TRAIN_LOG_EVERY=50)
    assert ranks.most_ahead == pytest.approx(2 * 0.03)


def test_the_slowest_rank_ends_training(clock):
    """It is that one's seconds that have to fit."""
    trainer, _ = train(SlowerRank(), clock.timed(0.1, no_step), ITERATIONS=1000)
    assert 7 - 0.2 < trainer.log.spent("training") <= 7
    assert trainer.log.spent("training") == pytest.approx(2 * 0.1 * trainer.steps)


def test_training_returns_the_average_of_its_weights():
    """Steps that add 1 to every weight: the average is some way behind the last of them."""
    @torch.no_grad()
    def step(model, *args):
        for weight in model.parameters():
            weight.add_(1)
        return torch.zeros(())

    trainer, averaged = train(tg.Ranks(), step, ITERATIONS=5)
    average = 0
    for n in range(5):
        average += (n + 1 - average) * 17 / (n + 18)
    assert average < 4.9
    for weight, returned in zip(trainer.model.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(weight - returned, torch.full_like(weight, 5 - average), rtol=0, atol=1e-4)
