"""The ledger accounts for the whole time of a run, and counts as lost what is done twice."""

import json
import random

import pytest

from retro_jax.training import goodput
from retro_jax.training.goodput import FILE, KINDS, Ledger, in_words, summarise


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def start(clock, workdir, step, init=3.0, compiling=2.0):
    began = clock.now
    clock.now += 1.0
    ledger = Ledger(workdir, began)
    with ledger.measure("compile"):
        clock.now += compiling
    clock.now += init - 1.0
    ledger.resume(step)
    ledger.enter(step, rest="init")
    return ledger


def work(clock, ledger, step, data=0.25, seconds=1.0, save=0.0):
    with ledger.measure("data"):
        clock.now += data
    clock.now += seconds
    with ledger.measure("save"):
        clock.now += save
    return ledger.enter(step)


def test_every_second_has_a_kind(clock, tmp_path):
    with start(clock, tmp_path, 0) as ledger:
        assert work(clock, ledger, 1, save=0.5) == {"data": 0.25, "step": 1.0, "save": 0.5}
        work(clock, ledger, 2)
    summary = summarise(tmp_path)
    expected = dict.fromkeys(KINDS, 0.0) | {"init": 3.0, "compile": 2.0, "data": 0.5, "step": 2.0, "save": 0.5}
    assert summary == {"steps": 2, "seconds": expected, "total": 8.0, "goodput": 0.25}
    assert in_words(summary) == (
        "goodput 25.0%: 2 steps in 8.0 s (init 3.0, compile 2.0, data 0.5, step 2.0, save 0.5)"
    )


def test_steps_done_again_are_lost_and_the_time_between_is_away(clock, tmp_path):
    with start(clock, tmp_path, 0) as ledger:
        for step in (10, 20, 30):
            work(clock, ledger, step, data=2.0, seconds=8.0)
    clock.now += 100.0
    with start(clock, tmp_path, 15) as ledger:  # half of the second line's steps and all of the third's
        work(clock, ledger, 30, data=3.0, seconds=12.0)
    seconds = summarise(tmp_path)["seconds"]
    assert summarise(tmp_path)["steps"] == 30
    assert seconds["lost"] == pytest.approx(15.0)
    assert seconds["step"] == pytest.approx(24.0) and seconds["data"] == pytest.approx(6.0)
    assert seconds["away"] == pytest.approx(100.0)
    clock.now += 1.0
    with start(clock, tmp_path, 15):
        pass
    assert summarise(tmp_path)["seconds"]["lost"] == pytest.approx(30.0)
    assert summarise(tmp_path)["steps"] == 15


def test_a_start_that_ends_before_it_has_its_state_takes_nothing_away(clock, tmp_path):
    with start(clock, tmp_path, 0) as ledger:
        work(clock, ledger, 10)
    before = summarise(tmp_path)
    clock.now += 5.0
    Ledger(tmp_path, clock.now).close()  # its checkpoint could not be read
    assert summarise(tmp_path) == before
    clock.now += 5.0
    with start(clock, tmp_path, 10):
        pass
    assert summarise(tmp_path)["steps"] == 10 and summarise(tmp_path)["seconds"]["away"] == pytest.approx(10.0)


def test_any_history_of_kills_adds_up(clock, tmp_path):
    rng = random.Random(0)
    begin, saved, done = clock.now, 0, {}
    for _ in range(40):
        ledger = start(clock, tmp_path, saved)
        done = {step: spent for step, spent in done.items() if step <= saved}
        step = saved
        for _ in range(rng.randrange(4)):
            lines = rng.randint(1, 3)
            before = clock.now
            work(clock, ledger, step + lines, seconds=rng.random())
            for number in range(step + 1, step + lines + 1):
                done[number] = (clock.now - before) / lines
            step += lines
            saved = rng.choice([saved, step])
        ledger.close()
        if rng.random() < 0.5:
            with open(tmp_path / FILE, "a") as file:
                file.write('{"time": 12')  # cut by the kill
        clock.now += rng.random()
    ledger = start(clock, tmp_path, saved)
    ledger.close()
    summary = summarise(tmp_path)
    kept = [spent for step, spent in done.items() if step <= saved]
    assert summary["steps"] == saved == len(kept)
    assert summary["seconds"]["step"] + summary["seconds"]["data"] == pytest.approx(sum(kept), abs=1e-3)
    assert summary["total"] == pytest.approx(clock.now - begin, abs=0.05)  # lines keep milliseconds of the date


def test_a_process_that_is_not_the_first_keeps_time_and_writes_nothing(clock, tmp_path):
    ledger = Ledger(tmp_path, clock.now, write=False)
    ledger.resume(0)
    assert work(clock, ledger, 1)["step"] == 1.0
    assert not list(tmp_path.iterdir()) and summarise(tmp_path)["goodput"] == 0.0


def test_lines_are_json_and_few(clock, tmp_path):
    with start(clock, tmp_path, 0) as ledger:
        work(clock, ledger, 100)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["steps"] for line in lines] == [0, 0, 100]
