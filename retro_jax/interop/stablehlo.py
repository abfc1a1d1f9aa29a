"""The model as StableHLO programs, which run wherever JAX does without a line of this package.

Programs are serialised by `jax.export` for CPU, GPU and TPU, with the batch as a symbol `b`; parameters are an
argument, a dict by the names of `model.safetensors` beside them. `programs.json` says what goes into each and comes
out of it.

    forward        (parameters, tokens [b, T], neighbours [b, T/M, K, R]) to logits [b, T, V]; off: without neighbours
    prepare        parameters to what the steps need of them, once
    step           (prepared, state, tokens [b], slot) to (logits [b, V], state), the state one token further
    step_end       the same for the last slot of a chunk, with the chunk's neighbours [b, K, R]; step_end_off: without
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.files import write_json
from retro_jax.interop.export import Source, new_directory, write_native
from retro_jax.interop.tensors import Tensors
from retro_jax.model.incremental import Distances, split_incremental
from retro_jax.model.parameters import from_layers, layer_shapes
from retro_jax.model.retro import Retro
from retro_jax.training.state import from_nested_dict, to_nested_dict

PLATFORMS = ("cpu", "cuda", "tpu")
# How far logits may be apart, relative to the largest, by compute dtype: of one program compiled twice; and of token
# after token and the whole sequence, where sums have another order and activations are rounded elsewhere. Steps that
# are wrong are off by about the logits themselves.
SAME = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 1e-2}
STEPS = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.2}
LONGEST = 4096  # tokens of the programs where nobody says how many: the check runs them
Arrays = dict[str, Any]
Programs = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def export_stablehlo(
    source: Source,
    path: str | os.PathLike,
    *,
    name: str,
    length: int | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
) -> None:
    """Writes the programs beside a native export, reloads them and compares their logits with the model's.

    The comparison is made on the CPU, where a float32 is one in matrix products too, and has the model in memory.

    Args:
      source, path, name: as for `retro_jax.interop.export.export_native`.
      length: T, tokens of the programs, whole chunks; those of the model's training by default.
      platforms: that the programs run on; cpu among them.

    Raises:
      UserError: the directory is there, a length that must be given or cannot be, or a reloaded program gives other
        logits.
    """
    length, cpu = _length(source, length), _cpu()
    with new_directory(path) as directory:
        write_native(source, directory, name)
        programs = _programs(source.config, length, source.neighbours or None)
        signatures = {}
        for key, (function, arguments) in programs.items():
            exported = export.export(jax.jit(function), platforms=platforms)(*arguments)
            (directory / f"{key}.stablehlo").write_bytes(bytes(exported.serialize()))
            signatures[key] = {"arguments": [_described(each) for each in arguments]}
            signatures[key]["results"] = _described(jax.tree.unflatten(exported.out_tree, exported.out_avals))
        write_json(
            directory / "programs.json",
            {"platforms": list(platforms), "slots": length, "pad_id": source.config.pad_id, "programs": signatures},
        )
        with jax.default_device(cpu):
            _check(directory, source.config, programs, signatures)


def _length(source: Source, wanted: int | None) -> int:
    """T, which the model's context gives where nobody wants another."""
    chunk, most = source.config.chunk_length, source.config.max_positions
    if wanted is None and not chunk <= source.context <= LONGEST:
        context = f"{source.context:,} tokens" if source.context else "not known"
        raise UserError(f"the model's context is {context}; give --length, the tokens that the programs take")
    length = source.context // chunk * chunk if wanted is None else wanted
    if length <= 0 or length % chunk or (most and length > most):
        limit = f" up to {most:,}" if most else ""
        raise UserError(f"--length={length} is not a multiple of the chunk of {chunk} tokens{limit}")
    return length


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError("programs are checked on the CPU, which JAX_PLATFORMS leaves out; add ,cpu to it") from None


