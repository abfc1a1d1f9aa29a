"""The benchmark `retrofit`: training encoder and chunked cross-attention alone, with LoRA too, and the whole model."""

import dataclasses
from typing import Any

from benchmarks import train
from retro_jax.config import TrainConfig

_COMPARED = ("target_tokens_per_second", "peak_memory_bytes")


def lines(config: TrainConfig, plan: train.Plan, lora_rank: int) -> list[dict[str, Any]]:
    """The three ways of training the same model, in turn, each in a process of its own.

    Args:
      config: of full training. Parameters are random in all three: what they are changes neither time nor memory.
      plan: how much is measured.
      lora_rank: rank of what is added to the decoder's query and value projections in the third way; 0 leaves it out.

    Returns:
      A line for each way: parameters, how many are trained, and speed and memory, also as ratio to full training.
    """
    fitted = dataclasses.replace(config, init_from="the same model")  # a name alone; it is not read
    ways = {"full": config, "retrofit": fitted}
    if lora_rank:
        ways["retrofit_lora"] = dataclasses.replace(
            fitted, model=dataclasses.replace(config.model, lora_rank=lora_rank)
        )
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(plan.rounds):
        for way, one in ways.items():
            rounds[way].append(train.measure(one, plan))
    found = {way: train.step_line(one, rounds[way]) for way, one in ways.items()}
    return [
        {
            "benchmark": "retrofit",
            "way": way,
            "lora_rank": ways[way].model.lora_rank,
            **line,
            "trained_parameters": rounds[way][0]["trained_parameters"],
            "trained_share": rounds[way][0]["trained_parameters"] / line["parameters"],
            "speed_ratio_to_full": line[_COMPARED[0]] / found["full"][_COMPARED[0]],
            "memory_ratio_to_full": line[_COMPARED[1]] / found["full"][_COMPARED[1]],
        }
        for way, line in found.items()
    ]
