"""What a training step will cost on devices that are not there: the real step, compiled ahead of time and looked at.

Nothing is allocated and nothing runs. The compiler's word on memory is the truth for the topology; the time is a
roofline:

    busy = max(sum over instructions of max(FLOPs / peak, bytes / memory bandwidth), all bytes / memory bandwidth)
    interconnect = sum over collectives of bytes / bandwidth of the links that the group can use

where the first sum leaves out copies that run beside other instructions. A step takes between the larger of the two,
all communication overlapped, and their sum. It is an optimist's figure: no instruction reaches its roof.
"""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from retro_jax import machine
from retro_jax.config import TrainConfig
from retro_jax.parallel import rules
from retro_jax.parallel.chips import Chip
from retro_jax.parallel.costs import Collective, Traffic, Work, collectives, traffic, work
from retro_jax.parallel.hlo import parse, trip_counts
from retro_jax.parallel.layout import check_coverage
from retro_jax.parallel.mesh import check_batch, create_mesh
from retro_jax.parallel.topology import Topology, topology_devices
from retro_jax.training.flops import hardware_flops, step_flops
from retro_jax.training.inputs import abstract_batch
from retro_jax.training.loss import unscored_labels
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.retrofit import trains
from retro_jax.training.state import ModelPlan, named_params, plan_model, plan_state
from retro_jax.training.step import make_train_step

