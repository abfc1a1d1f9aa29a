"""Speed, as one JSON line a result: training, data, sampling and retrieval, beside the baseline's or a peer's.

    python tools/benchmark.py train --shape=tiny
    python tools/benchmark.py train --shape=small --peer=retro-pytorch
    python tools/benchmark.py train --preset=425m --length=2048 --batch_size=16 --dtype=bfloat16
    python tools/benchmark.py retrofit --preset=172m --length=1024 --batch_size=1 --lora_rank=8
    python tools/benchmark.py data --sequences=demo/sequences --batch_size=32
    python tools/benchmark.py sample --shape=tiny --peer=retro-pytorch --new_tokens=64,256
    python tools/benchmark.py sample --database=DB --embedder=minilm --new_tokens=512 --prompts=1,8
    python tools/benchmark.py embedding --embedder=embedder --corpus=DB/corpus
    python tools/benchmark.py retrieval --embeddings=DB/embeddings --vectors=100000,400000 --plots=docs
    python tools/benchmark.py growth --embeddings=DB/embeddings --plots=docs
    python tools/benchmark.py service --database=DB
    python tools/benchmark.py pipeline --input='text/*.jsonl' --tokenizer=tokenizer.model --embedder=embedder

Every side is measured in a process of its own, so that its peak memory is its own, and the sides take turns. `train`
gives our step beside that of the baseline with the same decoder, or, with --peer, beside the PyPI package retro-pytorch
at the same shapes (in an environment that is made on first use); the last line then has the ratios. `retrofit` trains
the whole model, encoder and cross-attention alone, and these with LoRA on the decoder. `data` reads from a cold start,
--sequences or synthetic ones. `sample` generates with random neighbours or those of --database, beside the same peer if
asked. `embedding` turns the texts of chunks into vectors with our BERT, onnxruntime and torch.
`retrieval` searches real embeddings with our index and with FAISS and hnswlib; `growth` does so from 10,000 to a
million vectors, those beyond the real ones made of them. `service` asks a database by gRPC and in this process.
`pipeline` runs the programs from text to TFRecords. Without a name `train` and `data` run.
"""

import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from benchmarks import (
    children,
    embedding,
    pipeline,
    random_bert,
    reading,
    retrieval,
    retrieval_plot,
    retro_pytorch,
    retrofit,
    sample,
    service_overhead,
    train,
)

from retro_jax import machine, program
from retro_jax.config import DataConfig, OptimizerConfig, TrainConfig
from retro_jax.data.corpus import Corpus
from retro_jax.data.records import SequenceSchema
from retro_jax.errors import UserError
from retro_jax.retrieval.checkpoints import resolve_embedder
from retro_jax.retrieval.embedder import EmbeddingSet, chunk_texts
from retro_jax.retrieval.index_settings import IndexSettings

ROOT = Path(__file__).resolve().parent.parent
# What changes the speed without being in a configuration; both sides of a comparison get it.
_VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS")

