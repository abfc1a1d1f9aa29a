"""Loss on held-out sequences in the course of a run: the first ones of each data set, the same every time."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.config import TrainConfig
from retro_jax.data.sequences import SequenceSource
from retro_jax.parallel import hosts, rules
from retro_jax.training.inputs import to_devices
from retro_jax.training.loss import label_weights, token_nats
from retro_jax.training.state import ModelPlan


class Validation:
    """Mean loss over `validation.examples` sequences, as trained and, where neighbours are read, without them.

    The result does not depend on the mesh, the number of processes, the batch size and the micro-batches: each
    sequence's nats are added up on the host, in float64, and those that fill up the last batch are left out.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: ModelPlan,
        mesh: Mesh,
        sources: Sequence[SequenceSource],
        *,
        unscored: tuple[int, ...],
    ) -> None:
        """Prepares; nothing is read yet.

        Args:
          config: the run.
          plan: its model.
          mesh: its devices.
          sources: held-out sequences with the shapes of the training data.
          unscored: labels that carry no loss, as in training.
        """
        self._config = config
        self._sources = list(sources)
        self._offsets = np.concatenate([[0], np.cumsum([len(source) for source in sources])]).astype(int)
        self._count = min(config.validation.examples or self._offsets[-1], self._offsets[-1])
        self._batch_size = config.batch_size // config.microbatches
        self._sharding = rules.batch_sharding(mesh)
        self._rows = hosts.batch_rows(self._sharding, self._batch_size)
        both = config.cca_gate and not config.model.is_baseline
        self._modes = ("validation_loss", "validation_loss_off") if both else ("validation_loss",)

        def nats(params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """Nats and number of scored tokens of each sequence, [B] each."""
            with rules.use(mesh):
                model = plan.merge(params)
                inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
                hidden = model.hidden(inputs, batch.get("neighbours"), last_chunks=config.data.prompt > 0)
                weights = label_weights(labels, unscored=unscored, prompt=config.data.unscored_prompt)
                each = token_nats(hidden, model.head_kernel(), labels, block=config.vocab_block)
                return jnp.where(weights > 0, each * weights, 0).sum(axis=1), weights.sum(axis=1)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.params)
        self._nats = jax.jit(nats, in_shardings=(shardings, self._sharding), out_shardings=rules.replicated(mesh))

    def measure(self, params: nnx.State, stopping: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """`validation_loss` and, where neighbours are read, `validation_loss_off`, in nats per scored token.

        Args:
          params: of the model.
          stopping: asked between batches, equally often in all processes; once it is True, there is no result.
        """
        sums = {mode: np.zeros(2) for mode in self._modes}
        for first in range(0, self._count, self._batch_size):
            if first and stopping():
                return None
            batch = self._batch(first)
            for mode in self._modes:
                reads = mode == "validation_loss" and self._config.cca_gate
                parts = batch if reads else {"tokens": batch["tokens"]}
                found = np.asarray(jax.device_get(self._nats(params, parts)), np.float64)
                sums[mode] += found[:, : self._count - first].sum(axis=1)
        return {mode: float(nats / max(tokens, 1.0)) for mode, (nats, tokens) in sums.items()}

    def _batch(self, first: int) -> dict[str, jax.Array]:
        """Sequences from number `first` on; behind the last one it is repeated."""
        examples = [self._example(min(first + row, self._count - 1)) for row in self._rows]
        arrays = {name: np.stack([example[name] for example in examples]) for name in ("tokens", "neighbours")}
        return to_devices(arrays, self._rows, self._batch_size, self._config, self._sharding)

    def _example(self, number: int) -> dict[str, np.ndarray]:
        source = int(np.searchsorted(self._offsets, number, side="right")) - 1
        return self._sources[source][number - self._offsets[source]]
