"""Trains a RETRO or a baseline, or goes on with a run that was interrupted.

    python launch/train.py --config=experiments/tiny.py --workdir=runs/tiny --config.data.sequences=DIR
    python launch/train.py ... --config.batch_size=16 --config.model.width=512

The same command after an interruption goes on from the newest checkpoint. SIGTERM saves first and exits with 143.
"""

import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from retro_jax import program
from retro_jax.config import TrainConfig, from_config_dict
from retro_jax.errors import UserError
from retro_jax.training.loop import train
from retro_jax.training.metrics import read_metrics

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, a file of experiments/; --config.a.b=value changes it."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: configuration, metrics, checkpoints.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    config = from_config_dict(TrainConfig, _recipe())
    result = train(config, _WORKDIR.value)
    if result.terminated:
        print(f"stopped by SIGTERM after step {result.step}, saved; the same command goes on", file=sys.stderr)
        sys.exit(143)
    losses = [line["loss"] for line in read_metrics(_WORKDIR.value)]
    loss = f"loss {losses[-1]:.4f} nats per token" if losses else "finished"
    print(f"step {result.step}: {loss}; the run lies in {_WORKDIR.value}")


def _recipe() -> ml_collections.ConfigDict:
    try:
        _CONFIG.value.to_dict()  # a recipe that failed to load says so only when it is used
        return _CONFIG.value
    except (OSError, SyntaxError, AttributeError) as error:
        raise UserError(f"--config cannot be loaded: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    program.run(main)
