"""The benchmark `sample`: generation with retrieval, ours and a peer's in turn, and the lines that tell of them."""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import children, retro_pytorch
from retro_jax.config import DataConfig, MeshConfig, RetroConfig, TrainConfig, to_dict

PEERS = ("retro-pytorch",)
PROMPT = 64
LENGTHS = (64, 128, 256, 512, 1024, 2048)
PEER_LENGTHS = (64, 128, 256, 512)
BATCH_SIZES = (1, 8)
FLAT_TO = (512, 2048)
PEER_MODULE = "benchmarks.retro_pytorch_sample"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, and where.

    Attributes:
      lengths: new tokens.
      batch_sizes: prompts continued together.
      prompt: tokens of each prompt, the start token included.
      k: neighbours of a chunk.
      top_k: share of the vocabulary that is drawn from; the peer's own sampler keeps a tenth.
      rounds: every side is run so often, the sides in turn; the best of each counts.
      cores: processor cores a side may use; 0 for all.
      database, embedder: where our neighbours come from; empty for random ones, as the peer's are.
    """

    lengths: Sequence[int] = LENGTHS
    batch_sizes: Sequence[int] = BATCH_SIZES
    prompt: int = PROMPT
    k: int = 2
    top_k: float = 0.1
    rounds: int = 1
    cores: int = 0
    database: str = ""
    embedder: str = ""

    def job(self) -> dict[str, Any]:
        """What a process is told of it."""
        names = ("lengths", "batch_sizes", "prompt", "k", "top_k", "cores", "database", "embedder")
        return {name: getattr(self, name) for name in names}


def alone(model: RetroConfig, plan: Plan, mesh: MeshConfig) -> list[dict[str, Any]]:
    """A line for each number of prompts and new tokens."""
    rounds = [_ours(model, plan, mesh) for _ in range(plan.rounds)]
    return [_line(model, plan, *cases) for cases in zip(*rounds, strict=True)]


def against_peer(model: RetroConfig, plan: Plan, python: str) -> list[dict[str, Any]]:
    """Our lines, the peer's, and a comparison for each number of prompts and new tokens that both were given.

    Args:
      model: ours; the peer's has the same shapes.
      plan: how much is measured.
      python: the peer's interpreter.
    """
    config = TrainConfig(
        model=model, data=DataConfig(length=plan.prompt + max(plan.lengths), neighbours=plan.k), batch_size=1
    )
    job = {**retro_pytorch.job(config, compiled=False), **plan.job()}
    ours, theirs = [], []
    for _ in range(plan.rounds):
        ours.append(_ours(model, plan, MeshConfig(), {"JAX_PLATFORMS": "cpu"}))
        theirs.append(children.run(python, PEER_MODULE, job, retro_pytorch.ENVIRONMENT)["cases"])
    lines = [_line(model, plan, *cases) for cases in zip(*ours, strict=True)]
    peers = [_peer_line(model, plan, *cases) for cases in zip(*theirs, strict=True)]
    return [*lines, *peers, *map(_comparison, lines, peers)]


def flatness(seconds_by_position: dict[str, float], last: int) -> float:
    """Slowest over fastest time a token, of the positions up to `last`."""
    times = [seconds for position, seconds in seconds_by_position.items() if int(position) <= last]
    return max(times) / min(times)


def _ours(
    model: RetroConfig, plan: Plan, mesh: MeshConfig, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    job = {**plan.job(), "model": to_dict(model), "mesh": to_dict(mesh)}
    return children.run(sys.executable, "benchmarks.sample_step", job, environment)["cases"]


def _line(model: RetroConfig, plan: Plan, *rounds: dict[str, Any]) -> dict[str, Any]:
    best = max(rounds, key=lambda each: each["tokens_per_second"])
    positions = {
        position: min(each["token_seconds_by_position"][position] for each in rounds)
        for position in best["token_seconds_by_position"]
    }
    return {
        "benchmark": "sample",
        "prompt": plan.prompt,
        "k": plan.k,
        "vocab_size": model.vocab_size,
        "dtype": model.dtype,
        "positions": model.positions,
        "neighbours": plan.database or "random",
        "rounds": len(rounds),
        **best,
        "first_token_seconds": statistics.median(each["first_token_seconds"] for each in rounds),
        "token_seconds_by_position": positions,
        "slowest_to_fastest_position": {
            last: flatness(positions, last) for last in FLAT_TO if any(int(position) <= last for position in positions)
        },
    }


def _peer_line(model: RetroConfig, plan: Plan, *rounds: dict[str, Any]) -> dict[str, Any]:
    best = max(rounds, key=lambda each: each["tokens_per_second"])
    return {
        "benchmark": "peer",
        "peer": PEERS[0],
        "prompt": plan.prompt,
        "k": plan.k,
        "vocab_size": model.vocab_size,
        "dtype": model.dtype,
        "rounds": len(rounds),
        **best,
    }


def _comparison(line: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    same = ("batch_size", "new_tokens")
    assert all(line[name] == peer[name] for name in same)
    return {
        "benchmark": "comparison",
        "peer": PEERS[0],
        **{name: line[name] for name in same},
        "speed_ratio_to_peer": line["tokens_per_second"] / peer["tokens_per_second"],
        "ours_tokens_per_second": line["tokens_per_second"],
        "peer_tokens_per_second": peer["tokens_per_second"],
    }
