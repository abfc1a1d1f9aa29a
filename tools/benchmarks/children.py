"""Runs what is to be measured in processes of their own, and sums up what they print."""

import json
import os
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.errors import UserError

TOOLS = Path(__file__).resolve().parent.parent


def run(
    python: str, module: str, job: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs `python -m module JSON` from the directory tools/, and gives what its last line of output says.

    Args:
      python: an interpreter; it finds the package `benchmarks`, and what is installed beside it.
      module: of this package.
      job: what the module is asked for.
      environment: variables that are added to this process's own.

    Raises:
      UserError: it failed; the last line that it wrote to its errors is the reason.
    """
    # In front, so that a checkout that is not installed finds its own retro_jax too.
    path = os.pathsep.join(filter(None, [str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [python, "-m", module, json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {}), "PYTHONPATH": path},
    )
    if result.returncode:
        raise UserError(f"{module.removeprefix('benchmarks.')}: {_reason(result)}")
    return json.loads(result.stdout.splitlines()[-1])


def summary(rounds: Sequence[Mapping[str, Any]], tokens: int, processed: int) -> dict[str, Any]:
    """The figures of one side over its rounds.

    Args:
      rounds: what `measure.time_steps` gave in each.
      tokens: targets of a step.
      processed: targets and neighbours' tokens of a step.
    """
    seconds = [value for each in rounds for value in each["step_seconds"]]
    median = statistics.median(seconds)
    return {
        "steps": len(seconds),
        "rounds": len(rounds),
        "step_seconds_median": median,
        "step_seconds_p90": float(np.quantile(seconds, 0.9)),
        "step_seconds_min": min(seconds),
        "target_tokens_per_second": tokens / median,
        "processed_tokens_per_second": processed / median,
        "data_wait_seconds_median": statistics.median(wait for each in rounds for wait in each["data_wait_seconds"]),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in rounds),
        "cores": rounds[0]["cores"],
        "cores_busy": _mean(each["cores_busy"] for each in rounds),
        "other_cores_busy": _mean(each["other_cores_busy"] for each in rounds),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 3) if known else None


def _reason(result: subprocess.CompletedProcess) -> str:
    if result.returncode == -9:
        return "was killed, probably for want of memory"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"ended with exit status {result.returncode}"
