"""Trains a RETRO or a baseline, or goes on with a run that was interrupted.

    python launch/train.py --config=experiments/tiny.py --workdir=runs/tiny --config.data.sequences=DIR
    python launch/train.py ... --config.batch_size=16 --config.model.width=512

The same command after an interruption goes on from the newest checkpoint. SIGTERM saves first and exits with 143.
"""

import sys

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
    try:
        recipe = _CONFIG.value
    except OSError as error:
        raise UserError("--config cannot be loaded: " + " ".join(str(error).split())) from None
    config = from_config_dict(TrainConfig, recipe)
    result = train(config, _WORKDIR.value)
    if result.terminated:
        print(f"stopped by SIGTERM after step {result.step}, saved; the same command goes on", file=sys.stderr)
        sys.exit(143)
    last = read_metrics(_WORKDIR.value)[-1]
    print(f"step {last['step']}: loss {last['loss']:.4f} nats per token; the run lies in {_WORKDIR.value}")


if __name__ == "__main__":
    program.run(main)