def _programs(config: RetroConfig, length: int, neighbours: int | None) -> Programs:
    """Each program with its abstract arguments."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Retro(config)))
    (batch,) = export.symbolic_shape("b")
    parameters = layer_shapes(config)
    own: nnx.GraphDef

    def forward(parameters: Arrays, tokens: jax.Array, neighbours: jax.Array | None = None) -> jax.Array:
        return nnx.merge(graphdef, from_layers(parameters, config))(tokens, neighbours)

    def lay_out(parameters: Arrays) -> nnx.State:
        nonlocal own
        own, params = split_incremental(nnx.merge(graphdef, from_layers(parameters, config)))
        return params

    def prepared_of(parameters: Arrays) -> tuple[nnx.State, Distances]:
        params = lay_out(parameters)
        return params, nnx.merge(own, params).distances(length)

    prepared = jax.eval_shape(prepared_of, parameters)
    empty = jax.eval_shape(lambda p: nnx.merge(own, lay_out(p)).empty(batch, length, neighbours), parameters)

    def advance(
        given: Arrays, state: Arrays, tokens: jax.Array, slot: jax.Array, near: jax.Array | None, ends: bool
    ) -> tuple[jax.Array, Arrays]:
        params, distances = from_nested_dict(prepared, given)
        model = nnx.merge(own, params)
        before = from_nested_dict(empty, state)
        hidden, after = model.advance(distances, before, tokens[:, None], slot, near, ends_chunk=ends)
        return model.logits(hidden[:, 0]), to_nested_dict(after)

    def integers(*shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    tokens = integers(batch, length)
    step = (to_nested_dict(prepared), to_nested_dict(empty), integers(batch), integers())
    programs: Programs = {
        "forward_off": (lambda p, t: forward(p, t), (parameters, tokens)),
        "prepare": (lambda p: to_nested_dict(prepared_of(p)), (parameters,)),
        "step": (lambda p, s, t, slot: advance(p, s, t, slot, None, False), step),
        "step_end_off": (lambda p, s, t, slot: advance(p, s, t, slot, None, True), step),
    }
    if neighbours:
        near = (neighbours, config.neighbour_length)
        sequence = integers(batch, length // config.chunk_length, *near)
        programs["forward"] = (lambda p, t, n: forward(p, t, n), (parameters, tokens, sequence))
        programs["step_end"] = (
            lambda p, s, t, slot, n: advance(p, s, t, slot, n, True),
            (*step, integers(batch, *near)),
        )
    return programs


def _described(tree: Any) -> Any:
    """Shapes and types in the place of arrays, for programs.json."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]", tree)


def _check(directory: Path, config: RetroConfig, programs: Programs, signatures: dict[str, Any]) -> None:
    """Raises UserError unless the programs, read back, give what they gave before, and the steps the whole sequence."""
    before = {key: jax.jit(function) for key, (function, _) in programs.items()}
    reloaded = {
        key: jax.jit(export.deserialize(bytearray((directory / f"{key}.stablehlo").read_bytes())).call)
        for key in programs
    }
    chunk, same, steps = config.chunk_length, SAME[config.dtype], STEPS[config.dtype]
    tensors = Tensors(directory)
    parameters = {name: jnp.asarray(tensors[name]) for name in tensors}
    generator = np.random.default_rng(0)

    def drawn(described: jax.ShapeDtypeStruct) -> np.ndarray:
        low = 1 if config.pad_id == 0 else 0
        return generator.integers(low, config.vocab_size, (2, *described.shape[1:]), np.int32)

    for key, (_, (_, *inputs)) in programs.items():
        if not key.startswith("forward"):
            continue
        tokens, *near = map(drawn, inputs)
        tokens[1, -chunk // 2 :] = config.pad_id
        expected = np.asarray(reloaded[key](parameters, tokens, *near))
        _require_close(key, directory, expected, before[key](parameters, tokens, *near), same)
        # One row by itself: the batch is a symbol.
        prepared, state = reloaded["prepare"](parameters), _zeros(signatures["step"]["arguments"][1], 1)
        for slot in range(min(2 * chunk, tokens.shape[1])):
            ends = (slot + 1) % chunk == 0
            step = key.replace("forward", "step_end") if ends else "step"
            beside = [each[:1, slot // chunk] for each in near] if ends else []
            arguments = (prepared, state, tokens[:1, slot], np.int32(slot), *beside)
            found, state = reloaded[step](*arguments)
            _require_close(step, directory, found, before[step](*arguments)[0], same)
            _require_close(step, directory, found, expected[:1, slot], steps)


def _zeros(described: Any, batch: int) -> Any:
    """The state before the first token, made as a reader of programs.json makes it."""

    def zeros(text: str) -> np.ndarray:
        dtype, shape = text.rstrip("]").split("[")
        sizes = [batch if size == "b" else int(size) for size in shape.split(", ") if size]
        return np.zeros(sizes, jnp.dtype(dtype))

    return jax.tree.map(zeros, described)


def _require_close(program: str, directory: Path, found: Any, expected: Any, tolerance: float) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    worst = float(np.max(np.abs(found - expected)))
    if not worst <= tolerance * float(np.abs(expected).max()):
        raise UserError(
            f"{directory}: {program} reloaded gives logits {worst:.1e} off the model's; nothing was exported"
        )
