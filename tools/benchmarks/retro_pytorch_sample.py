"""Times generation with the PyPI package retro-pytorch, in an environment of its own that has no JAX.

    PYTHONPATH=tools PEER/bin/python -m benchmarks.retro_pytorch_sample JSON

The loop is that of the package's own `TrainingWrapper.generate`: the model over the whole sequence and all neighbours
for every token, the most likely tenth of the vocabulary kept, Gumbel noise; neighbours (random ones here) at every
chunk. Eager: the shapes change with every token.
"""

import json
import math
import sys
import time
from typing import Any

from benchmarks import measure
from benchmarks.retro_pytorch_step import build_model

_FIRST_TOKEN = 4


def main() -> None:
    job = json.loads(sys.argv[1])
    cores = measure.limit_cores(job["cores"])
    import torch  # after the cores are set: torch counts them once

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    model = build_model(job).eval()
    cases = []
    with torch.inference_mode():
        _generate(model, job, 1, 8)
        for batch_size in job["batch_sizes"]:
            for length in job["lengths"]:
                first, seconds = _generate(model, job, batch_size, length)
                cases.append(
                    {
                        "batch_size": batch_size,
                        "new_tokens": length,
                        "tokens_per_second": batch_size * length / seconds,
                        "seconds": seconds,
                        "first_token_seconds": first,
                        "cores": cores,
                        "torch": torch.__version__,
                        "peak_memory_bytes": measure.peak_memory_bytes(),
                    }
                )
    measure.report({"cases": cases})


def _generate(model: Any, job: dict[str, Any], batch_size: int, length: int) -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    import torch

    def neighbours(chunks: int) -> Any:
        return torch.randint(_FIRST_TOKEN, job["vocab_size"], (batch_size, chunks, job["k"], job["neighbour_length"]))

    chunk = job["chunk_length"]
    out = torch.randint(_FIRST_TOKEN, job["vocab_size"], (batch_size, job["prompt"]))
    kept = math.ceil(job["top_k"] * job["vocab_size"])
    begun = time.perf_counter()
    retrieved = neighbours(job["prompt"] // chunk) if job["prompt"] >= chunk else None
    first = None
    for _ in range(length):
        logits = model(out, retrieved=retrieved)[:, -1]
        values, indices = torch.topk(logits, kept)
        filtered = torch.full_like(logits, float("-inf")).scatter_(1, indices, values)
        noise = -torch.log(-torch.log(torch.rand_like(filtered).clamp(min=1e-20)).clamp(min=1e-20))
        out = torch.cat((out, (filtered + noise).argmax(dim=-1, keepdim=True)), dim=1)
        first = first or time.perf_counter() - begun
        if out.shape[1] % chunk == 0:
            new = neighbours(1)
            retrieved = new if retrieved is None else torch.cat((retrieved, new), dim=1)
    return first, time.perf_counter() - begun


if __name__ == "__main__":
    main()
