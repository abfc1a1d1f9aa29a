"""Embedding beside its peers: chunks a second of our BERT, onnxruntime's and torch's, on the same weights and texts.

The peers live in an environment of their own, made on first use. Every side turns texts into vectors of length 1, its
own tokenizer included, in a process of its own; the sides take turns, and the best of the turns counts. How near a side
comes to float32 is the cosine of its vectors with those of torch in float32.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import children, environments, retro_pytorch
from retro_jax.retrieval.bert import BertConfig
from retro_jax.retrieval.embedder import COMPUTE_DTYPES

HOME = environments.CACHE / "embedding"
PACKAGES = (
    retro_pytorch.TORCH,
    "transformers==5.23.0",
    "onnx==1.23.2",
    "onnxruntime==1.31.1",
    "annotated-doc==0.0.7",
    "anyio==4.16.0",
    "click==8.5.1",
    "filelock==4.2.11",
    "flatbuffers==25.12.19",
    "fsspec==2026.9.0",
    "h11==0.16.0",
    "hf-xet==1.8.0",
    "httpcore2==2.16.2",
    "httpx2==2.16.2",
    "huggingface_hub==2.4.0",
    "idna==3.20",
    "jinja2==3.1.6",
    "markdown-it-py==4.3.0",
    "markupsafe==3.0.4",
    "mdurl==0.1.2",
    "ml_dtypes==0.6.0",
    "mpmath==1.3.0",
    "networkx==3.6.1",
    "numpy==2.4.6",
    "packaging==26.3",
    "protobuf==7.36.2",
    "pygments==2.21.0",
    "pyyaml==6.0.3",
    "regex==2026.11.15",
    "rich==15.0.0",
    "safetensors==0.8.0",
    "shellingham==1.5.4",
    "sympy==1.14.0",
    "tokenizers==0.23.3",
    "tqdm==4.70.1",
    "truststore==0.10.5",
    "typer==0.29.2",
    "typing-extensions==4.16.0",
)
IMPORTS = "import numpy, onnx, onnxruntime, tokenizers, torch, transformers"
# Keyword arguments of `Embedder.load` for each of our sides.
OURS: dict[str, dict[str, Any]] = {f"retro_jax_{dtype}": {"compute_dtype": dtype} for dtype in COMPUTE_DTYPES}
PEERS = ("onnxruntime_float32", "torch_float32", "torch_bfloat16")
REFERENCE = "torch_float32"
_FAITHFUL = 0.999  # mean cosine with the reference from which a side of ours is compared


def environment(python: str | None, home: Path = HOME) -> str:
    """The interpreter that has onnxruntime, torch and transformers, as of `environments.environment`."""
    needs = f"{retro_pytorch.TORCH} from a package index with CPU builds, or --peer_python, an interpreter that has all"
    return environments.environment("onnxruntime with torch", python, home, PACKAGES, IMPORTS, needs)


def embedding_lines(
    checkpoint: Path,
    texts: Sequence[str],
    *,
    peers: Sequence[str] = PEERS,
    peer_python: str | None = None,
    cores: int = 0,
    turns: int = 3,
    seconds: float = 2.0,
) -> Iterator[dict[str, Any]]:
    """Measures every side; a line each, and one that compares them.

    Args:
      checkpoint: directory of a BERT in Hugging Face's files.
      texts: of chunks.
      peers: of `PEERS`.
      peer_python: see `environment`.
      cores: that a side may use; 0 for all.
      turns: of every side.
      seconds: that a rate is measured over in a turn, at least one pass over the texts.

    Raises:
      UserError: a peer cannot be installed, or a side fails.
    """
    python = environment(peer_python) if peers else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(list(texts)), encoding="utf-8")
        job = {"checkpoint": str(checkpoint), "texts": str(file), "folder": folder, "cores": cores, "seconds": seconds}
        sides = {
            name: (sys.executable, "benchmarks.embedding_ours", {**job, "side": name, "options": options})
            for name, options in OURS.items()
        }
        sides |= {name: (python, "benchmarks.embedding_peers", {**job, "side": name}) for name in peers}
        if "onnxruntime_float32" in peers:
            children.run(python, "benchmarks.embedding_peers", {**job, "side": "export"})
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(turns):
            for name, side in sides.items():
                found[name].append(children.run(*side))
        vectors = {name: np.load(Path(folder) / f"{name}.npy") for name in sides}
    config = BertConfig.load(checkpoint)
    work = _gflop(config, found[next(iter(OURS))][0]["word_pieces"])
    lines = [
        {
            "benchmark": "embedding",
            "engine": name,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "chunks": len(texts),
            "word_pieces_mean": statistics.fmean(found[next(iter(OURS))][0]["word_pieces"]),
            **_summary(rounds, work / len(texts)),
            **_nearness(vectors[name], vectors.get(REFERENCE)),
        }
        for name, rounds in found.items()
    ]
    yield from lines
    yield _comparison(lines)


def _gflop(config: BertConfig, lengths: Sequence[int]) -> float:
    """Billions of floating-point operations in the matrix products that inputs of these lengths ask for, unpadded."""
    width, total = config.hidden_size, 0
    for length in lengths:
        dense = 2 * length * (4 * width * width + 2 * width * config.intermediate_size)
        total += config.num_hidden_layers * (dense + 4 * length * length * width)
    return total / 1e9


def _summary(rounds: Sequence[dict[str, Any]], gflop: float) -> dict[str, Any]:
    """The best of the turns and their median.

    Args:
      rounds: what the child said in each.
      gflop: of a chunk.
    """
    rates = [each["chunks_per_second"] for each in rounds]
    return {
        "chunks_per_second": max(rates),
        "chunks_per_second_median": statistics.median(rates),
        "gflops_per_second": max(rates) * gflop,
        "load_seconds": min(each["load_seconds"] for each in rounds),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in rounds),
        "cores": rounds[0]["cores"],
        **{name: rounds[0][name] for name in ("version", "batch", "device") if name in rounds[0]},
    }


def _nearness(vectors: np.ndarray, reference: np.ndarray | None) -> dict[str, Any]:
    """Mean and least cosine with the vectors of the reference, all of length 1; None without a reference.

    A text without a word piece has no direction (all components 0) and is left out.
    """
    if reference is None:
        return {"cosine_to_float32": None, "least_cosine_to_float32": None}
    there = reference.any(1)
    cosines = np.einsum("ne,ne->n", vectors[there].astype(np.float64), reference[there])
    return {"cosine_to_float32": float(cosines.mean()), "least_cosine_to_float32": float(cosines.min())}


def _comparison(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The quickest of ours that is faithful to float32, over every peer."""
    rates = {line["engine"]: line["chunks_per_second"] for line in lines}
    nearness = {line["engine"]: line["cosine_to_float32"] for line in lines}
    ours = max((name for name in OURS if (nearness[name] or 1) >= _FAITHFUL), key=rates.get)
    return {
        "benchmark": "embedding",
        "engine": "comparison",
        "ours": ours,
        "chunks_per_second": rates,
        **{f"ratio_to_{name}": rates[ours] / rate for name, rate in rates.items() if name not in OURS},
    }