_SHAPE = flags.DEFINE_enum("shape", None, [*train.SHAPES], "A named shape; the flags below then change single parts.")
_PRESET = flags.DEFINE_string("preset", None, "Architecture of `train`; default tiny.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Vocabulary; default the preset's.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens of a sequence; default 512.", lower_bound=64)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Sequences of a step; default 4.", lower_bound=1)
_K = flags.DEFINE_integer("k", None, "Neighbours of a chunk; default 2.", lower_bound=1)
_DTYPE = flags.DEFINE_list("dtype", ["float32"], "Compute dtypes, one after the other; `pipeline` takes one.")
_REMAT = flags.DEFINE_string("remat", None, "What the backward pass computes again; default the preset's.")
_SCAN_LAYERS = flags.DEFINE_bool("scan_layers", None, "Equal layers as a loop, or written out; default the preset's.")
_VOCAB_BLOCK = flags.DEFINE_integer("vocab_block", None, "Logits at once; 0 for all; default the configuration's.")
_POSITIONS = flags.DEFINE_string("positions", None, "transformer_xl or rope; default the preset's.")
_MICROBATCHES = flags.DEFINE_integer("microbatches", 1, "Parts that a batch is computed in.", lower_bound=1)
_MESH = flags.DEFINE_string("mesh", "", "Devices along the mesh's axes, as data=2,fsdp=1.")
_STEPS = flags.DEFINE_integer("steps", 12, "Steps that count, over all rounds; requests of `service`.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 3, "Steps before them, in every round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", None, "Turns of every side; default 3 beside a peer, else 1.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", 0, "Processor cores a side may use; 0 for all.", lower_bound=0)
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Devices that JAX makes of the CPU; 0 for one.", lower_bound=0)
_LORA_RANK = flags.DEFINE_integer("lora_rank", 8, "Rank of LoRA in `retrofit`; 0 leaves it out.", lower_bound=0)
_BASELINE = flags.DEFINE_bool("baseline", True, "Measure the baseline too, where there is no peer.")
_PEER = flags.DEFINE_enum("peer", None, [*train.PEERS], "A peer that is measured in turn with us, on the CPU.")
_PEER_TORCH = flags.DEFINE_string("peer_torch", retro_pytorch.TORCH, "What is installed as the peer's torch.")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "An interpreter that has the peer; no environment is made.")
_SEQUENCES = flags.DEFINE_string("sequences", None, "Sequences directory; default random tokens.")
_NEW_TOKENS = flags.DEFINE_list("new_tokens", None, "Tokens that `sample` generates; default 64 to 2048.")
_PROMPTS = flags.DEFINE_list("prompts", ["1", "8"], "Prompts that `sample` continues together.")
_EMBEDDER = flags.DEFINE_string(
    "embedder", None, "BERT checkpoint of `embedding`, `pipeline` and, with --database, `sample`."
)
_EMBEDDER_SHAPE = flags.DEFINE_enum(
    "embedder_shape",
    None,
    [*random_bert.SHAPES],
    "`embedding` with random weights of this shape; word pieces of --embedder.",
)
_CORPUS = flags.DEFINE_string("corpus", None, "Corpus whose chunks `embedding` reads; default random words.")
_CHUNKS = flags.DEFINE_integer("chunks", 1024, "Chunks that `embedding` embeds.", lower_bound=1)
_EMBEDDING_PEERS = flags.DEFINE_list("embedding_peers", [*embedding.PEERS], "Engines beside ours; empty for none.")
_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "Embeddings directory that is searched.")
_VECTORS = flags.DEFINE_list("vectors", None, "Vectors in the index, one number after the other; default 100000.")
_SEARCH_PEERS = flags.DEFINE_list("search_peers", None, "Engines beside ours; default all, for `growth` one.")
_INDEX_SETTINGS = flags.DEFINE_string("index_settings", None, "JSON file of tools/tune_index.py; default the rules.")
_PLOTS = flags.DEFINE_string("plots", None, "Directory for recall.png of `retrieval`, growth.png of `growth`.")
_DATABASE = flags.DEFINE_string(
    "database", None, "Database that `service` asks; `sample` too, random neighbours without."
)
_INPUT = flags.DEFINE_list("input", None, "Documents of `pipeline`: files or glob patterns.")
_EVALUATION = flags.DEFINE_list("evaluation", [], "Documents whose near-duplicates `pipeline` leaves out first.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer of `pipeline`.")
_OUTPUT = flags.DEFINE_string("output", None, "Where `pipeline` keeps what it makes; default: nowhere.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes of the stages of `pipeline` that run on Beam.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", None, "Batches that `data` reads; default 2,000 sequences.", lower_bound=2)


def main(names: list[str]) -> None:
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(f"benchmark {name!r} is none of {', '.join(BENCHMARKS)}")
    for name, benchmark in BENCHMARKS.items():
        if name in (names or ["train", "data"]):
            benchmark()


def benchmark_train() -> None:
    rounds = _ROUNDS.value or (3 if _PEER.value else 1)
    plan = train.Plan(_STEPS.value, _WARMUP.value, rounds, _CORES.value, _CPU_DEVICES.value)
    configs = [_config(dtype) for dtype in _DTYPE.value]
    if not _PEER.value:
        for config in configs:
            measured = train.against_baseline if _BASELINE.value else train.alone
            _report(measured(config, plan))
        return
    for config in configs:
        retro_pytorch.job(config, compiled=False)  # what the peer cannot do is said before anything is installed
    python = retro_pytorch.environment(_PEER_PYTHON.value, _PEER_TORCH.value)
    lines = [line for config in configs for line in train.against_peer(config, plan, python)]
    for line in sorted(lines, key=lambda line: line["benchmark"] == "comparison"):
        _report(line)


def benchmark_retrofit() -> None:
    plan = train.Plan(_STEPS.value, _WARMUP.value, _ROUNDS.value or 1, _CORES.value, _CPU_DEVICES.value)
    for dtype in _DTYPE.value:
        for line in retrofit.lines(_config(dtype), plan, _LORA_RANK.value):
            _report(line)


