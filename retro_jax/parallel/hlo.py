"""The text of a compiled program: its computations, and how often each instruction runs.

XLA's own cost analysis counts the body of a loop once. Here the trip count of a loop stands in the text, or follows
from its condition, start and step. The text is that of `jax.stages.Compiled.as_text()`: after partitioning, so all
shapes are those of one device. What the instructions cost is counted by `retro_jax.parallel.costs`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Shape(NamedTuple):
    """One array: element type, dimensions, and whether it lies in the main memory (HBM), not in one on the chip."""

    dtype: str
    dims: tuple[int, ...]
    main_memory: bool = True

    @property
    def bytes(self) -> float:
        bits = 8 if self.dtype == "pred" else int(_group(r"(\d+)", self.dtype) or 0)  # tokens have no size
        return math.prod(self.dims) * bits / 8


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name, opcode, operands: as they stand there, without %.
      shapes: of the result; several when it is a tuple.
      text: what follows the opcode's parenthesis: operands and attributes.
      computation: name of the computation that it stands in.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    computation: str

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, as JAX recorded it; empty when it did not."""
        return _group(r'op_name="([^"]*)"', self.text)

    def called(self, attribute: str) -> tuple[str, ...]:
        """Names of the computations behind `calls=`, `body=`, `branch_computations={...}` and the like."""
        return tuple(re.findall(r"[\w.\-]+", _group(rf"\b{attribute}=(\{{[^}}]*\}}|[^,\s]+)", self.text)))


class Computation(NamedTuple):
    """Instructions by name, the one whose value the computation gives, and the parameters in order."""

    instructions: Mapping[str, Instruction]
    root: Instruction
    parameters: tuple[Instruction, ...]


class Module(NamedTuple):
    """A program: computations by name, the one it starts with, and how many devices it is split over."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int = 1

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results an instruction takes."""
        siblings = self.computations[instruction.computation].instructions
        return [siblings[name] for name in instruction.operands]


class Execution(NamedTuple):
    """An instruction that runs `times` times in one run of the program.

    Attributes:
      frame: name of the innermost computation around it that is not a fusion's.
      fused: it is a part of a fusion.
    """

    instruction: Instruction
    times: float
    frame: str
    fused: bool


def parse(text: str) -> Module:
    """Reads a program's text.

    Raises:
      ValueError: it has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            instructions: dict[str, Instruction] = {}
            root = None
        elif line == "}" and name:
            parameters = sorted(
                (i for i in instructions.values() if i.opcode == "parameter"), key=lambda i: int(i.text.split(")")[0])
            )
            computations[name] = Computation(instructions, root, tuple(parameters))
            name = ""
        elif name and (instruction := _instruction(line.strip(), name)):
            instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                root = instruction
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    devices = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text, re.MULTILINE)
    return Module(computations, entry, int(devices[1]) if devices else 1)


def executions(module: Module) -> Iterator[Execution]:
    """Every instruction with the number of its executions; all branches of a conditional count as taken.

    A loop whose trip count is unknown (see `trip_counts`) counts as running once. Computations that only combine two
    elements (of reductions and sorts) are left out.
    """
    return _walk(module, module.entry, 1.0, module.entry, fused=False)


def trip_counts(module: Module) -> dict[str, int | None]:
    """Executions of each while instruction's body, by its name; None where it is not a constant that can be read."""
    return {
        instruction.name: _trip_count(module, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    }


def _walk(module: Module, name: str, times: float, frame: str, *, fused: bool) -> Iterator[Execution]:
    for instruction in module.computations[name].instructions.values():
        yield Execution(instruction, times, frame, fused)
        match instruction.opcode:
            case "fusion":
                for called in instruction.called("calls"):
                    yield from _walk(module, called, times, frame, fused=True)
            case "call" | "async-start":
                for called in (*instruction.called("to_apply"), *instruction.called("calls")):
                    yield from _walk(module, called, times, frame, fused=fused)
            case "while":
                trips = _trip_count(module, instruction)
                for body in instruction.called("body"):
                    yield from _walk(module, body, times * (1 if trips is None else trips), body, fused=False)
            case "conditional":
                for attribute in ("branch_computations", "true_computation", "false_computation"):
                    for branch in instruction.called(attribute):
                        yield from _walk(module, branch, times, branch, fused=False)


def _instruction(line: str, computation: str) -> Instruction | None:
    """`[ROOT ]%name = type opcode(operands), attributes`."""
    left, separator, right = line.removeprefix("ROOT ").partition(" = ")
    if not separator:
        return None
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opcode, _, text = rest.partition("(")
    operands = text[: _closing("(" + text, 0) - 1]
    shapes = tuple(
        Shape(dtype, _numbers(dims), "S(" not in layout)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", kind)
    )
    names = () if opcode in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", operands))
    return Instruction(left.removeprefix("%"), opcode, shapes, names, text, computation)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"a parenthesis is not closed in {text[:200]!r}")