LISTED = 12  # largest collectives and operations that a forecast names


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of main memory on each chip.

    Attributes:
      limit: that a program may use; None when it is not known (CPU).
      arguments, outputs: of the step: state and batch; the new state and metrics.
      aliased: outputs that take the place of arguments (the donated state).
      temporaries, code: what the step needs besides.
      peak: all together; when the compiler refused the program, what it said the program needs (None: it did not say).
    """

    limit: float | None
    peak: float | None
    arguments: float = 0.0
    outputs: float = 0.0
    aliased: float = 0.0
    temporaries: float = 0.0
    code: float = 0.0

    @property
    def fits(self) -> bool:
        return self.limit is None or (self.peak is not None and self.peak <= self.limit)


class Operation(NamedTuple):
    """All instructions from one place of the Python program: seconds (None on CPU), FLOPs and bytes of a step."""

    op_name: str
    seconds: float | None
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one step does and how long it should take.

    Attributes:
      hardware_flops: executed by all chips together, counted in the compiled program.
      memory_bytes: of main memory that each chip reads and writes.
      interconnect: bytes that each chip sends, by kind of collective.
      busy_seconds, interconnect_seconds: see the module; None on CPU devices and for several slices, as the figures of
        the one and of the network between the others are not known.
      mfu: model FLOPs utilisation (causal count) when communication is all overlapped, and when none is.
      tokens_per_second: target tokens, at the same two.
      largest_collectives: those that send most; equal ones from one place of the program as one.
      largest_operations: the places of the program that take most time (FLOPs on CPU devices).
      loops_of_unknown_length: counted as one trip; FLOPs and bytes are too low when there are any.
    """

    hardware_flops: float
    memory_bytes: float
    interconnect: dict[str, Traffic]
    busy_seconds: float | None
    interconnect_seconds: float | None
    mfu: tuple[float, float] | None
    tokens_per_second: tuple[float, float] | None
    largest_collectives: tuple[Collective, ...]
    largest_operations: tuple[Operation, ...]
    loops_of_unknown_length: tuple[str, ...]

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """With all communication overlapped, and with none."""
        if self.busy_seconds is None or self.interconnect_seconds is None:
            return None
        return max(self.busy_seconds, self.interconnect_seconds), self.busy_seconds + self.interconnect_seconds


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One configuration on one topology.

    Attributes:
      topology, chips, mesh: where.
      settings: what memory depends on: batch size, micro-batches, remat and the like.
      parameters: how many.
      parameters_replicated: share of their bytes that lies whole on every chip.
      model_flops: of a step over all chips, causal count and full count.
      hardware_flops_closed_form: what `training.flops.hardware_flops` says.
      compile_seconds: tracing and compiling.
      memory: bytes on each chip.
      costs: None when the compiler refused the program for want of memory.
      versions: of what compiled it.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    parameters: int
    parameters_replicated: float
    model_flops: tuple[float, float]
    hardware_flops_closed_form: float
    compile_seconds: float
    memory: Memory
    costs: Costs | None
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        return self.costs is not None and self.memory.fits

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, with what the properties say."""
        values = dataclasses.asdict(self)
        values["fits"] = self.fits
        if self.costs is not None:
            costs = values["costs"]
            costs["step_seconds"] = self.costs.step_seconds
            costs["interconnect"] = {kind: sums._asdict() for kind, sums in self.costs.interconnect.items()}
            costs["largest_operations"] = [operation._asdict() for operation in self.costs.largest_operations]
            costs["largest_collectives"] = [
                {**collective._asdict(), "shapes": [f"{s.dtype}{list(s.dims)}" for s in collective.shapes]}
                for collective in self.costs.largest_collectives
            ]
        return values


def forecast(
    config: TrainConfig,
    topology: Topology,
    *,
    hbm_bytes: float | None = None,
    quick: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Forecast:
    """Compiles the train step of a configuration for a topology.

    Args:
      config: the run; `data.length` is set, `data.sequences` is not looked at.
      topology: the devices.
      hbm_bytes: memory limit of a chip in the place of the real one.
      quick: let the compiler optimise less: several times faster, and memory and time are those of a worse program.
      report: called with what is being done.

    Raises:
      UserError: mesh, batch or topology do not go together.
    """
    mesh = create_mesh(config.mesh, topology_devices(topology))
    check_batch(config, mesh)
    plan = plan_model(config.model, mesh, trains(config))
    check_coverage(named_params(plan), mesh)
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    step = make_train_step(config, plan, optimizer, mesh, unscored=unscored_labels(config.model))
    begun = time.monotonic()
    report("tracing the step")
    lowered = step.lower(plan_state(plan, optimizer, mesh), abstract_batch(config, rules.batch_sharding(mesh)))
    report(f"compiling for {topology.name}, mesh {_written(mesh.shape)}; this takes a minute or more")
    limit = hbm_bytes or (topology.chip and topology.chip.hbm_bytes)
    try:
        compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": -1.0} if quick else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory, costs = Memory(limit, _needed(str(error))), None
    else:
        memory, costs = _memory(compiled.memory_analysis(), limit), _costs(compiled.as_text(), config, topology)
    return Forecast(
        topology=topology.name,
        chips=topology.chips,
        mesh=dict(mesh.shape),
        settings={**_settings(config), "quick": quick},
        parameters=sum(leaf.size for leaf in jax.tree.leaves(plan.params)),
        parameters_replicated=_replicated(plan),
        model_flops=(step_flops(config), step_flops(config, causal=False)),
        hardware_flops_closed_form=hardware_flops(config),
        compile_seconds=time.monotonic() - begun,
        memory=memory,
        costs=costs,
        versions=_versions(topology),
    )


def remedies(config: TrainConfig, plan: Forecast) -> Iterator[tuple[str, TrainConfig]]:
    """Changes that need less memory, the mildest first: each with the flags that make it.

    First what costs no FLOPs: more fsdp in the place of data, or micro-batches, as many as should do. Then
    recomputation, then both. Micro-batches that do not divide the batch, and fsdp that does not divide the widths, are
    left out.

    Args:
      config: the configuration that does not fit.
      plan: its forecast.
    """
    mesh, memory, model = plan.mesh, plan.memory, config.model
    # The optimizer state is split by fsdp; nearly all the rest grows with the sequences of a micro-batch.
    moment = 2 if config.optimizer.moments_dtype == "bfloat16" else 4
    state = plan.parameters * (4 + 2 * moment) / (mesh["fsdp"] * mesh["tensor"])
    excess = math.inf if memory.peak is None else memory.peak - memory.limit
    rest = 0.0 if memory.peak is None else memory.peak - state

    def enough(saved: float, times: int, most: bool) -> bool:
        return most or saved * (1 - 1 / times) >= excess

    widths = {model.width} | (set() if model.is_baseline else {model.encoder_width})
    splits = [
        times
        for times in range(2, mesh["data"] + 1)
        if mesh["data"] % times == 0 and not any(width % (times * mesh["fsdp"]) for width in widths)
    ]
    parts = [
        times
        for times in range(2, config.batch_size + 1)
        if config.batch_size % (times * config.microbatches * mesh["data"] * mesh["fsdp"]) == 0
    ]
    for times in splits:
        if enough(state, times, times == splits[-1]):
            data, fsdp = mesh["data"] // times, mesh["fsdp"] * times
            split = dataclasses.replace(config.mesh, data=data, fsdp=fsdp)
            yield f" --config.mesh.data={data} --config.mesh.fsdp={fsdp}", dataclasses.replace(config, mesh=split)
            break
    for times in parts:
        if enough(rest, times, times == parts[-1]):
            count = times * config.microbatches
            yield f" --config.microbatches={count}", dataclasses.replace(config, microbatches=count)
            break
    flags = ""
    for remat in _REMAT_LADDER[_rung(model.remat) + 1 :]:
        config = dataclasses.replace(config, model=dataclasses.replace(model, remat=remat))
        flags = f" --config.model.remat={remat}"
        yield flags, config
    for times in parts[:2] if flags else ():
        count = times * config.microbatches
        yield f"{flags} --config.microbatches={count}", dataclasses.replace(config, microbatches=count)


# What is kept of a block, from most to least.
_REMAT_LADDER = ("none", "query,key,value,mixed,added,hidden", "query,key,value,mixed", "block")


def _rung(remat: str) -> int:
    if remat in _REMAT_LADDER:
        return _REMAT_LADDER.index(remat)
    kept = len(remat.split(","))
    return next(rung for rung in (1, 2, 3) if rung == 3 or kept >= len(_REMAT_LADDER[rung].split(",")))


def _memory(analysis: Any, limit: float | None) -> Memory:
    arguments, outputs, aliased, temporaries, code = (
        float(getattr(analysis, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp", "generated_code")
    )
    peak = arguments + outputs - aliased + temporaries + code
    return Memory(limit, peak, arguments, outputs, aliased, temporaries, code)


def _costs(text: str, config: TrainConfig, topology: Topology) -> Costs:
    module = parse(text)
    found, each, chip = collectives(module), work(module), topology.chip
    flops, moved = sum(one.times * one.flops for one in each), sum(one.times * one.bytes for one in each)
    busy = sent = mfu = tokens = None
    if chip is not None and topology.slices == 1:
        peak = _peak(chip, config)
        busy = max(sum(_seconds(one, chip, peak) for one in each if not one.asynchronous), moved / chip.hbm_bandwidth)
        sent = sum(c.times * c.bytes / topology.interconnect_bandwidth(c.group_size) for c in found if c.group_size > 1)
        bounds = max(busy, sent), busy + sent
        mfu = tuple(step_flops(config) / (peak * topology.chips * bound) for bound in bounds)
        tokens = tuple(config.batch_size * config.data.length / bound for bound in bounds)
    return Costs(
        hardware_flops=topology.chips * flops,
        memory_bytes=moved,
        interconnect=traffic(found),
        busy_seconds=busy,
        interconnect_seconds=sent,
        mfu=mfu,
        tokens_per_second=tokens,
        largest_collectives=_largest_collectives(found),
        largest_operations=_largest_operations(each, chip, config),
        loops_of_unknown_length=tuple(name for name, trips in trip_counts(module).items() if trips is None),
    )


def _peak(chip: Chip, config: TrainConfig) -> float:
    return chip.bf16_flops if config.model.dtype == "bfloat16" else chip.float32_flops


def _seconds(one: Work, chip: Chip, peak: float) -> float:
    return one.times * max(one.flops / peak, one.bytes / chip.hbm_bandwidth)


def _largest_collectives(found: list[Collective]) -> tuple[Collective, ...]:
    times = collections.Counter()
    for one in found:
        times[one._replace(times=0)] += one.times
    merged = [one._replace(times=count) for one, count in times.items()]
    return tuple(sorted(merged, key=lambda one: -one.times * one.bytes)[:LISTED])


def _largest_operations(each: list[Work], chip: Chip | None, config: TrainConfig) -> tuple[Operation, ...]:
    seconds, flops, moved = (collections.Counter() for _ in range(3))
    for one in each:
        flops[one.op_name] += one.times * one.flops
        moved[one.op_name] += one.times * one.bytes
        if chip is not None and not one.asynchronous:
            seconds[one.op_name] += _seconds(one, chip, _peak(chip, config))
    largest = (flops if chip is None else seconds).most_common(LISTED)
    return tuple(Operation(name, seconds[name] if chip else None, flops[name], moved[name]) for name, _ in largest)


def _needed(message: str) -> float | None:
    """Bytes that a program needs, from the TPU compiler's refusal; None when it names none."""
    found = re.search(r"(?:Used|\()\s*([\d.]+)([KMGT])", message)
    return float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])) if found else None


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {
        "batch_size": config.batch_size,
        "length": config.data.length,
        "neighbours": 0 if config.model.is_baseline else config.data.neighbours,
        "microbatches": config.microbatches,
        "remat": config.model.remat,
        "vocab_block": config.vocab_block,
        "dtype": config.model.dtype,
        "moments_dtype": config.optimizer.moments_dtype,
    }


def _replicated(plan: ModelPlan) -> float:
    leaves = [
        (leaf.size * leaf.dtype.itemsize, leaf.sharding.is_fully_replicated) for leaf in jax.tree.leaves(plan.params)
    ]
    return sum(size for size, whole in leaves if whole) / sum(size for size, _ in leaves)


def _versions(topology: Topology) -> dict[str, str]:
    names = ("jax", "jaxlib") if topology.chip is None else ("jax", "jaxlib", "libtpu")
    return machine.versions(names)


def _written(sizes: Any) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in dict(sizes).items())
