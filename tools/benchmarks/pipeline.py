"""The whole pipeline as a user runs it, program after program, from text to TFRecords: what each takes of the time."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import children
from retro_jax.data.stage import load_manifest
from retro_jax.errors import UserError


def pipeline_lines(
    inputs: Sequence[str],
    tokenizer: str,
    embedder: str,
    output: Path,
    *,
    evaluation: Sequence[str] = (),
    length: int = 2048,
    k: int = 2,
    neighbours: int = 16,
    workers: int = 1,
    compute_dtype: str = "float32",
) -> Iterator[dict[str, Any]]:
    """Runs the stages one after the other; a line each when it is done, and one of the whole.

    Args:
      inputs: files or patterns of documents.
      tokenizer: model file.
      embedder: BERT checkpoint.
      output: empty or new; keeps duplicates/, database/{corpus,embeddings,index}, neighbours/ and sequences/.
      evaluation: documents whose near-duplicates are left out; none: that stage is left out.
      length, k: of the sequences.
      neighbours: found for every chunk.
      workers: processes of the stages that run on Beam.
      compute_dtype: of the embedder's products.

    Raises:
      UserError: something is in `output`, or a stage fails.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty: what is there would not be done again, and so not be measured")
    database = output / "database"
    beam = [f"--workers={workers}"]
    corpus = ["build_corpus", f"--input={','.join(inputs)}", f"--tokenizer={tokenizer}", *beam]
    stages: list[tuple[Path, list[str]]] = []
    if evaluation:
        files = [f"--input={','.join(inputs)}", f"--evaluation={','.join(evaluation)}"]
        stages.append((output / "duplicates", ["find_duplicates", *files, *beam]))
        corpus.append(f"--exclusions={output / 'duplicates'}")
    read, searched = f"--corpus={database / 'corpus'}", f"--database={database}"
    found = f"--neighbours={output / 'neighbours'}"
    embedding = [f"--embedder={embedder}", "--normalize", f"--compute_dtype={compute_dtype}"]
    stages += [
        (database / "corpus", corpus),
        (database / "embeddings", ["embed_chunks", read, *embedding]),
        (database / "index", ["build_index", f"--embeddings={database / 'embeddings'}", *beam]),
        (output / "neighbours", ["find_neighbours", read, searched, f"--k={neighbours}", *beam]),
        (output / "sequences", ["write_sequences", read, searched, found, f"--length={length}", f"--k={k}", *beam]),
    ]
    measured = []
    for directory, (program, *flags) in stages:
        cost = _run(program, [*flags, f"--output={directory}"])
        measured.append({"stage": program, **cost, "bytes": _size(directory)})
        counts = load_manifest(directory, directory.name).counts
        yield {
            "benchmark": "pipeline",
            **measured[-1],
            "counts": {name: count for name, count in counts.items() if isinstance(count, int | float)},
        }
    seconds = sum(stage["seconds"] for stage in measured)
    counts = load_manifest(database / "corpus", "corpus").counts
    yield {
        "benchmark": "pipeline",
        "stage": "all",
        "workers": workers,
        "compute_dtype": compute_dtype,
        "cores": len(os.sched_getaffinity(0)),
        "bytes_of_text": counts["bytes"],
        "tokens": counts["tokens"],
        "chunks": counts["chunks"],
        "seconds": seconds,
        "tokens_per_second": counts["tokens"] / seconds,
        "shares": {stage["stage"]: round(stage["seconds"] / seconds, 4) for stage in measured},
        "cpu_seconds": sum(stage["cpu_seconds"] for stage in measured),
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in measured),
    }


def _run(program: str, flags: Sequence[str]) -> dict[str, Any]:
    """Runs a program of tools/ to its end, its progress where ours goes; what it took, all its processes together.

    Raises:
      UserError: it failed; its own line is on stderr already.
    """
    path = os.pathsep.join(filter(None, [str(children.TOOLS.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(children.TOOLS / f"{program}.py"), *flags]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": path})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"tools/{program}.py ended with exit status {process.returncode}, see above")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * unit,  # of its largest process
    }


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
