"""Times a train step of the PyPI package retro-pytorch, in an environment of its own that has no JAX.

    PYTHONPATH=tools PEER/bin/python -m benchmarks.retro_pytorch_step JSON

Forward, backward and the package's own AdamW on random tokens. The package cannot be imported as a whole (autofaiss
fails to), so its model is imported alone. It also ignores `heads`: encoder and decoder always get 8. Here they get the
number that was asked for, or it would be another model that is measured.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import sys
import types
from typing import Any

from benchmarks import measure

_POOL = 4
_FIRST_TOKEN = 4


def main() -> None:
    job = json.loads(sys.argv[1])
    cores = measure.limit_cores(job["cores"])
    import torch  # after the cores are set: torch counts them once

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    model = build_model(job)
    step = torch.compile(model) if job["compile"] else model
    optimizer = importlib.import_module("retro_pytorch.optimizer").get_optimizer(model.parameters(), lr=2e-4, wd=0.1)

    def run(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
            loss = step(batch[0], retrieved=batch[1], return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()}")

    timed = measure.time_steps(run, itertools.cycle(_batches(job)), warmup=job["warmup"], steps=job["steps"])
    measure.report(
        {
            **timed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "heads": sorted({module.heads for module in model.modules() if hasattr(module, "heads")}),
            "cores": cores,
            "torch": torch.__version__,
        }
    )


def build_model(job: dict[str, Any]) -> Any:
    """The package's RETRO in the shape of the job, in training mode."""
    package = types.ModuleType("retro_pytorch")
    package.__path__ = list(importlib.util.find_spec("retro_pytorch").submodule_search_locations)
    sys.modules["retro_pytorch"] = package  # its own __init__ imports everything
    for name in ("faiss", "autofaiss"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["autofaiss"].build_index = None
    module = importlib.import_module("retro_pytorch.retro_pytorch")
    module.Encoder = functools.partial(module.Encoder, heads=job["encoder_heads"], ff_mult=job["encoder_ffw_factor"])
    module.Decoder = functools.partial(module.Decoder, heads=job["heads"], ff_mult=job["ffw_factor"])
    return module.RETRO(
        num_tokens=job["vocab_size"],
        max_seq_len=job["length"],
        enc_dim=job["encoder_width"],
        enc_depth=job["encoder_layers"],
        enc_cross_attn_layers=tuple(job["encoder_ca_layers"]),
        dec_dim=job["width"],
        dec_depth=job["num_layers"],
        dec_cross_attn_layers=tuple(job["cca_layers"]),
        dim_head=job["head_size"],
        chunk_size=job["chunk_length"],
    ).train()


def _batches(job: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Token ids [B, T + 1] and neighbours [B, L, K, R], int64."""
    import torch

    chunks = job["length"] // job["chunk_length"]
    shapes = (
        (job["batch_size"], job["length"] + 1),
        (job["batch_size"], chunks, job["k"], job["neighbour_length"]),
    )
    return [tuple(torch.randint(_FIRST_TOKEN, job["vocab_size"], shape) for shape in shapes) for _ in range(_POOL)]


if __name__ == "__main__":
    main()
