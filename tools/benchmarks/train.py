"""The benchmark `train`: our step, the baseline's or a peer's in turn, and the lines that tell of them."""

import dataclasses
import sys
from typing import Any

from benchmarks import children, retro_pytorch
from retro_jax.config import MeshConfig, RetroConfig, TrainConfig, to_dict
from retro_jax.data.stage import fingerprint
from retro_jax.errors import UserError
from retro_jax.training.flops import hardware_flops, processed_tokens, step_flops

PEERS = ("retro-pytorch",)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"preset": "tiny", "vocab_size": 8192, "length": 512, "batch_size": 4, "k": 2},
    "small": {"preset": "172m", "vocab_size": 32_000, "length": 1024, "batch_size": 1, "k": 2},
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured, and where.

    Attributes:
      steps: steps that count, over all rounds.
      warmup: steps before them, in every round.
      rounds: every side is run so often, the sides in turn.
      cores: processor cores a side may use; 0 for all.
      cpu_devices: devices that JAX makes of the CPU; 0 for its own choice.
    """

    steps: int
    warmup: int
    rounds: int
    cores: int
    cpu_devices: int

    def job(self) -> dict[str, int]:
        """What a process is told of it."""
        return {"steps": -(-self.steps // self.rounds), "warmup": self.warmup, "cores": self.cores}


def parse_mesh(text: str) -> MeshConfig:
    """`data=2,fsdp=1` to a mesh; axes that are not named keep their default.

    Raises:
      UserError: what is written is no axis with a number.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in {field.name for field in dataclasses.fields(MeshConfig)} or not size.lstrip("-").isdigit():
            raise UserError(f"mesh {text!r}: {part!r} is not one of data, fsdp, tensor, context with =NUMBER")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def against_baseline(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """Our step, and that of the baseline with the same decoder.

    Returns:
      The line of our step, with the ratio of the two.
    """
    baseline = dataclasses.replace(config, model=dataclasses.replace(config.model, cca_layers=()))
    ours, theirs = [], []
    for _ in range(plan.rounds):
        ours.append(measure(config, plan))
        theirs.append(measure(baseline, plan))
    line = _line(config, ours)
    median = children.summary(theirs, 1, 1)["step_seconds_median"]
    return {
        **line,
        "baseline_step_seconds_median": median,
        "step_time_ratio_to_baseline": line["step_seconds_median"] / median,
    }


def alone(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """The line of our step."""
    return _line(config, [measure(config, plan) for _ in range(plan.rounds)])


def against_peer(config: TrainConfig, plan: Plan, python: str) -> list[dict[str, Any]]:
    """Our step and the peer's, eager and compiled, in turn.

    Args:
      config: of our step; the peer's has the same shapes.
      plan: how much is measured.
      python: the peer's interpreter.

    Returns:
      The line of our step, one for each way that the peer ran, and the comparison with the better of them.
    """
    ways = {"eager": False, "compiled": True}
    jobs = {way: retro_pytorch.job(config, compiled=compiled) for way, compiled in ways.items()}
    left_out = retro_pytorch.compiler_missing()
    if left_out:
        del jobs["compiled"]
    ours, theirs = [], {way: [] for way in jobs}
    for _ in range(plan.rounds):
        ours.append(measure(config, plan, {"JAX_PLATFORMS": "cpu"}))
        for way, job in jobs.items():
            theirs[way].append(
                children.run(python, retro_pytorch.MODULE, {**job, **plan.job()}, retro_pytorch.ENVIRONMENT)
            )
    line = _line(config, ours)
    lines = {way: _peer_line(config, way, rounds) for way, rounds in theirs.items()}
    best = max(lines, key=lambda way: lines[way]["target_tokens_per_second"])
    compared = ("target_tokens_per_second", "peak_memory_bytes")
    comparison = {
        "benchmark": "comparison",
        "peer": PEERS[0],
        "peer_best": best,
        "dtype": config.model.dtype,
        "batch_size": config.batch_size,
        "length": config.data.length,
        "k": config.data.neighbours,
        "speed_ratio_to_peer": line[compared[0]] / lines[best][compared[0]],
        "memory_ratio_to_peer": line[compared[1]] / lines[best][compared[1]],
        **{f"ours_{name}": line[name] for name in compared},
        **{f"peer_{way}_{name}": lines[way][name] for name in compared for way in lines},
        **({"peer_compiled_left_out": left_out} if left_out else {}),
    }
    return [line, *lines.values(), comparison]


def measure(config: TrainConfig, plan: Plan, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """One round of our step in a process of its own; `environment` is added to this process's variables."""
    job = {**plan.job(), "cpu_devices": plan.cpu_devices, "config": to_dict(config)}
    return children.run(sys.executable, "benchmarks.train_step", job, environment)


def step_line(config: TrainConfig, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured of our step, over its rounds: settings, figures, and where."""
    model, first = config.model, rounds[0]
    return {
        "config": fingerprint(to_dict(config)),
        "batch_size": config.batch_size,
        "length": config.data.length,
        "k": config.data.neighbours,
        "vocab_size": model.vocab_size,
        "dtype": model.dtype,
        "remat": model.remat,
        "scan_layers": model.scan_layers,
        "vocab_block": config.vocab_block,
        "microbatches": config.microbatches,
        "positions": model.positions,
        "parameters": first["parameters"],
        "mesh": first["mesh"],
        "devices": f"{first['devices']} x {first['device_kind']}",
        **children.summary(rounds, config.batch_size * config.data.length, processed_tokens(config)),
        "compile_seconds": max(each["compile_seconds"] for each in rounds),
        "compile_peak_memory_bytes": max(each["compile_peak_memory_bytes"] for each in rounds),
        "peak_memory_of": "process" if first["platform"] == "cpu" else "device",
    }


def _line(config: TrainConfig, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    line, first = step_line(config, rounds), rounds[0]
    median, peak = line["step_seconds_median"], first["peak_flops"]
    work = {"mfu": step_flops(config), "mfu_all_pairs": step_flops(config, causal=False), "hfu": hardware_flops(config)}
    return {
        "benchmark": "train",
        **line,
        "model_gflop": work["mfu"] / 1e9,
        "hardware_gflop": work["hfu"] / 1e9,
        "model_gflops_per_second": work["mfu"] / 1e9 / median,
        "hardware_gflops_per_second": work["hfu"] / 1e9 / median,
        **{name: peak and flops / (median * peak * first["devices"]) for name, flops in work.items()},
    }


def _peer_line(config: TrainConfig, way: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    figures = children.summary(rounds, config.batch_size * config.data.length, processed_tokens(config))
    return {
        "benchmark": "peer",
        "peer": PEERS[0],
        "way": way,
        "batch_size": config.batch_size,
        "length": config.data.length,
        "k": config.data.neighbours,
        "vocab_size": config.model.vocab_size,
        "dtype": config.model.dtype,
        "heads": rounds[0]["heads"],
        "parameters": rounds[0]["parameters"],
        **figures,
        "compile_seconds": max(_beyond(each["warmup_seconds"], figures["step_seconds_median"]) for each in rounds),
        "torch": rounds[0]["torch"],
    }


def _beyond(seconds: list[float], usual: float) -> float:
    """What steps took longer than usual: torch compiles in the first ones, more than once."""
    return sum(max(0.0, each - usual) for each in seconds)


def model_of(preset: str, vocab_size: int, **changes: Any) -> RetroConfig:
    """The preset with a vocabulary, 0 for its own, and with `changes`.

    Raises:
      UserError: a preset that is not known, or a baseline, which is measured beside its RETRO.
    """
    sized = {"vocab_size": vocab_size} if vocab_size else {}
    model = RetroConfig.preset(preset, **sized, **changes)
    if model.is_baseline:
        raise UserError("--preset names a RETRO; its baseline is measured with it")
    return model
