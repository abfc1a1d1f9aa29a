"""Trains a RETRO or a baseline, or goes on with a run that was interrupted.

    python launch/train.py --config=experiments/tiny.py --workdir=runs/tiny --config.data.sequences=DIR
    python launch/train.py ... --config.batch_size=16 --config.model.width=512
    python launch/train.py --config=experiments/retrofit_demo.py --workdir=runs/fit --config.init_from=demo/baseline

The same command after an interruption goes on from the newest checkpoint. SIGTERM saves first and exits with 143.
Several processes, on one machine or many, are one run: docs/running-on-pods.md. Compiled programs are kept for the
next start in --compilation_cache, else in $JAX_COMPILATION_CACHE_DIR, else in ~/.cache/retro_jax/compiled.
"""

import os
import sys
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from retro_jax import program
from retro_jax.config import TrainConfig, from_config_dict
from retro_jax.errors import UserError
from retro_jax.parallel import hosts
from retro_jax.training.loop import train
from retro_jax.training.metrics import read_metrics
from retro_jax.training.retrofit import Base, known_base

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, a file of experiments/; --config.a.b=value changes it."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: configuration, metrics, checkpoints.")
_RESUME_FROM = flags.DEFINE_integer(
    "resume_from", None, "Go back to the checkpoint of this step, once, and remove the newer ones.", lower_bound=1
)
_PROFILE = flags.DEFINE_string("profile", None, "FIRST:COUNT, steps for JAX's profiler to record into WORKDIR/profile.")
_PROFILE_ALL = flags.DEFINE_bool("profile_all", False, "Record in every process, not in the first alone.")
_COMPILATION_CACHE = flags.DEFINE_string("compilation_cache", None, "Directory of compiled programs; empty for none.")
program.define_cluster_flags()
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    began = time.time()
    profile = _profile()
    config = from_config_dict(TrainConfig, program.loaded(_CONFIG.value))
    _use_compilation_cache()
    program.start_cluster()
    base = _base(config.init_from) if config.init_from else None
    result = train(
        config,
        _WORKDIR.value,
        resume_from=_RESUME_FROM.value,
        profile=profile,
        profile_all=_PROFILE_ALL.value,
        began=began,
        base=base,
    )
    if not hosts.is_primary():
        sys.exit(143 if result.terminated else 0)
    if result.terminated:
        print(f"stopped by SIGTERM after step {result.step}, saved; the same command goes on", file=sys.stderr)
        sys.exit(143)
    losses = [line["loss"] for line in read_metrics(_WORKDIR.value) if line["loss"] is not None]
    loss = f"loss {losses[-1]:.4f} nats per token" if losses else "finished"
    print(f"step {result.step}: {loss}; the run lies in {_WORKDIR.value}")


def _base(init_from: str) -> Base:
    """The model to begin with; a run that has a checkpoint goes on without."""
    from retro_jax.interop.checkpoint import open_base

    try:
        return open_base(init_from)
    except UserError as error:
        known = known_base(_WORKDIR.value, init_from)
        if known is None:
            raise
        print(f"init_from is not needed any more, and cannot be opened: {error}", file=sys.stderr)
        return known


def _profile() -> tuple[int, int] | None:
    if _PROFILE.value is None:
        return None
    first, _, count = _PROFILE.value.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(first) and int(count)):
        raise UserError(f"--profile={_PROFILE.value}: expected FIRST:COUNT, a step from 1 on and a number of steps")
    return int(first), int(count)


def _use_compilation_cache() -> None:
    """JAX warns when an entry or the directory is of no use, and compiles."""
    directory = _COMPILATION_CACHE.value
    if directory is None and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retro_jax" / "compiled"
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", str(directory) or None)


if __name__ == "__main__":
    program.run(main)
