"""A trained run, opened for evaluation or sampling."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import MeshConfig, TrainConfig
from retro_jax.data.stage import fingerprint
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.checkpoint import load_params
from retro_jax.training.digest import digests
from retro_jax.training.state import ModelPlan, plan_model
from retro_jax.training.workdir import CHECKPOINTS, TOKENIZER, load_config


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """Configuration, tokenizer, devices and parameters of a run, and the step the parameters are from."""

    workdir: Path
    config: TrainConfig
    tokenizer: Tokenizer
    mesh: Mesh
    plan: ModelPlan
    params: nnx.State
    step: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the model's configuration and parameters, equal on every mesh."""
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        return fingerprint({"model": dataclasses.asdict(self.config.model), "parameters": digests(arrays)})

    def check_tokenizer(self, fingerprint: str, owner: str) -> None:
        """Raises UserError when a data set was made with another tokenizer than the run was trained with."""
        if fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"{owner} was made with tokenizer {fingerprint}, {self.workdir} was trained with "
                f"{self.tokenizer.fingerprint}; build it again with {self.workdir / TOKENIZER}"
            )


def load_trained(workdir: str | os.PathLike, *, step: int | None = None, mesh: MeshConfig | None = None) -> TrainedRun:
    """Opens a run's checkpoint on this machine's devices.

    Args:
      workdir: of the run.
      step: which checkpoint; the newest by default.
      mesh: how to lay out the devices; all on `fsdp` by default.

    Raises:
      UserError: no run, no checkpoint, or a damaged one.
    """
    workdir = Path(workdir)
    config = load_config(workdir)
    devices = create_mesh(mesh or MeshConfig())
    plan = plan_model(config.model, devices)
    params, step = load_params(workdir / CHECKPOINTS, plan.params, step)
    return TrainedRun(workdir, config, Tokenizer(workdir / TOKENIZER), devices, plan, params, step)
