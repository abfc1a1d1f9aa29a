"""The units of a stage, worked off by an Apache Beam pipeline: file names flow through Beam, records do not.

A unit reads its part of the input and writes shards of the stage; both lie on a file system that every worker sees.
The pipeline is Create (a line of JSON for each unit) | Reshuffle | ParDo. The process with the stage's lock, here the
coordinator, leaves finished units out, shows progress, and finds on disk what the workers finished. While it runs, a
file in the directory names the run: a worker whose run is over commits nothing, and a worker that fails leaves the
reason in it, so that the coordinator can say it in one line whatever the runner does with exceptions. The file has its
bytes from the start, since a full disk must be told too.

The default runner is Beam's `FnApiRunner`, in this process or with several worker processes (`worker_processes.py`).
Other runners take Beam's own options. Beam's `DirectRunner` is refused: it downloads a program before it starts.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retro_jax.data.stage import ShardWriter, Stage, is_finished
from retro_jax.errors import UserError
from retro_jax.files import TEMPORARY
from retro_jax.progress import Progress

LOCAL = "local"
_DOWNLOADING = ("direct", "switchingdirect", "bundlebaseddirect", "prism")
_RUN_BYTES = 2**15
_LONGEST_TEXT = 2000  # characters; of at most 12 bytes in JSON
_LONGEST_REASON = 300
_SECONDS_BETWEEN_LOOKS = 0.5

Work = Callable[[ShardWriter, dict[str, Any]], None]

_advances: dict[str, Callable[[int], None]] = {}  # name of a run to the progress bar it has in this process


class WorkersError(UserError):
    """The workers are to blame, not the input: the same command may succeed when it is run again."""


@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """Where the units are worked off.

    Attributes:
      runner: "local", or the name of a Beam runner (PortableRunner, FlinkRunner, SparkRunner, DataflowRunner).
      workers: processes of the local runner; 1 is this process. Other runners have options of their own for it.
      beam: Beam's own options, such as "--job_endpoint=localhost:8099".
    """

    runner: str = LOCAL
    workers: int = 1
    beam: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers must be at least 1, is {self.workers}")
        if self.workers > 1 and self.runner != LOCAL:
            raise UserError(f"workers is of the local runner; {self.runner} takes the number among Beam's own options")
        # Beam takes its names in any case, without "Runner", and as module.Class.
        if self.runner.lower().rpartition(".")[2].removesuffix("runner") in _DOWNLOADING:
            raise UserError(f"{self.runner} is not supported (it may download a program); use --runner={LOCAL}")


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a stage that one worker does at once.

    Attributes:
      shards: the files of the stage that it writes, all of them, in the order they are finished.
      arguments: of the work; JSON-serialisable.
      size: how much it adds to the progress bar.
      folder: the one that it writes, at once (`ShardWriter.folder`): then `shards` are some of those in it.
    """

    shards: tuple[str, ...]
    arguments: dict[str, Any]
    size: int = 1
    folder: str | None = None


def distribute(stage: Stage, units: Sequence[Unit], work: Work, options: BeamOptions, *, label: str, unit: str) -> None:
    """Runs `work(writer, arguments)` for every unit that is not finished; returns when all of them are.

    A single unit is worked off without a pipeline when the runner is the local one: Beam takes a second or more to
    import. A unit of which only some shards are there is done again from its beginning.

    Args:
      stage: open, not complete.
      units: whose shards are distinct.
      work: a function at the top level of a module that every worker can import. It writes each shard of the unit
        with `writer.shard(name)` and may tell `writer.advance(amount)` of parts of the unit's size while it works. It
        may run twice for a unit, also at the same time, when a worker seems lost: files that differ between two runs
        and belong together go into a folder (`writer.folder`).
      options: where.
      label: what is being done, for the progress bar.
      unit: what the sizes count, a plural noun.

    Raises:
      UserError: what a worker raised. What other units have finished stays.
      WorkersError: a worker process was lost, the runner failed, or shards that were written do not appear here.
      OSError: what a worker raised, such as a full disk.
    """
    pending = [entry for entry in units if not all(map(stage.has, entry.shards))]
    for entry in pending:
        if entry.folder is not None:
            stage.drop_folder(entry.folder)
        for name in entry.shards:
            stage.drop(name)
    if not pending:
        return
    total = sum(entry.size for entry in units)
    initial = total - sum(entry.size for entry in pending)
    with Progress(label, total=total, unit=unit, initial=initial) as progress, _run_of(stage) as run:
        messages = [_message(stage, run, work, entry) for entry in pending]
        if options.runner == LOCAL and (options.workers == 1 or len(pending) < 2):
            _run_here(messages, run, progress)
        else:
            with _watching(stage, pending, progress):
                if options.runner == LOCAL:
                    from retro_jax.data import worker_processes

                    worker_processes.run(messages, min(options.workers, len(pending)), stage.directory / run)
                else:
                    _run_elsewhere(messages, options)
        _raise_failure(stage.directory / run)
    for entry in pending:
        for name in entry.shards:
            if not stage.has(name):
                raise WorkersError(
                    f"{stage.directory / name}: the pipeline has ended and this shard is not here; the workers must "
                    "write to a file system that this machine sees, under the same path"
                )


