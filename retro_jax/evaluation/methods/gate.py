"""SPALM's gate: how far the nearest contexts are trusted is decided anew for every token (Yogatama et al. 2021).

    p = g p_kNN + (1 - g) p_LM,  g = sigmoid(w h + b)

with h the state that the token is predicted from and w, b trained on the tuning set. SPALM itself is trained from the
start with such a gate between h and an average of the neighbours' embeddings (its section 3.3). Here the language model
stays as it is, so that all methods are compared on the same one, and the gate chooses between distributions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.methods.activations import predictions
from retro_jax.evaluation.methods.knn_lm import KnnLm
from retro_jax.evaluation.methods.method import MethodContext
from retro_jax.evaluation.methods.mixture import mix
from retro_jax.evaluation.methods.tuned import Evidence

_STEPS = 200
_DECAY = 1e-3  # of w, per token, against learning the tuning set by heart
_CLOSED = -1e3  # a bias whose sigmoid is 0
_NEVER = -1e4  # ln of a probability that is 0, which has a derivative


class Spalm(KnnLm):
    """kNN-LM with a gate in the place of the weight; temperature and the gate's start are kNN-LM's."""

    name = "spalm"
    needs_tuning = True

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.settings |= {"gate_steps": _STEPS, "gate_decay": _DECAY}

    def gather(self, evaluated: Evaluated) -> Evidence:
        evidence = super().gather(evaluated)
        context = self.context
        found = predictions(
            context.with_states, evaluated.corpus, **context.windows, description=f"{evaluated.name}: states"
        )
        return Evidence(
            evidence.documents,
            evidence.nats,
            evidence.arrays | {"states": np.concatenate([one.states for one in found])},
        )

    def fit(self, evidence: Evidence) -> dict[str, Any]:
        start = super().fit(evidence)
        found = self._log_knn(evidence, start["sharpness"])
        kernel, bias = train_gate(evidence["states"], evidence.nats, found, start["weight"])
        return {"sharpness": start["sharpness"], "kernel": kernel, "bias": bias}

    def weight(self, parameters: dict[str, Any], evidence: Evidence) -> np.ndarray:
        return gate(evidence["states"], parameters["kernel"], parameters["bias"])

    def describe(self, parameters: dict[str, Any]) -> dict[str, Any]:
        norm = float(np.linalg.norm(parameters["kernel"]))
        return {"sharpness": parameters["sharpness"], "bias": parameters["bias"], "kernel_norm": norm}


def gate(states: np.ndarray, kernel: np.ndarray, bias: float) -> np.ndarray:
    """sigmoid(w h + b) [n] float64 of states [n, D], kernel [D]."""
    with np.errstate(over="ignore"):  # far below zero the gate is closed
        return 1 / (1 + np.exp(-(states.astype(np.float64) @ kernel + bias)))


def train_gate(states: np.ndarray, nats: np.ndarray, log_other: np.ndarray, weight: float) -> tuple[np.ndarray, float]:
    """The gate (kernel [D], bias) with the least loss found by L-BFGS from the constant weight, never more than that's.

    Args:
      states: [n, D] float32.
      nats: [n], -ln p_LM(token).
      log_other: [n], ln p_other(token), -inf for probability 0.
      weight: lambda in [0, 1) that training starts from.
    """
    bounded = jnp.asarray(np.maximum(log_other, _NEVER), jnp.float32)
    inputs, own = jnp.asarray(states, jnp.float32), -jnp.asarray(nats, jnp.float32)
    chance = np.clip(weight, 1e-4, 1 - 1e-4)
    start = {"kernel": jnp.zeros(states.shape[1]), "bias": jnp.asarray(np.log(chance / (1 - chance)), jnp.float32)}

    def loss(parameters: dict[str, jax.Array]) -> jax.Array:
        logits = inputs @ parameters["kernel"] + parameters["bias"]
        mixed = jnp.logaddexp(jax.nn.log_sigmoid(-logits) + own, jax.nn.log_sigmoid(logits) + bounded)
        return -mixed.mean() + _DECAY * jnp.square(parameters["kernel"]).sum()

    solver = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        parameters, state = carry
        value, gradient = value_and_gradient(parameters, state=state)
        updates, state = solver.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(parameters, updates), state), None

    (found, _), _ = jax.jit(lambda start: jax.lax.scan(step, (start, solver.init(start)), None, length=_STEPS))(start)
    kernel, bias = np.asarray(found["kernel"], np.float64), float(found["bias"])
    if not mix(nats, log_other, gate(states, kernel, bias)).sum() <= mix(nats, log_other, weight).sum():
        return np.zeros(states.shape[1]), float(np.log(weight) - np.log1p(-weight)) if weight > 0 else _CLOSED
    return kernel, bias
