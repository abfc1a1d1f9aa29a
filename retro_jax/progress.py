"""Progress of anything over a few seconds: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

_silent = False


def silence() -> None:
    """Shows nothing from now on: for all processes of a run but one."""
    global _silent
    _silent = True


class Progress:
    """Counts work done and shows it, with rate and time left.

    with Progress("embedding", total=1000, unit="chunks") as progress:
        progress.update(64)
        progress.note("bpb 2.31")     # short text shown behind the figures
    """

    def __init__(self, description: str, *, total: int, unit: str, initial: int = 0) -> None:
        """Starts the clock.

        Args:
          description: what is being done.
          total: units of work altogether.
          unit: plural noun of what is counted.
          initial: units done before this run (a resumed stage); they do not count towards the rate.
        """
        self._description = description
        self._total = total
        self._unit = unit
        self._initial = initial
        self._done = initial
        self._start = self._last_line = time.monotonic()
        self._note = ""
        self._bar = None
        if sys.stderr.isatty() and not _silent:
            self._bar = tqdm(total=total, initial=initial, desc=description, unit=f" {unit}", unit_scale=total > 99_999)

    def update(self, count: int) -> None:
        """Adds `count` units of work done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def note(self, text: str) -> None:
        """Sets the text shown behind the figures."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print_line()

    def _print_line(self) -> None:
        if _silent:
            return
        self._last_line = time.monotonic()
        seconds = self._last_line - self._start
        rate = (self._done - self._initial) / max(seconds, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        timing = f"{seconds:.1f} s" if self._done >= self._total else f"{left:.0f} s left"
        note = f", {self._note}" if self._note else ""
        print(
            f"{self._description}: {self._done:,}/{self._total:,} {self._unit}, {rate:,.1f}/s, {timing}{note}",
            file=sys.stderr,
            flush=True,
        )
