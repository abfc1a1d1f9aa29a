"""A data set and a model so small that a training run takes seconds, and programs run as a user runs them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from prepared_process import run_prepared

from retro_jax.config import RetroConfig
from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.sequences import write_sequences
from retro_jax.data.stage import Stage, shard_name
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import train_tokenizer
from retro_jax.retrieval.neighbours import NeighbourTable, neighbour_dtype

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "experiments" / "sample" / "sample.jsonl"
M, T, K, VOCAB = 8, 32, 2, 640

MODEL = RetroConfig(
    vocab_size=VOCAB,
    width=16,
    num_layers=2,
    num_heads=2,
    head_size=8,
    ffw_width=32,
    chunk_length=M,
    neighbour_length=2 * M,
    cca_layers=(1, 2),
    encoder_width=16,
    encoder_layers=1,
    encoder_num_heads=2,
    encoder_head_size=8,
    encoder_ffw_width=32,
)

RECIPE = """
from retro_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.config import to_config_dict


def get_config():
    return to_config_dict(
        TrainConfig(
            model=RetroConfig(**{model!r}),
            data=DataConfig(sequences=({sequences!r},)),
            optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2),
            mesh=MeshConfig(),
            checkpoint=CheckpointConfig(every_steps=10),
            steps=40,
            batch_size=4,
            log_every=1,
        )
    )
"""


@dataclasses.dataclass(frozen=True)
class SmallData:
    """Directories of the data set and recipes of a RETRO and a baseline on it."""

    corpus: Path
    neighbours: Path
    database: Path
    sequences: Path
    recipe: Path
    baseline_recipe: Path


def make_small_data(root: Path) -> SmallData:
    """Twelve short documents with random neighbours."""
    documents = list(read_documents([SAMPLE]))
    tokenizer = train_tokenizer([d.text for d in documents], root / "tokenizer.model", vocab_size=VOCAB)
    for name, chosen in (("query", documents[::5]), ("database", documents[1::5])):
        rows = [
            {"id": d.id, "text": d.text[: 200 + 90 * i], "source": d.metadata["source"]} for i, d in enumerate(chosen)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus_directory, database = root / "corpus", root / "database"
    build_corpus([root / "query.jsonl"], tokenizer, corpus_directory, chunk_length=M)
    build_corpus([root / "database.jsonl"], tokenizer, database / "corpus", chunk_length=M)
    corpus, database_corpus = Corpus(corpus_directory), Corpus(database / "corpus")
    neighbours = root / "neighbours"
    write_random_neighbours(neighbours, corpus, database_corpus)
    sequences = root / "sequences"
    write_sequences(corpus, NeighbourTable(neighbours), database_corpus, sequences, length=T, k=K)
    recipes = []
    for name, model in (("retro", MODEL), ("baseline", dataclasses.replace(MODEL, cca_layers=()))):
        recipe = root / f"{name}.py"
        recipe.write_text(RECIPE.format(model=dataclasses.asdict(model), sequences=str(sequences)))
        recipes.append(recipe)
    return SmallData(corpus_directory, neighbours, database, sequences, *recipes)


def write_random_neighbours(directory: Path, corpus: Corpus, database: Corpus, k: int = 4) -> None:
    """A neighbours stage with random ids, some missing at the end of a row."""
    rng = np.random.default_rng(0)
    rows = np.zeros(corpus.num_chunks, neighbour_dtype(k))
    rows["ids"] = rng.integers(0, database.num_chunks, (corpus.num_chunks, k))
    rows["ids"][::7, 1:] = -1
    rows["distances"] = np.where(rows["ids"] >= 0, np.arange(k), np.inf)
    inputs = {"corpus": corpus.fingerprint, "database": "random", "database_corpus": database.fingerprint}
    with Stage(directory, "neighbours", settings={"k": k, "filter": "document"}, inputs=inputs) as stage:
        with stage.shard(shard_name("neighbours", 0, 1, ".npy")) as (path, _), open(path, "wb") as file:
            np.save(file, rows)
        stage.finish({"chunks": corpus.num_chunks})


def program(name: str, *flags: str, devices: int = 1, stdin: int | None = None, **environment: str) -> subprocess.Popen:
    """Starts a program of launch/ or tools/ as a process of its own."""
    variables = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    return subprocess.Popen(
        [sys.executable, str(ROOT / name), *flags],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=ROOT,
        start_new_session=True,
    )


def run_program(name: str, *flags: str, timeout: float = 300, **options: object) -> tuple[int, str, str]:
    """Runs it to its end: (exit status, stdout, stderr)."""
    if options.keys() <= {"devices"} and (
        ended := run_prepared(ROOT / name, flags, options.get("devices", 1), timeout)
    ):
        return ended
    process = program(name, *flags, **options)
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def run_script(script: str, cwd: Path, **environment: str) -> str:
    """Runs commands of a page in bash, one after the other, with this Python; what they print, all having succeeded."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "JAX_NUM_CPU_DEVICES": "1", **environment}
    shell = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(shell, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def error_line(name: str, *flags: str, **options: object) -> str:
    """Runs a program that must fail as a user's mistake does, and gives its one line."""
    status, _, stderr = run_program(name, *flags, **options)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 1, f"exit status {status}:\n{stderr}"
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]
