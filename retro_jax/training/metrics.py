"""Metric lines of a run: `metrics.jsonl` and TensorBoard, consistent with the checkpoint it resumes from."""

import json
import math
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from retro_jax.data.tfrecord import RecordWriter
from retro_jax.files import atomic_write
from retro_jax.training.lines import LineWriter, read_lines

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object a line, and the same values as TensorBoard events.

    Both are written at once, without a thread between: a full disk is an error here and now. A value that is not
    finite is null in the line and left out of the events.

    Opened with the step a run resumes from, it drops the lines behind that step (the run had gone on after its last
    checkpoint, and writes them again) and a last line cut by a kill.
    """

    def __init__(self, workdir: str | os.PathLike, resumed_step: int) -> None:
        workdir = Path(workdir)
        path = workdir / FILE
        kept = [json.dumps(line) for line in read_lines(path) if line["step"] <= resumed_step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._lines = LineWriter(path)
        events = workdir / "tensorboard" / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        events.parent.mkdir(exist_ok=True)
        self._events = RecordWriter(events)
        self._add_event(Event(file_version="brain.Event:2"))
        # Tells TensorBoard to forget what an earlier file holds behind this step.
        self._add_event(Event(step=resumed_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line; `step` counts finished optimizer steps."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._lines.append({"step": step, **{name: finite.get(name) for name in values}})
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        self._add_event(Event(step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write(event.SerializeToString())
        self._events.flush()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The complete lines of training in a run's `metrics.jsonl`, in order; none when there is no file."""
    return [line for line in read_lines(Path(workdir) / FILE) if "validation_loss" not in line]


def read_validations(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The same for the lines of validation: `step`, `validation_loss` and, of a RETRO, `validation_loss_off`."""
    return [line for line in read_lines(Path(workdir) / FILE) if "validation_loss" in line]
