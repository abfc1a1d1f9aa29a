"""Metric lines of a run: `metrics.jsonl` and TensorBoard, consistent with the checkpoint it resumes from."""

import json
import os
from pathlib import Path

from tensorboardX import SummaryWriter

from retro_jax.data.stage import atomic_write

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object a line, and the same values to TensorBoard.

    Opened with the step a run resumes from, it drops the lines behind that step (the run had gone on after its last
    checkpoint, and writes them again) and a last line cut by a kill.
    """

    def __init__(self, workdir: str | os.PathLike, resumed_step: int) -> None:
        workdir = Path(workdir)
        path = workdir / FILE
        kept = [json.dumps(line) for line in read_metrics(workdir) if line["step"] <= resumed_step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1, flush_secs=30)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line; `step` counts finished optimizer steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The complete lines of a run's `metrics.jsonl`, in order; none when there is no file."""
    path = Path(workdir) / FILE
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut by a kill
            break
    return lines
