"""Work for the tests of distributed stages: shards of numbers, and what may go wrong with one."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from retro_jax.data.distribute import BeamOptions, Unit, distribute
from retro_jax.data.stage import Manifest, ShardWriter, Stage, shard_name
from retro_jax.errors import UserError


def write_numbers(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Writes two files; before the second one it does what the arguments say."""
    index, trouble = arguments["index"], arguments.get("trouble")
    with writer.shard(arguments["names"][0]) as (path, counts):
        path.write_text(f"{index}\n" * 100)
        counts["rows"] = 100
    writer.advance(50)
    if trouble == "twice":  # as when a worker that seemed lost goes on
        write_numbers(ShardWriter(writer.directory), {**arguments, "trouble": None})
    if trouble == "user":
        raise UserError(f"unit {index} has bad input")
    if trouble == "disk":
        raise OSError(28, "No space left on device", "/some/file")
    if trouble == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    if trouble == "defect":
        raise ZeroDivisionError("a defect")
    if trouble == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "other_disk":
        (writer.directory / arguments["names"][0]).unlink()
        (writer.directory / (arguments["names"][0] + ".done.json")).unlink()
        return
    if "log" in arguments:
        Path(arguments["log"], f"{index}.{os.getpid()}").touch()
    time.sleep(arguments.get("seconds", 0))
    with writer.shard(arguments["names"][1]) as (path, counts):
        path.write_text(f"{index * index}\n" * 100)
        counts["rows"] = 100


def build_numbers(
    directory: str | Path,
    count: int,
    options: BeamOptions | None = None,
    *,
    trouble: dict[int, str] | None = None,
    **arguments: Any,
) -> Manifest:
    """A stage of `count` units with two shards each."""
    with Stage(directory, "numbers", settings={"count": count}, inputs={}) as stage:
        if stage.complete:
            return stage.manifest
        units = []
        for i in range(count):
            names = tuple(shard_name(stem, i, count, ".txt") for stem in ("numbers", "squares"))
            units.append(Unit(names, {"index": i, "names": names, "trouble": (trouble or {}).get(i), **arguments}, 200))
        distribute(stage, units, write_numbers, options or BeamOptions(), label="numbers", unit="rows")
        return stage.finish({"rows": sum(stage.counts(name)["rows"] for unit in units for name in unit.shards)})
