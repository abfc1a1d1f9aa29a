"""Plans a training run on devices that are not there: compiles its real step for them and says what it will cost.

    python tools/plan_topology.py --config=experiments/paper.py:7.5b --topology=v4:8x8x8 --output=plan.json
    python tools/plan_topology.py --config=experiments/tiny.py --topology=cpu:8 --config.mesh.tensor=2

Topologies: v4:8x8x8, v5p:4x4x8, v5e:16x16, v6e:16x16, 2xv5e:16x16 (two slices), cpu:8. TPU ones need the TPU compiler
(pip install 'jax[tpu]') but no TPU. The compiler takes minutes of processor time; --quick is for a first look. Exits
with 1 when the step does not fit into a chip's memory; before that it looks for the smallest change with which it does,
compiling each. How the time is estimated: retro_jax/training/forecast.py.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from retro_jax import program
from retro_jax.config import TrainConfig, from_config_dict
from retro_jax.errors import UserError
from retro_jax.parallel.costs import Collective
from retro_jax.parallel.topology import WITHOUT_TPU, Topology, parse_topology
from retro_jax.training.forecast import Forecast, forecast, remedies

DEFAULT_LENGTH = 2048
SECONDS_BETWEEN_LINES = 15.0

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, a file of experiments/; --config.a.b=value changes it."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Devices to plan for: v4:8x8x8, v5e:16x16, cpu:8, ...")
_LENGTH = flags.DEFINE_integer(
    "length", 0, f"Tokens of a sequence; 0 for the recipe's data.length, or {DEFAULT_LENGTH} where that is 0.", 0
)
_OUTPUT = flags.DEFINE_string("output", None, "File for the plan as JSON.")
_HBM_GIB = flags.DEFINE_float("hbm_gib", 0, "Memory limit of a chip in GiB; 0 for the real one.", 0)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Optimise less: compiles several times faster, for a first look; memory and time come out higher."
)
_CANDIDATES = flags.DEFINE_integer("candidates", 4, "Changes tried at most when the step does not fit.", 0)
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    os.environ.update(WITHOUT_TPU)
    jax.config.update("jax_platforms", "cpu")
    topology = parse_topology(_TOPOLOGY.value)
    config = from_config_dict(TrainConfig, program.loaded(_CONFIG.value))
    length = _LENGTH.value or config.data.length or DEFAULT_LENGTH
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, length=length))
    limit = _HBM_GIB.value * 2**30 or None

    plan = _reported(config, topology, limit)
    print(table(plan))
    result = plan.to_json()
    if not plan.fits:
        change, smaller = _search(config, topology, limit, plan)
        result["remedy"] = smaller and {"flags": change.split(), "plan": smaller.to_json()}
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not plan.fits:
        raise UserError(_advice(plan, change if smaller else None))


def table(plan: Forecast) -> str:
    """The plan for people."""
    memory, costs = plan.memory, plan.costs
    rows = [
        ("topology", f"{plan.topology}, {plan.chips} chips, mesh {_pairs(plan.mesh)}"),
        ("settings", _pairs(plan.settings)),
        ("parameters", f"{plan.parameters:,}, {plan.parameters_replicated:.2%} of their bytes on every chip"),
        ("compiled in", f"{plan.compile_seconds:.0f} s"),
        ("memory of a chip", f"{_gib(memory.peak)} of {_gib(memory.limit)}: {'fits' if plan.fits else 'DOES NOT FIT'}"),
    ]
    if costs is not None:
        rows += [
            ("  arguments", _gib(memory.arguments)),
            ("  outputs", f"{_gib(memory.outputs)}, {_gib(memory.aliased)} of them in place"),
            ("  temporaries", _gib(memory.temporaries)),
            ("  code", _gib(memory.code)),
        ]
    rows.append(("FLOPs of a step", f"model {plan.model_flops[0]:.4g} (causal), {plan.model_flops[1]:.4g} (full)"))
    if costs is not None:
        share = costs.hardware_flops / plan.model_flops[0]
        rows += [
            ("  executed", f"{costs.hardware_flops:.4g}, {share:.3f} of the model's (causal)"),
            ("memory traffic", f"{_gib(costs.memory_bytes)} a chip"),
            ("interconnect", f"{_gib(sum(t.bytes for t in costs.interconnect.values()))} sent by a chip"),
        ]
        for kind, sums in costs.interconnect.items():
            rows.append(
                (f"  {kind}", f"{_gib(sums.bytes)}, {sums.executions:,.0f} times, {sums.instructions} in the program")
            )
        rows += [(f"  largest {n + 1}", _written(c)) for n, c in enumerate(costs.largest_collectives[:5])]
        if costs.step_seconds:
            fast, slow = costs.step_seconds
            rows += [
                ("busy", f"{costs.busy_seconds:.3f} s"),
                *((f"  {one.seconds:.3f} s", one.op_name or "(copies)") for one in costs.largest_operations[:5]),
                ("communicating", f"{costs.interconnect_seconds:.3f} s"),
                ("step, roofline", f"{fast:.3f} s overlapped, {slow:.3f} s not"),
                ("MFU, causal", f"{costs.mfu[0]:.1%} overlapped, {costs.mfu[1]:.1%} not"),
                (
                    "target tokens/s",
                    f"{costs.tokens_per_second[0]:,.0f} overlapped, {costs.tokens_per_second[1]:,.0f} not",
                ),
            ]
        elif not plan.topology.startswith("cpu"):
            rows.append(("WARNING", "no time is estimated: the network between slices is not modelled"))
        if costs.loops_of_unknown_length:
            rows.append(("WARNING", f"loops counted once: {', '.join(costs.loops_of_unknown_length)}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _search(
    config: TrainConfig, topology: Topology, limit: float | None, plan: Forecast
) -> tuple[str, Forecast | None]:
    """The first of the remedies that fits: its flags and its plan."""
    for number, (change, smaller) in enumerate(remedies(config, plan)):
        if number == _CANDIDATES.value:
            break
        print(f"does not fit; trying{change}", file=sys.stderr, flush=True)
        candidate = _reported(smaller, topology, limit)
        if candidate.fits:
            print(f"\nwith{change}:\n{table(candidate)}")
            return change, candidate
        print(f"needs {_gib(candidate.memory.peak)} of {_gib(candidate.memory.limit)}", file=sys.stderr, flush=True)
    return "", None


def _advice(plan: Forecast, change: str | None) -> str:
    problem = f"needs {_gib(plan.memory.peak)} of memory on each chip, which has {_gib(plan.memory.limit)}"
    if change is None:
        return f"{problem}; none of the {_CANDIDATES.value} changes tried fits: take more chips or a smaller batch_size"
    return f"{problem}; it fits with{change}"


def _reported(config: TrainConfig, topology: Topology, limit: float | None) -> Forecast:
    with _Heartbeat() as report:
        return forecast(config, topology, hbm_bytes=limit, quick=_QUICK.value, report=report)


class _Heartbeat:
    """Says on stderr what is being done, and now and then that it still is: the compiler tells nothing."""

    def __enter__(self) -> Callable[[str], None]:
        self._begun, self._doing, self._done = time.monotonic(), "", threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self._report

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _report(self, doing: str) -> None:
        self._doing = doing
        self._print()

    def _beat(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LINES):
            self._print()

    def _print(self) -> None:
        print(f"{time.monotonic() - self._begun:5.0f} s: {self._doing}", file=sys.stderr, flush=True)


def _written(one: Collective) -> str:
    shapes = ", ".join(f"{shape.dtype}{list(shape.dims)}" for shape in one.shapes[:2])
    more = ", ..." if len(one.shapes) > 2 else ""
    size = _gib(one.times * one.bytes)
    return f"{size}: {one.kind} of {shapes}{more} over {one.group_size}, {one.times:.0f} times, {one.op_name}"


def _pairs(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _gib(count: float | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.3f} MiB"


if __name__ == "__main__":
    program.run(main)