class _Element(NamedTuple):
    """Element `index` of a loop's state at the start of an iteration, plus a constant."""

    index: int
    plus: int = 0


class _Comparison(NamedTuple):
    left: "_Value"
    right: "_Value"
    direction: str


_Value = int | _Element | _Comparison | None  # None: something else
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


def _trip_count(module: Module, loop: Instruction) -> int | None:
    """Of `for (i = start; i < limit; i += step)`, the only loops that JAX and XLA make of scans."""
    known = _group(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known)
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    compared = _value(module, module.computations[condition].root)
    if not isinstance(compared, _Comparison):
        return None
    left, right, direction = compared
    if isinstance(left, int):
        left, right, direction = right, left, _MIRRORED.get(direction, direction)
    limit = _initial(module, loop, right.index) if isinstance(right, _Element) else right
    if not isinstance(left, _Element) or not isinstance(limit, int):
        return None
    start = _initial(module, loop, left.index)
    after = _carried(module, body, left.index)
    if not isinstance(start, int) or not isinstance(after, _Element) or after.index != left.index or not after.plus:
        return None
    limit += {"LE": 1, "GE": -1}.get(direction, 0) - left.plus
    return max(0, math.ceil((limit - start) / after.plus)) if direction != "EQ" else None


def _value(module: Module, instruction: Instruction, bound: tuple[_Value, ...] | None = None) -> _Value:
    """What an integer or a comparison is, in terms of the state of the loop that its computation is a part of.

    Args:
      module: the program.
      instruction: the one in question.
      bound: values of the computation's parameters when it is a fusion's; None for a part of a loop.
    """
    operands = module.operands(instruction)
    match instruction.opcode:
        case "constant":
            found = re.match(r"(-?\d+)\)", instruction.text)
            return int(found[1]) if found else None
        case "parameter" if bound is not None:
            return bound[int(instruction.text.split(")")[0])]
        case "get-tuple-element" if operands[0].opcode == "parameter" and bound is None:
            return _Element(int(_group(r"index=(\d+)", instruction.text)))
        case "copy" | "bitcast" | "convert" | "copy-start" | "copy-done" | "reshape":
            return _value(module, operands[0], bound)
        case "compare":
            left, right = (_value(module, operand, bound) for operand in operands)
            return _Comparison(left, right, _group(r"direction=(\w+)", instruction.text))
        case "add" | "subtract":
            return _sum(*(_value(module, operand, bound) for operand in operands), instruction.opcode == "subtract")
        case "fusion" | "call":
            (called,) = (*instruction.called("calls"), *instruction.called("to_apply"))
            values = tuple(_value(module, operand, bound) for operand in operands)
            return _value(module, module.computations[called].root, values)
    return None


def _sum(left: _Value, right: _Value, minus: bool) -> _Value:
    if isinstance(left, int) and isinstance(right, _Element) and not minus:
        left, right = right, left
    if not isinstance(right, int):
        return None
    right = -right if minus else right
    if isinstance(left, int):
        return left + right
    return left._replace(plus=left.plus + right) if isinstance(left, _Element) else None


def _carried(module: Module, body: str, index: int) -> _Value:
    """Element `index` of a loop's state after an iteration."""
    root = module.computations[body].root
    return _value(module, module.operands(root)[index]) if root.opcode == "tuple" else None


def _initial(module: Module, loop: Instruction, index: int) -> _Value:
    """Element `index` of a loop's state before its first iteration, when it is a constant."""
    (state,) = module.operands(loop)
    if state.opcode != "tuple":
        return None
    value = _value(module, module.operands(state)[index])
    if not isinstance(value, _Element):
        return value
    # An element of the state of the loop around this one: constant when that loop hands it on as it is.
    for computation in module.computations.values():
        for outer in computation.instructions.values():
            if outer.opcode == "while" and loop.computation in outer.called("body"):
                if _carried(module, loop.computation, value.index) != _Element(value.index):
                    return None
                return _sum(_initial(module, outer, value.index), value.plus, minus=False)
    return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _group(pattern: str, text: str) -> str:
    """The first group of a pattern's first match, empty without one."""
    found = re.search(pattern, text)
    return found[1] if found else ""
