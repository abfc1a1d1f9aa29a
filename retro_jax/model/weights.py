"""Parameters with named axes: how they are drawn, used in products, and stacked over layers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.parallel import rules


class Stream(NamedTuple):
    """A residual stream: its width and the logical name of that axis ("embed" D or "encoder_embed" E)."""

    width: int
    axis: str


def decoder_stream(config: RetroConfig) -> Stream:
    """D."""
    return Stream(config.width, "embed")


def encoder_stream(config: RetroConfig) -> Stream:
    """E."""
    # A shared embedding table is one array, so its width can have one name only.
    return Stream(config.encoder_width, "encoder_embed")


def compute_dtype(config: RetroConfig) -> jnp.dtype:
    """Of activations and of the operands of matrix products."""
    return jnp.dtype(config.dtype)


def statistics_dtype(config: RetroConfig) -> jnp.dtype:
    """Of parameters, norms, attention logits, softmax and output logits: float32, or float64 when computing in it."""
    return jnp.promote_types(compute_dtype(config), jnp.float32)


def require_dtype(config: RetroConfig) -> None:
    """Raises UserError when JAX would silently compute in another dtype than the configured one."""
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError("model.dtype: float64 needs jax_enable_x64; set JAX_ENABLE_X64=1 or choose float32")


def normal(
    key: jax.Array, shape: Sequence[int], axes: tuple[str | None, ...], scale: float, dtype: jnp.dtype
) -> nnx.Param:
    """A parameter drawn from N(0, scale^2). `axes` names each dimension for the sharding rules."""
    # Drawn flat: on a CPU the random bits of a three-dimensional array take three times as long to compile.
    values = jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
    return nnx.Param(scale * values, axes=axes)


def zeros(shape: Sequence[int], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param:
    """A bias, 0 at first; `axes` as for `normal`."""
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=axes)


def plus(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """x with a bias added along its last axes, or x."""
    return x if bias is None else x + bias[...].astype(x.dtype)


def weight(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """A parameter as it is used: in the compute dtype and brought together over fsdp."""
    # The name lets `remat` drop the gathered copy, which a backward pass would otherwise keep for every layer.
    return checkpoint_name(rules.gather(param[...].astype(dtype), param.axes), "weight")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(subscripts: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype: summed in float32 (float64 for float64) and rounded once.

    Every index of one operand must be in the other or in the result.

    Args:
      subscripts: as for einsum, with an explicit result.
      a, b: operands.
      dtype: of the result; None for the operands'.
    """
    # Accelerators sum in float32 anyhow; a CPU multiplies bfloat16 at twice the speed when it is asked to.
    sums = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=sums).astype(dtype or a.dtype)


def _product_forward(
    subscripts: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(subscripts, a, b, dtype), (a, b)


def _product_backward(
    subscripts: str, _: jnp.dtype | None, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # By hand for two reasons. Both products are of operands in the compute dtype, where JAX's own would multiply
    # float32 by bfloat16. And einsum orders the operands so that nothing is transposed, where JAX's own gives the
    # transposed gradient of a kernel, whose product runs at half the speed on a CPU.
    a, b = saved
    operands, result = subscripts.split("->")
    first, second = operands.split(",")
    cotangent = cotangent.astype(a.dtype)
    return (
        product(f"{result},{second}->{first}", cotangent, b),
        product(f"{first},{result}->{second}", a, cotangent),
    )


product.defvjp(_product_forward, _product_backward)


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] times kernel [D, F]: [..., F]."""
    return product("...d,df->...f", x, kernel)


Module = TypeVar("Module", bound=nnx.Module)


def stacked(build: Callable[[jax.Array], Module], key: jax.Array, count: int) -> Module:
    """One module that holds the parameters of `count` independent ones, along a new first axis "layers".

    Args:
      build: from a random key to a module; called once, under vmap, so that a deep model compiles one draw per kind of
        parameter.
      key: split into `count`.
      count: at least 1.
    """
    graphdef = None

    def parameters(key: jax.Array) -> nnx.State:
        nonlocal graphdef
        graphdef, state = nnx.split(build(key))
        return state

    state = jax.vmap(parameters)(jax.random.split(key, count))
    return nnx.merge(graphdef, _each_param(lambda x: x, lambda axes: ("layers", *axes), state))


def take(module: Module, which: int | slice) -> Module:
    """The layer, or the layers in a slice, of a stacked module."""
    graphdef, state = nnx.split(module)
    axes = (lambda axes: axes[1:]) if isinstance(which, int) else (lambda axes: axes)
    return nnx.merge(graphdef, _each_param(lambda x: x[which], axes, state))


def _each_param(value: Callable, axes: Callable, state: nnx.State) -> nnx.State:
    return jax.tree.map(
        lambda param: param.replace(value(param[...]), axes=axes(param.axes)),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def residual_scale(config: RetroConfig, num_layers: int) -> float:
    """Initial scale of projections that add to a residual stream of `num_layers` blocks (GPT-2)."""
    return config.init_scale / math.sqrt(2 * num_layers)


def logical_axes(params: Any) -> Any:
    """The tree of logical axis names of a parameter state, for sharding rules.

    Args:
      params: `nnx.State` of Param leaves, concrete or abstract, as `nnx.split(model)` gives it (or a tree of the same
        structure, such as gradients).

    Returns:
      the same tree with a tuple of names in the place of each Param: "vocab", "embed", "encoder_embed", "heads",
      "head", "ffw", "layers"; one name per dimension.
    """
    return jax.tree.map(lambda param: param.axes, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
