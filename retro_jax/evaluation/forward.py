"""A model applied to rows of tokens: what every label costs, and on request what the label is predicted from."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.parallel import hosts, rules
from retro_jax.training.loss import head_logits, token_nats
from retro_jax.training.state import ModelPlan


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Of n rows of T tokens.

    Attributes:
      nats: [n, T] float32 (float64 of a model that computes in it), -ln p(label); of no meaning where it is PAD.
      hidden: [n, T, D] float32, what the output head reads to predict the label; None unless asked for.
      best: [n, T] int32, the most probable token; None unless asked for.
    """

    nats: np.ndarray
    hidden: np.ndarray | None
    best: np.ndarray | None


class Forward:
    """Applies one model to batches of rows; compiled once for every row length.

    Several processes call it alike: each feeds the neighbours of its rows of the batch, all get the same outputs.

    Attributes:
      plan, params, mesh: the model and the devices; rows of a batch are split over them.
      batch_size: most rows of a call; a multiple of the devices that rows are split over.
    """

    def __init__(
        self,
        plan: ModelPlan,
        params: nnx.State,
        mesh: Mesh,
        *,
        batch_size: int,
        hidden: bool = False,
        best: bool = False,
        vocab_block: int = 16_384,
    ) -> None:
        """Prepares the model.

        Args:
          plan, params, mesh: see the attributes.
          batch_size: is rounded up to what the devices need; does not change what comes out.
          hidden, best: give these outputs too.
          vocab_block: as in training.
        """
        self.plan = plan
        self.params = params
        self.mesh = mesh
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // rows) * rows
        self._sharding = rules.batch_sharding(mesh)

        def outputs(params: nnx.State, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
            with rules.use(mesh):
                model = plan.merge(params)
                states = model.hidden(arrays["tokens"], arrays.get("neighbours"))
                kernel = model.head_kernel()
                found = {"nats": token_nats(states, kernel, arrays["labels"], block=vocab_block)}
                if hidden:
                    found["hidden"] = states.astype(jnp.float32)
                if best:
                    found["best"] = _best_tokens(states, kernel, vocab_block)
            return found

        # Every process gets every row: the sums are the same on any number of processes.
        self._outputs = jax.jit(outputs, in_shardings=(None, self._sharding), out_shardings=rules.replicated(mesh))

    def __call__(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        neighbours: Callable[[Sequence[int]], np.ndarray] | None = None,
    ) -> Outputs:
        """Applies the model to n rows.

        Args:
          tokens: [n, T] int32, n at most `batch_size`; PAD is seen by nothing.
          labels: [n, T] int32, the token that is to be predicted at each place.
          neighbours: from rows, indices below n, to their neighbours [len(rows), T // M, K, R] int32; None: RETRO[OFF]
            or a baseline. It is called once, for the rows that this process's devices hold.
        """
        count = len(tokens)
        arrays: dict[str, Any] = {
            "tokens": _filled(tokens, self.batch_size),
            "labels": _filled(labels, self.batch_size),
        }
        own_rows = hosts.batch_rows(self._sharding, self.batch_size)
        own = {name: array[list(own_rows)] for name, array in arrays.items()}
        if neighbours is not None:
            own["neighbours"] = _filled(neighbours([row for row in own_rows if row < count]), len(own_rows))
        found = self._outputs(self.params, hosts.to_global(own, own_rows, self.batch_size, self._sharding))
        values = {name: np.asarray(value)[:count] for name, value in found.items()}
        return Outputs(values["nats"], values.get("hidden"), values.get("best"))


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows [n, ...] and rows behind them of which nothing is asked, [count, ...]."""
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def _best_tokens(hidden: jax.Array, kernel: jax.Array, block: int) -> jax.Array:
    """Most probable token [B, T] of hidden [B, T, D], walking the vocabulary [V, D] in blocks; the first of equals."""
    vocab = len(kernel)
    size = min(block, vocab) if block > 0 else vocab
    blocks = -(-vocab // size)
    rows = jnp.pad(kernel.astype(hidden.dtype), ((0, blocks * size - vocab), (0, 0))).reshape(blocks, size, -1)
    ids = jnp.arange(blocks * size, dtype=jnp.int32).reshape(blocks, size)

    def body(carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        maximum, best = carry
        ids, rows = part
        logits = jnp.where(ids < vocab, head_logits(hidden, rows[None])[:, :, 0], -jnp.inf)
        found = logits.max(-1)
        return (jnp.maximum(maximum, found), jnp.where(found > maximum, ids[logits.argmax(-1)], best)), None

    start = (jnp.full(hidden.shape[:2], -jnp.inf, jnp.promote_types(hidden.dtype, jnp.float32)),)
    (_, best), _ = jax.lax.scan(body, (*start, jnp.zeros(hidden.shape[:2], jnp.int32)), (ids, rows))
    return best
