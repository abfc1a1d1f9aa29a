"""Where the time of a run went, over all its interruptions: `goodput.jsonl` in the workdir.

Kinds of seconds:
    init     until the first step: meeting the other processes, devices, data, restoring; without compiling, and without
             what Python takes to import the program
    compile  of the train step
    data     waiting for batches
    step     the rest of the loop: the training itself, and the copying of batches to the devices
    eval     validation
    save     what the loop waits for checkpoints
    lost     steps that were done after the checkpoint the run resumed from, and done again; taken off data and step
    away     from the last line of one start to the beginning of the next: not running, or killed before the next line

A line is written with every metric line, and says what was spent since the line before it. The sum over all lines is
the whole run, so that nothing has to be worked out again after a kill.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from retro_jax.training.lines import LineWriter, read_lines

FILE = "goodput.jsonl"
KINDS = ("init", "compile", "data", "step", "eval", "save", "lost", "away")
_REDONE = ("data", "step")


class Ledger:
    """Clock of one start of a run; a context manager, or call `close`."""

    def __init__(self, workdir: str | os.PathLike, began: float, *, write: bool = True) -> None:
        """Starts the clock; nothing is written yet.

        Args:
          workdir: of the run.
          began: `time.time()` when this start began.
          write: False keeps the time and writes nothing (a process that is not the first).
        """
        self._path = Path(workdir) / FILE
        self._began = began
        self._step = 0
        self._spent: Counter[str] = Counter()
        self._mark = time.monotonic() - (time.time() - began)
        self._lines = LineWriter(self._path) if write else None

    def resume(self, step: int) -> None:
        """Enters this start, and what the start before it had done for nothing; once the state of `step` is there.

        Args:
          step: of the checkpoint it goes on from, 0 for a fresh run.
        """
        self._step = step
        if self._lines is None:
            return
        earlier = read_lines(self._path)
        lost, steps = _redone(earlier, step)
        if earlier:
            lost["away"] = max(0.0, self._began - earlier[-1]["time"])
        self._append(self._began, step, -steps, lost)

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Counts the time of a block, which has no other such block in it, as `kind`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._spent[kind] += time.monotonic() - start

    def enter(self, step: int, rest: str = "step") -> dict[str, float]:
        """Writes a line: the measured blocks since the last one, and all other time as `rest`.

        Args:
          step: newest finished step.
          rest: kind of the time that no block measured.

        Returns:
          Seconds by kind since the last line.
        """
        now = time.monotonic()
        self._spent[rest] += now - self._mark - self._spent.total()
        seconds, self._spent, self._mark = dict(self._spent), Counter(), now
        self._append(time.time(), step, step - self._step, seconds)
        self._step = step
        return seconds

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, when: float, step: int, steps: int, seconds: dict[str, float]) -> None:
        if self._lines is not None:
            rounded = {kind: round(value, 6) for kind, value in seconds.items() if value}
            self._lines.append({"time": round(when, 3), "step": step, "steps": steps, "seconds": rounded})


def summarise(workdir: str | os.PathLike) -> dict[str, Any]:
    """`steps` that count, `seconds` by kind, their `total`, and `goodput`: the share of it spent on steps that count.

    `total` is the time from the first start to the last line, interruptions included. Zeros when nothing was written.
    """
    lines = read_lines(Path(workdir) / FILE)
    spent: Counter[str] = Counter()
    for line in lines:
        spent.update(line["seconds"])
    seconds = {kind: spent[kind] for kind in KINDS}
    total = sum(seconds.values())
    share = seconds["step"] / total if total else 0.0
    return {"steps": sum(line["steps"] for line in lines), "seconds": seconds, "total": total, "goodput": share}


def in_words(summary: dict[str, Any]) -> str:
    """The summary as one line."""
    parts = [f"{kind} {value:,.1f}" for kind, value in summary["seconds"].items() if value >= 0.05]
    done = f"{summary['steps']:,} steps in {summary['total']:,.1f} s"
    return f"goodput {summary['goodput']:.1%}: {done} ({', '.join(parts)})"


def _redone(lines: list[dict[str, Any]], resumed_step: int) -> tuple[Counter[str], int]:
    """The steps behind `resumed_step` that no earlier start has lost already: seconds by kind to be added, number."""
    standing: list[_Interval] = []
    for line in lines:
        if line["steps"] > 0:
            standing.append(_Interval(line["step"] - line["steps"], line["step"], line["seconds"]))
        elif line["steps"] < 0:
            standing = [part for part in (interval.until(line["step"]) for interval in standing) if part]
    change: Counter[str] = Counter()
    steps = 0
    for interval in standing:
        kept = interval.until(resumed_step)
        steps += interval.last - (kept.last if kept else interval.first)
        for kind in _REDONE:
            seconds = interval.seconds.get(kind, 0.0) - (kept.seconds.get(kind, 0.0) if kept else 0.0)
            change[kind] -= seconds
            change["lost"] += seconds
    return change, steps


class _Interval(NamedTuple):
    """Steps first + 1 to last, and what they took."""

    first: int
    last: int
    seconds: dict[str, float]

    def until(self, step: int) -> "_Interval | None":
        """The part up to `step`, with its share of the seconds; None when there is none."""
        last = min(self.last, step)
        if last <= self.first:
            return None
        share = (last - self.first) / (self.last - self.first)
        return _Interval(self.first, last, {kind: share * value for kind, value in self.seconds.items()})