def work_off(message: str) -> None:
    """What a worker does with the unit in a line of JSON, unless it is finished or another unit has failed."""
    fields = json.loads(message)
    directory, run = Path(fields["directory"]), fields["run"]
    note = directory / run
    if all(is_finished(directory, name) for name in fields["shards"]) or _failure(note) is not None:
        return
    module, _, name = fields["work"].partition(":")
    writer = ShardWriter(directory, run=run, advance=_advances.get(run, lambda amount: None))
    try:
        getattr(importlib.import_module(module), name)(writer, fields["arguments"])
        writer.advance(fields["size"] - writer.advanced)
    except UserError as error:
        _leave_failure(note, {"message": str(error)})
    except KeyboardInterrupt:  # Beam would make a RuntimeError of it
        _leave_failure(note, {"interrupted": True})
    except OSError as error:
        _leave_failure(note, {"errno": error.errno, "strerror": error.strerror or str(error), "file": error.filename})
    except Exception:
        _leave_failure(note, {"traceback": traceback.format_exc()[-_LONGEST_TEXT:]})


def build_pipeline(runner: Any, options: Any, messages: Sequence[str]) -> Any:
    """A Beam pipeline that works off the messages, not yet run."""
    import apache_beam as beam

    pipeline = beam.Pipeline(runner=runner, options=options)
    units = pipeline | "Units" >> beam.Create(list(messages))
    # Without the reshuffle a runner may fuse the steps and give all units to one worker.
    units | "Spread" >> beam.Reshuffle() | "Work" >> beam.FlatMap(_element)
    return pipeline


@contextlib.contextmanager
def quiet_beam() -> Iterator[None]:
    """Keeps Beam's remarks off the terminal; what is wrong comes as an exception or through the run's file."""
    names = ("apache_beam", "root")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _element(message: str) -> tuple[()]:
    work_off(message)
    return ()


def _message(stage: Stage, run: str, work: Work, unit: Unit) -> str:
    return json.dumps(
        {
            "directory": str(stage.directory.absolute()),
            "run": run,
            "work": f"{work.__module__}:{work.__qualname__}",
            "shards": unit.shards,
            "size": unit.size,
            "arguments": unit.arguments,
        },
        sort_keys=True,
    )


def _run_here(messages: list[str], run: str, progress: Progress) -> None:
    _advances[run] = progress.update
    try:
        if len(messages) == 1:
            work_off(messages[0])
        else:
            with quiet_beam():
                from apache_beam.options.pipeline_options import PipelineOptions
                from apache_beam.runners.portability.fn_api_runner import FnApiRunner

                build_pipeline(FnApiRunner(), PipelineOptions([]), messages).run()
    finally:
        del _advances[run]


def _run_elsewhere(messages: list[str], options: BeamOptions) -> None:
    with quiet_beam():
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.runner import PipelineState, create_runner

        try:
            runner = create_runner(options.runner)
        except (ValueError, ImportError, AttributeError) as error:
            raise UserError(f"runner {options.runner!r}: {' '.join(str(error).split())}") from None
        try:
            result = build_pipeline(runner, PipelineOptions(list(options.beam)), messages).run()
            while not PipelineState.is_terminal(result.state):
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            result.wait_until_finish()
        except Exception as error:  # each runner and its transport has exceptions of its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
            raise WorkersError(f"{options.runner} failed ({reason}); finished shards are kept") from error


@contextlib.contextmanager
def _watching(stage: Stage, pending: list[Unit], progress: Progress) -> Iterator[None]:
    """Moves the progress bar on when a unit's last shard appears."""
    left = list(pending)
    ended = threading.Event()

    def look() -> None:
        for entry in [entry for entry in left if is_finished(stage.directory, entry.shards[-1])]:
            left.remove(entry)
            progress.update(entry.size)

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


@contextlib.contextmanager
def _run_of(stage: Stage) -> Iterator[str]:
    """The name of the file that stands for this run; takes in what was finished when the run is over."""
    name = f"{TEMPORARY}run-{secrets.token_hex(8)}"
    path = stage.directory / name
    path.write_bytes(b" " * _RUN_BYTES)
    try:
        yield name
    finally:
        path.unlink(missing_ok=True)
        stage.reload()


def _leave_failure(note: Path, failure: dict[str, Any]) -> None:
    short = {key: value[:_LONGEST_TEXT] if isinstance(value, str) else value for key, value in failure.items()}
    content = json.dumps(short).encode()
    with contextlib.suppress(FileNotFoundError), open(note, "rb+", buffering=0) as file:
        os.pwrite(file.fileno(), content.ljust(_RUN_BYTES), 0)


def _failure(note: Path) -> dict[str, Any] | None:
    try:
        content = note.read_bytes().strip()
    except FileNotFoundError:  # the run is over
        return {}
    try:
        return json.loads(content) if content else None
    except ValueError:  # read while it is written
        return {}


def _raise_failure(note: Path) -> None:
    failure = _failure(note)
    if failure is None:
        return
    if "message" in failure:
        raise UserError(failure["message"])
    if "interrupted" in failure:
        raise KeyboardInterrupt
    if "errno" in failure:
        raise OSError(failure["errno"], failure["strerror"], failure["file"])
    raise RuntimeError(f"a worker failed:\n{failure.get('traceback')}")