def benchmark_data() -> None:
    batch_size = _value("batch_size")
    job = {
        "batch_size": batch_size,
        "batches": _BATCHES.value or max(20, 2000 // batch_size),
        "cores": _CORES.value,
    }
    if _SEQUENCES.value:
        _report({"benchmark": "data", **_read({**job, "sequences": _SEQUENCES.value})})
        return
    model = train.model_of(_value("preset"), _value("vocab_size"))
    schema = SequenceSchema(_value("length"), model.chunk_length, _value("k"), model.neighbour_length, model.vocab_size)
    with tempfile.TemporaryDirectory() as directory:
        sequences = Path(directory) / "sequences"
        reading.write_synthetic(sequences, schema, 2 * batch_size * job["batches"])
        _report({"benchmark": "data", "synthetic": True, **_read({**job, "sequences": str(sequences)})})


def benchmark_sample() -> None:
    peer = _PEER.value is not None
    if (_DATABASE.value is None) != (_EMBEDDER.value is None):
        raise UserError("--database and --embedder go together")
    if peer and _DATABASE.value:
        raise UserError("the peer has random neighbours, and so must we beside it: leave out --database")
    lengths = _numbers(_NEW_TOKENS) if _NEW_TOKENS.value else sample.PEER_LENGTHS if peer else sample.LENGTHS
    plan = sample.Plan(
        lengths=lengths,
        batch_sizes=(1,) if peer else _numbers(_PROMPTS),
        k=_value("k"),
        rounds=_ROUNDS.value or 1,
        cores=_CORES.value,
        database=_DATABASE.value or "",
        embedder=_EMBEDDER.value or "",
    )
    for dtype in _DTYPE.value:
        model = _config(dtype).model
        if peer:
            python = retro_pytorch.environment(_PEER_PYTHON.value, _PEER_TORCH.value)
            lines = sample.against_peer(model, plan, python)
        else:
            lines = sample.alone(model, plan, train.parse_mesh(_MESH.value))
        for line in lines:
            _report(line)


def benchmark_embedding() -> None:
    peers = _names(_EMBEDDING_PEERS.value, embedding.PEERS)
    checkpoint = resolve_embedder(_required(_EMBEDDER))
    with tempfile.TemporaryDirectory() as directory:
        if _EMBEDDER_SHAPE.value:
            checkpoint = random_bert.random_checkpoint(_EMBEDDER_SHAPE.value, checkpoint, Path(directory) / "bert")
        if _CORPUS.value:
            corpus = Corpus(_CORPUS.value)
            ids = np.linspace(0, corpus.num_chunks - 1, min(_CHUNKS.value, corpus.num_chunks)).astype(np.int64)
            texts = chunk_texts(corpus.tokens(ids), corpus.tokenizer)
        else:
            texts = random_bert.synthetic_texts(checkpoint, _CHUNKS.value)
        for line in embedding.embedding_lines(
            checkpoint,
            texts,
            peers=peers,
            peer_python=_PEER_PYTHON.value,
            cores=_CORES.value,
            turns=_ROUNDS.value or 3,
        ):
            _report({**line, "weights": _EMBEDDER_SHAPE.value and "random", "synthetic_texts": not _CORPUS.value})


def benchmark_retrieval() -> None:
    _make_plots_folder()
    lines = _search(_numbers(_VECTORS) if _VECTORS.value else [100_000], retrieval.PEERS, synthetic=False)
    if _PLOTS.value:
        retrieval_plot.plot_recall(lines, Path(_PLOTS.value) / "recall.png")


def benchmark_growth() -> None:
    sizes = _numbers(_VECTORS) if _VECTORS.value else list(retrieval.GROWTH)
    _make_plots_folder()
    lines = _search(sizes, ("faiss_fast_scan",), synthetic=True)
    if _PLOTS.value:
        retrieval_plot.plot_growth(lines, Path(_PLOTS.value) / "growth.png")


def _make_plots_folder() -> None:
    """Before anything is measured: what is wrong with it must not cost an hour."""
    if _PLOTS.value:
        Path(_PLOTS.value).mkdir(parents=True, exist_ok=True)


def _search(sizes: list[int], peers: Sequence[str], *, synthetic: bool) -> list[dict[str, Any]]:
    chosen = peers if _SEARCH_PEERS.value is None else _names(_SEARCH_PEERS.value, retrieval.PEERS)
    lines = []
    for line in retrieval.search_lines(
        EmbeddingSet(_required(_EMBEDDINGS)),
        sizes,
        peers=chosen,
        peer_python=_PEER_PYTHON.value,
        settings=_index_settings(),
        cores=_CORES.value or 1,
        turns=_ROUNDS.value or 3,
        synthetic=synthetic,
    ):
        lines.append(line)
        _report(dict(line))
    return lines


def _index_settings() -> dict[str, Any]:
    """Of our index: those of a file, else the rules', as a tree also where there are few vectors."""
    if not _INDEX_SETTINGS.value:
        return {"kind": "tree"}
    return dataclasses.asdict(IndexSettings.load(_INDEX_SETTINGS.value))


def benchmark_service() -> None:
    database = Path(_required(_DATABASE))
    embeddings = EmbeddingSet(_EMBEDDINGS.value or database / "embeddings")
    rounds = _STEPS.value if flags.FLAGS["steps"].present else 200
    for line in service_overhead.overhead_lines(database, embeddings, rounds=rounds):
        _report(line)


def benchmark_pipeline() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for line in pipeline.pipeline_lines(
            _required(_INPUT),
            _required(_TOKENIZER),
            _required(_EMBEDDER),
            Path(_OUTPUT.value or directory),
            evaluation=_EVALUATION.value,
            length=_LENGTH.value or 2048,
            k=_value("k"),
            workers=_WORKERS.value,
            compute_dtype=_DTYPE.value[0],
        ):
            _report(line)


def _required(flag: flags.FlagHolder) -> Any:
    if not flag.value:
        raise UserError(f"this benchmark needs --{flag.name}: {flags.FLAGS[flag.name].help}")
    return flag.value


def _names(given: list[str], known: Sequence[str]) -> list[str]:
    """Those of `known` that are asked for; [""] is what an empty flag gives."""
    for name in filter(None, given):
        if name not in known:
            raise UserError(f"engine {name!r} is none of {', '.join(known)}")
    return [name for name in given if name]


def _numbers(flag: flags.FlagHolder[list[str]]) -> list[int]:
    if not all(entry.isdecimal() and int(entry) for entry in flag.value):
        raise UserError(f"--{flag.name}={','.join(flag.value)}: expected positive numbers with commas")
    return [int(entry) for entry in flag.value]


def _read(job: dict[str, Any]) -> dict[str, Any]:
    return children.run(sys.executable, "benchmarks.reading", {**job, "launched": time.time()})


def _config(dtype: str) -> TrainConfig:
    changes = {"remat": _REMAT.value, "positions": _POSITIONS.value, "scan_layers": _SCAN_LAYERS.value}
    model = train.model_of(
        _value("preset"),
        _value("vocab_size"),
        dtype=dtype,
        **{name: value for name, value in changes.items() if value is not None},
    )
    return TrainConfig(
        model=model,
        data=DataConfig(
            sequences=(_SEQUENCES.value,) if _SEQUENCES.value else (), length=_value("length"), neighbours=_value("k")
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
        mesh=train.parse_mesh(_MESH.value),
        batch_size=_value("batch_size"),
        microbatches=_MICROBATCHES.value,
        vocab_block=TrainConfig.vocab_block if _VOCAB_BLOCK.value is None else _VOCAB_BLOCK.value,
    )


def _value(name: str) -> Any:
    """A flag that was given, else the shape's part, else that of the shape tiny (with the preset's own vocabulary)."""
    given = flags.FLAGS[name].value
    if given is not None:
        return given
    shape = train.SHAPES[_SHAPE.value] if _SHAPE.value else {**train.SHAPES["tiny"], "vocab_size": 0}
    return shape[name]


def _report(line: dict[str, Any]) -> None:
    benchmark = line.pop("benchmark")
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "shape": _SHAPE.value,
                "commit": machine.commit(ROOT),
                **line,
                "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
                "processor": machine.processor(),
                "python": platform.python_version(),
                **machine.versions(("jax", "jaxlib", "flax")),
            }
        ),
        flush=True,
    )


BENCHMARKS = {
    "train": benchmark_train,
    "data": benchmark_data,
    "retrofit": benchmark_retrofit,
    "sample": benchmark_sample,
    "embedding": benchmark_embedding,
    "retrieval": benchmark_retrieval,
    "growth": benchmark_growth,
    "service": benchmark_service,
    "pipeline": benchmark_pipeline,
}

if __name__ == "__main__":
    program.run(main, positional=True)
