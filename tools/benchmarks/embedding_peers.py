"""Times BERT in onnxruntime or torch on texts: `python -m benchmarks.embedding_peers JSON`, where they are.

The model is transformers' BertModel. For onnxruntime it is exported by torch and fused by onnxruntime's own BERT
optimizer. Both get the texts by length, padded to the longest of a batch, in the batch size that is quickest.
"""

import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure

_BATCHES = (4, 8, 16, 32, 64)
_LONGEST = 256  # word pieces, with [CLS] and [SEP], as our embedder reads
_GRAPH = "bert.onnx"


def main() -> None:
    job = json.loads(sys.argv[1])
    cores = measure.limit_cores(job["cores"])
    folder = Path(job["folder"])
    if job["side"] == "export":
        _export(job["checkpoint"], folder / _GRAPH)
        measure.report({})
        return
    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    begun = time.perf_counter()
    tokenize = _tokenizer(job["checkpoint"])
    library, dtype = job["side"].split("_")
    hidden = _onnxruntime(folder / _GRAPH, cores) if library == "onnxruntime" else _torch(job["checkpoint"], dtype)
    sample = texts[: 2 * max(_BATCHES)]
    _embed(tokenize, hidden, sample, max(_BATCHES))  # both libraries are slower the first time
    loaded = time.perf_counter() - begun
    embed = functools.partial(_embed, tokenize, hidden)
    rates = {size: measure.rate(functools.partial(embed, sample, size), len(sample), 0) for size in _BATCHES}
    batch = max(rates, key=rates.get)
    np.save(folder / f"{job['side']}.npy", embed(texts, batch))
    measure.report(
        {
            "chunks_per_second": measure.rate(functools.partial(embed, texts, batch), len(texts), job["seconds"]),
            "load_seconds": loaded,
            "batch": batch,
            "peak_memory_bytes": measure.peak_memory_bytes(),
            "cores": cores,
            "version": importlib.metadata.version(library),
        }
    )


def _embed(tokenize: Callable, hidden: Callable, texts: list[str], batch: int) -> np.ndarray:
    """Means of the last hidden states without [CLS] and [SEP], of length 1: float32 [n, E]."""
    pieces = tokenize(texts)
    order = sorted(range(len(texts)), key=lambda i: len(pieces[i]))
    vectors = None
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        length = len(pieces[rows[-1]])
        ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(pieces[row])], mask[i, : len(pieces[row])] = pieces[row], 1
        states = hidden(ids, mask)
        sizes = mask.sum(1)
        places = np.arange(length)
        pooled = ((places > 0) & (places < sizes[:, None] - 1)).astype(np.float32)
        means = np.einsum("bt,bte->be", pooled, states) / np.maximum(sizes - 2, 1)[:, None]
        if vectors is None:
            vectors = np.empty((len(texts), means.shape[1]), np.float32)
        vectors[rows] = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return vectors


def _tokenizer(checkpoint: str) -> Callable[[list[str]], list[list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.enable_truncation(_LONGEST)
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def _onnxruntime(graph: Path, cores: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    # The optimizer narrows the inputs to 32 bits.
    kinds = {each.name: np.int32 if each.type == "tensor(int32)" else np.int64 for each in session.get_inputs()}

    def hidden(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        given = {"ids": ids, "mask": mask}
        return session.run(None, {name: given[name].astype(kind) for name, kind in kinds.items()})[0]

    return hidden


def _torch(checkpoint: str, dtype: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = _model(checkpoint, "sdpa").to(getattr(torch, dtype))

    def hidden(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            # Without padding there is no mask: torch then takes its quicker way.
            masked = {} if mask.all() else {"attention_mask": torch.from_numpy(mask)}
            return model(input_ids=torch.from_numpy(ids), **masked).last_hidden_state.float().numpy()

    return hidden


def _export(checkpoint: str, graph: Path) -> None:
    import torch
    from onnxruntime.transformers.optimizer import optimize_model

    model = _model(checkpoint, "eager")  # of the two ways of attention the one that the optimizer recognises

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = model

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    ones = torch.ones((2, 16), dtype=torch.int64)
    axes = {name: {0: "batch", 1: "length"} for name in ("ids", "mask", "hidden")}
    names = {"input_names": ["ids", "mask"], "output_names": ["hidden"], "dynamic_axes": axes}
    torch.onnx.export(States().eval(), (ones, ones), str(graph), dynamo=False, **names)
    config = model.config
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    optimized = optimize_model(str(graph), model_type="bert", opt_level=0, **sizes)
    optimized.save_model_to_file(str(graph))


def _model(checkpoint: str, attention: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    options = {"add_pooling_layer": False, "attn_implementation": attention}
    return transformers.BertModel.from_pretrained(checkpoint, **options).eval()


if __name__ == "__main__":
    main()
