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

from retro_jax.data.stage import write_json
from retro_jax.errors import UserError
from retro_jax.interop.export import new_directory, write_native
from retro_jax.interop.pretrained import Pretrained
from retro_jax.interop.tensors import Tensors
from retro_jax.model.incremental import Distances, split_incremental
from retro_jax.model.parameters import from_layers, layer_shapes
from retro_jax.model.retro import Retro
from retro_jax.training.state import from_nested_dict, to_nested_dict

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of logits relative to the largest: other programs, other orders of summation
Arrays = dict[str, Any]


def export_stablehlo(
    source: Pretrained, path: str | os.PathLike, *, name: str, platforms: tuple[str, ...] = PLATFORMS
) -> None:
    """Writes the programs beside a native export, reloads them and compares their logits with the model's.

    Args:
      source, path, name: as for `retro_jax.interop.export.export_native`.
      platforms: that the programs run on; the one of this machine among them.

    Raises:
      UserError: the directory is there, or a reloaded program gives other logits.
    """
    with new_directory(path) as directory:
        write_native(source, directory, name)
        programs = _programs(source)
        signatures = {}
        for key, (function, arguments) in programs.items():
            exported = export.export(jax.jit(function), platforms=platforms)(*arguments)
            (directory / f"{key}.stablehlo").write_bytes(bytes(exported.serialize()))
            signatures[key] = {"arguments": [_described(each) for each in arguments]}
            signatures[key]["results"] = _described(jax.tree.unflatten(exported.out_tree, exported.out_avals))
        slots = _length(source)
        write_json(
            directory / "programs.json",
            {"platforms": list(platforms), "slots": slots, "pad_id": source.config.pad_id, "programs": signatures},
        )
        _check(source, directory, signatures)


def _length(source: Pretrained) -> int:
    """T: the context of the training, in whole chunks."""
    chunk = source.config.chunk_length
    return max(source.context // chunk, 2) * chunk


def _programs(source: Pretrained) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """Each program with its abstract arguments."""
    config, length, neighbours = source.config, _length(source), source.neighbours or None
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
    programs: dict[str, tuple[Callable, tuple[Any, ...]]] = {
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


def _check(source: Pretrained, directory: Path, signatures: dict[str, Any]) -> None:
    """Raises UserError unless the programs, read back, give the model's logits, whole sequences and step by step."""
    config, length, chunk = source.config, _length(source), source.config.chunk_length
    programs = {
        key: jax.jit(export.deserialize(bytearray((directory / f"{key}.stablehlo").read_bytes())).call)
        for key in signatures
    }
    tensors = Tensors(directory)
    parameters = {name: tensors[name] for name in tensors}
    prepared = programs["prepare"](parameters)
    model = jax.jit(lambda params, *inputs: nnx.merge(nnx.graphdef(source.model), params)(*inputs))
    generator = np.random.default_rng(0)
    low = 1 if config.pad_id == 0 else 0
    tokens = generator.integers(low, config.vocab_size, (3, length), np.int32)
    tokens[1, -chunk // 2 :] = config.pad_id
    shape = (3, length // chunk, source.neighbours, config.neighbour_length)
    near = generator.integers(low, config.vocab_size, shape, np.int32)
    for mode, inputs in {"_off": (tokens,), "": (tokens, near)}.items():
        if f"forward{mode}" not in programs:
            continue
        expected = np.asarray(model(source.params, *inputs))
        _require_close(f"forward{mode}", directory, programs[f"forward{mode}"](parameters, *inputs), expected)
        # One row by itself: the batch is a symbol.
        state = _zeros(signatures["step"]["arguments"][1], 1)
        for slot in range(2 * chunk):
            if (slot + 1) % chunk:
                arguments: tuple[Any, ...] = ("step",)
            else:
                arguments = (f"step_end{mode}",) if mode else ("step_end", near[:1, slot // chunk])
            found, state = programs[arguments[0]](prepared, state, tokens[:1, slot], np.int32(slot), *arguments[1:])
            _require_close(arguments[0], directory, found, expected[:1, slot])


def _zeros(described: Any, batch: int) -> Any:
    """The state before the first token, made as a reader of programs.json makes it."""

    def zeros(text: str) -> np.ndarray:
        dtype, shape = text.rstrip("]").split("[")
        sizes = [batch if size == "b" else int(size) for size in shape.split(", ") if size]
        return np.zeros(sizes, jnp.dtype(dtype))

    return jax.tree.map(zeros, described)


def _require_close(program: str, directory: Path, found: Any, expected: np.ndarray) -> None:
    worst = float(np.max(np.abs(np.asarray(found) - expected)))
    if not worst <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise UserError(
            f"{directory}: {program} reloaded gives logits {worst:.1e} off the model's; nothing was exported"
        )
