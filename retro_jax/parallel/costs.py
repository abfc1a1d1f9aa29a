"""What a run of a compiled program costs one device: FLOPs, bytes over the interconnect, bytes of main memory.

Everything is counted as often as it runs, loops with their trips (see `retro_jax.parallel.hlo`).
"""

import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from retro_jax.parallel.hlo import Instruction, Module, Shape, executions

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions that move no data; what the called computations of the last three move is counted there.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call", "conditional")
_PARTIAL_READS = ("dynamic-slice", "slice", "gather")


class Work(NamedTuple):
    """One instruction outside of fusions, with all that is fused into it.

    Attributes:
      flops: of matrix products in one execution, two per multiply-add.
      bytes: read from and written to main memory in one execution: operands and results, of a sliced operand the slice,
        of an update in place the update; not what the compiler keeps in memory on the chip. An estimate: how often a
        fusion reads an operand is not in the text.
      times: executions in one run of the program.
      asynchronous: the device goes on with other instructions meanwhile (copies to and from memory on the chip).
      op_name: where in the Python program it comes from.
    """

    flops: float
    bytes: float
    times: float
    asynchronous: bool
    op_name: str


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: that each device sends in one execution, by the ring algorithms. With S bytes that each of n devices
        contributes: (n - 1) S for all-gather, (n - 1) / n S for reduce-scatter and all-to-all, twice that for
        all-reduce, S for collective-permute.
      group_size: n.
      times: executions in one run of the program.
      op_name: where in the Python program it comes from.
      shapes: of the arrays that each device contributes.
    """

    kind: str
    bytes: float
    group_size: int
    times: float
    op_name: str
    shapes: tuple[Shape, ...]


class Traffic(NamedTuple):
    """All collectives of one kind: instructions of the program; executions and bytes that a device sends in a run."""

    instructions: int
    executions: float
    bytes: float


def work(module: Module) -> list[Work]:
    """What every instruction of a run does that multiplies matrices or moves data."""
    found: list[Work] = []
    for run in executions(module):
        flops = _product_flops(module, run.instruction)
        if run.fused:  # its fusion comes first
            found[-1] = found[-1]._replace(flops=found[-1].flops + flops)
        else:
            touched, asynchronous = _touched(module, run.instruction), run.instruction.opcode.endswith("-start")
            found.append(Work(flops, touched, run.times, asynchronous, run.instruction.op_name))
    return [each for each in found if each.flops or each.bytes]


def matrix_flops(module: Module) -> float:
    """FLOPs of all matrix products of a run: dots, and convolutions, which they become on TPU."""
    return sum(each.times * each.flops for each in work(module))


def memory_bytes(module: Module) -> float:
    """Bytes of main memory that a run reads and writes."""
    return sum(each.times * each.bytes for each in work(module))


def collectives(module: Module) -> list[Collective]:
    """All collectives that a run executes, once each, however the compiler splits them into beginning and end."""
    found, around = [], ""
    for run in executions(module):
        instruction = run.instruction
        around = around if run.fused else instruction.op_name
        kind = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
        if kind not in COLLECTIVES or (run.fused and not _begins(module, instruction)):
            continue
        if run.fused and "all-reduce-scatter" in instruction.computation:
            kind = "reduce-scatter"  # on TPU a fusion of an all-reduce and the slice that the device keeps
        shapes = tuple(shape for operand in module.operands(instruction) for shape in operand.shapes)
        size = group_size(instruction.text, module.devices)
        sent = _bytes_sent(kind, sum(shape.bytes for shape in shapes), size)
        found.append(Collective(kind, sent, size, run.times, instruction.op_name or around, shapes))
    return found


def traffic(found: Iterable[Collective]) -> dict[str, Traffic]:
    """Sums by kind, of the kinds that occur, in the order of COLLECTIVES."""
    found = list(found)
    sums = {}
    for kind in COLLECTIVES:
        if same := [collective for collective in found if collective.kind == kind]:
            times, sent = sum(c.times for c in same), sum(c.times * c.bytes for c in same)
            sums[kind] = Traffic(len(same), times, sent)
    return sums


def group_size(text: str, devices: int) -> int:
    """Devices in one group of a collective, from its attributes: `replica_groups` in any of its forms, or pairs (2);
    without groups all `devices` are one."""
    if "source_target_pairs=" in text:
        return 2
    if iota := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", text):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=@?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", mesh[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    return devices


def _product_flops(module: Module, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        left = module.operands(instruction)[0].shapes[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left.dims[axis] for axis in axes)
    if instruction.opcode == "convolution":
        return _convolution_flops(module, instruction)
    return 0.0


def _convolution_flops(module: Module, instruction: Instruction) -> float:
    """Products with padding and with the zeros between dilated elements are not executed, and do not count."""
    left, right = (operand.shapes[0].dims for operand in module.operands(instruction)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    at = [{label: place for place, label in enumerate(part)} for part in labels.groups()]
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sum(label.isdigit() for label in labels[1])

    def setting(name: str, default: str, dimension: int) -> str:
        return settings[name].split("x")[dimension] if name in settings else default

    products = 2.0 * left[at[0]["f"]] * right[at[1]["o"]] * left[at[0]["b"]]
    for name in ("feature_group_count", "batch_group_count"):
        if groups := re.search(rf"{name}=(\d+)", instruction.text):
            products /= int(groups[1])
    for dimension in range(spatial):
        label = str(dimension)
        products *= _window_products(
            left[at[0][label]],
            right[at[1][label]],
            instruction.shapes[0].dims[at[2][label]],
            int(setting("stride", "1", dimension)),
            int(setting("pad", "0_0", dimension).split("_")[0]),
            int(setting("lhs_dilate", "1", dimension)),
            int(setting("rhs_dilate", "1", dimension)),
        )
    return products


@functools.cache
def _window_products(
    size: int, window: int, outputs: int, stride: int, low: int, dilation: int, window_dilation: int
) -> int:
    """Pairs of an output and a place in the window that meet an element of the input, along one dimension."""
    places = np.arange(outputs)[:, None] * stride - low + np.arange(window) * window_dilation
    return int(((places >= 0) & (places <= (size - 1) * dilation) & (places % dilation == 0)).sum())


def _begins(module: Module, instruction: Instruction) -> bool:
    """Of a collective in a fusion: it is the whole of it, or where it begins.

    On TPU beginning, overlapped middle and end of an asynchronous collective are fusions, each with a copy of it.
    """
    if "async_collective_fusion_config" not in instruction.text:
        return True
    siblings = module.computations[instruction.computation].instructions.values()
    return any('"AsyncCollectiveStart"' in other.text for other in siblings)


def _bytes_sent(kind: str, contributed: float, size: int) -> float:
    match kind:
        case "all-gather":
            return contributed * (size - 1)
        case "reduce-scatter" | "all-to-all":
            return contributed * (size - 1) / size
        case "all-reduce":
            return 2 * contributed * (size - 1) / size
    return contributed


def _touched(module: Module, instruction: Instruction) -> float:
    """Bytes of main memory that one execution reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode.endswith("-start"):  # the result holds source and destination
        ends = instruction.shapes[:2]
        if opcode.removesuffix("-start") in COLLECTIVES:
            return sum(map(_held, ends))
        return min(shape.bytes for shape in ends) * sum(shape.main_memory for shape in ends)
    operands = module.operands(instruction)
    if opcode == "fusion":
        (called,) = instruction.called("calls")
        computation = module.computations[called]
        read = sum(
            _read(module, parameter, _held_by(operand))
            for parameter, operand in zip(computation.parameters, operands, strict=True)
        )
        return read + _written(module, computation.root, instruction)
    if opcode in _PARTIAL_READS:
        return 2 * _held_by(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * _held_by(operands[1])
    return sum(map(_held_by, operands)) + _held_by(instruction)


def _read(module: Module, parameter: Instruction, held: float) -> float:
    """Bytes that a fusion reads of one operand of `held` bytes, whose name inside is `parameter`."""
    if not held:
        return 0.0
    read = 0.0
    for user in _users(module, parameter):
        places = [place for place, name in enumerate(user.operands) if name == parameter.name]
        if user.opcode in _PARTIAL_READS and places == [0]:
            read += _size(user)
        elif user.opcode == "dynamic-update-slice" and places == [0]:
            continue  # in place
        elif user.opcode == "bitcast":
            read += _read(module, user, held)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]].parameters
            read += sum(_read(module, inner[place], held) for place in places)
        else:
            return held
    return min(read, held)


def _written(module: Module, root: Instruction, result: Instruction) -> float:
    """Bytes that a fusion with this root writes as `result`."""
    while root.opcode == "bitcast":
        (root,) = module.operands(root)
    if root.opcode == "dynamic-update-slice" and _held_by(result):
        return _size(module.operands(root)[1])
    return _held_by(result)


def _users(module: Module, instruction: Instruction) -> list[Instruction]:
    siblings = module.computations[instruction.computation].instructions.values()
    return [other for other in siblings if instruction.name in other.operands]


def _size(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes)


def _held_by(instruction: Instruction) -> float:
    return sum(_held(shape) for shape in instruction.shapes)


def _held(shape: Shape) -> float:
    return shape.bytes if shape.main_memory else 0.0
