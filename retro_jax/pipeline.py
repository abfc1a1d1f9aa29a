"""A pipeline of the project's own programs, each a process, as `make demo` and `make results` run them."""

import json
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retro_jax import machine
from retro_jax.errors import UserError
from retro_jax.files import file_sha256, write_json
from retro_jax.parallel.topology import WITHOUT_TPU

STAGES = "stages.json"
_SECONDS_BETWEEN_NOTES = 10.0
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scann",
    "tensorflow",
    "apache-beam",
    "sentencepiece",
)


class Pipeline:
    """Runs programs one by one and remembers how each was run and how long it took until it was finished.

    A pipeline that was interrupted is started again as a whole: its programs go on where they stopped. The time of a
    program that is running is noted every few seconds, so that a kill loses no more than that of it.
    """

    def __init__(self, work: Path, root: Path, command: str, environment: Mapping[str, str]) -> None:
        """Prepares a pipeline.

        Args:
          work: its directory; `stages.json` in it holds commands and times, `compiled` what JAX has compiled.
          root: the directory that names of programs and recipes are relative to.
          command: what a person starts it with, for messages.
          environment: of this process.
        """
        self._path = work / STAGES
        self._root = root
        self._command = command
        # Several steps run the same model: what one has compiled, the next one finds.
        self._environment = {"JAX_COMPILATION_CACHE_DIR": str((work / "compiled").absolute()), **environment}
        if not (list(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists()):  # as TPUs show themselves
            self._environment = {**WITHOUT_TPU, **self._environment}
        self._made_by = {"commit": machine.commit(root) or "unknown", "machine": machine.description()}
        records = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else []
        self._records: dict[str, dict[str, Any]] = {record["stage"]: record for record in records}
        self._started: dict[str, dict[str, Any]] = {}

    @property
    def stages(self) -> list[tuple[str, float]]:
        """Each step that was run and its seconds until it was finished, those of earlier starts too, in order."""
        return [(name, record["seconds"]) for name, record in self._started.items()]

    def run(self, name: str, script: str, **options: object) -> None:
        """Runs a program with flags; its failure ends the pipeline with its own message.

        Ctrl-C and SIGTERM are passed on as SIGTERM, at which a training run saves its state, and the end of the program
        is waited for; a second one kills it.

        Raises:
          UserError: it failed.
          SystemExit: it was stopped by a signal to this process.
        """
        arguments = [self._flag(key, value) for key, value in options.items()]
        shown = f"python {script} {shlex.join(arguments)}".replace(f"{self._root}/", "")
        print(f"\n[{name}]\n$ {shown}", flush=True)
        record = self._records.setdefault(name, {"stage": name, "seconds": 0.0, "finished": False})
        record["command"] = shown
        self._started[name] = record
        earlier, begun = record["seconds"], time.monotonic()

        def note(finished: bool = False) -> None:
            if not record["finished"]:
                seconds = earlier + time.monotonic() - begun
                record.update(self._made_by, seconds=seconds, finished=finished)
                write_json(self._path, list(self._records.values()))

        command = [sys.executable, str(self._root / script), *arguments]
        status, stopped_by = _attend(command, self._environment, note)
        note(finished=status == 0)
        if stopped_by:
            print(f"stopped at {name!r}; `{self._command}` goes on from there", file=sys.stderr)
            sys.exit(128 + stopped_by)
        if status:
            raise UserError(f"it stopped at {name!r} (exit status {status}); `{self._command}` goes on from there")

    def provenance(self, *, text: Mapping[str, Path], seeds: Mapping[str, int]) -> dict[str, Any]:
        """What somebody needs who wants the same results, JSON-serialisable.

        Args:
          text: name to file, of all text that was used.
          seeds: what is drawn to its seed.

        Returns:
          command, commits, machines, Python and packages; checksums of the text, SHA-256; the seeds; of every stage its
          command and seconds. What ran differs from a commit that is `-dirty`.
        """
        records = list(self._started.values())
        return {
            "command": self._command,
            **{f"{key}s": sorted({record[key] for record in records if key in record}) for key in self._made_by},
            "python": platform.python_version(),
            "packages": machine.versions(_PACKAGES),
            "seeds": dict(seeds),
            "text": {name: file_sha256(path) for name, path in text.items()},
            "stages": [{key: record[key] for key in ("stage", "command", "seconds")} for record in records],
        }

    def _flag(self, key: str, value: object) -> str:
        if isinstance(value, bool):
            return f"--{key}" if value else f"--no{key}"
        if key == "config":
            return f"--config={self._root / str(value)}"
        if isinstance(value, list | tuple | range):
            return f"--{key}={','.join(map(str, value))}"
        return f"--{key}={value}"


def _attend(command: list[str], environment: Mapping[str, str], note: Callable[[], None]) -> tuple[int, int]:
    """Runs a program to its end: (exit status, number of the signal by which this process was told to stop, else 0)."""
    told: list[int] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        process.send_signal(signal.SIGTERM if len(told) == 1 else signal.SIGKILL)

    # The program ignores Ctrl-C, which a terminal sends to both: at the first one it is to save, not to die.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    try:
        process = subprocess.Popen(command, env=environment)
        try:
            before[signal.SIGTERM] = signal.signal(signal.SIGTERM, pass_on)
            if before[signal.SIGINT] is not signal.SIG_IGN:  # as in the background of a shell
                signal.signal(signal.SIGINT, pass_on)
            while True:
                try:
                    status = process.wait(_SECONDS_BETWEEN_NOTES)
                    return status, told[0] if told else 0
                except subprocess.TimeoutExpired:
                    note()
        finally:
            if process.poll() is None:  # the note could not be written: the disk is full
                process.terminate()
                process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
