"""The whole pipeline on the sample corpus, from text to a report.

    python launch/demo.py --workdir=demo

Every step is a program of tools/ or launch/, run with the command that is printed. A demo that was interrupted goes on
where it stopped: data sets and runs that are finished are not made again.
"""

import json
import os
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.evaluation.report import render
from retro_jax.files import atomic_write
from retro_jax.pipeline import Pipeline
from retro_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent

_WORKDIR = flags.DEFINE_string("workdir", "demo", "Directory for everything the demo makes.")
_EMBEDDER = flags.DEFINE_string("embedder", None, "BERT to embed with; all-MiniLM-L6-v2 is downloaded by default.")
_STEPS = flags.DEFINE_integer("steps", None, "Training steps of each model, for a shorter demo.", lower_bound=30)

INTRODUCTION = (
    "A small RETRO and the same decoder without retrieval, trained on 86 documents. As on the web, most pages have an "
    "older copy elsewhere: the database holds first revisions, and what is read and scored are often second ones, with "
    "other numbers and lines removed."
)
EVALUATIONS = {
    "revised": (
        "Revised documents",
        "Neither model has seen these five documents. Their first revisions are in the database, so what they say can "
        "be looked up: here retrieval should pay.",
    ),
    "new": (
        "New documents",
        "Neither the training set nor the database holds these five documents in any revision; neighbours are merely "
        "of the same kind. Here there is little to gain, and a model that trusts its neighbours blindly would lose.",
    ),
}


def main() -> None:
    work = Path(_WORKDIR.value)
    work.mkdir(parents=True, exist_ok=True)
    demo = Pipeline(work, ROOT, "make demo", os.environ)

    # Text
    sample = ROOT / "experiments" / "sample" / "sample.jsonl"
    demo.run("documents", "tools/make_demo_text.py", input=sample, output=work / "text")
    demo.run(
        "tokenizer",
        "tools/train_tokenizer.py",
        input=work / "text" / "train.jsonl",
        output=work / "tokenizer.model",
        vocab_size=2048,
    )
    for name in ("database", "train", "revised", "new"):
        demo.run(
            f"corpus of {name}",
            "tools/build_corpus.py",
            input=work / "text" / f"{name}.jsonl",
            tokenizer=work / "tokenizer.model",
            output=work / name / "corpus",
        )

    # Database and neighbours
    embedder = _EMBEDDER.value
    if embedder is None:
        embedder = work / "embedder"
        demo.run("embedder", "tools/fetch_embedder.py", output=embedder)
    for name in ("database", "train", "revised", "new"):
        demo.run(
            f"embeddings of {name}",
            "tools/embed_chunks.py",
            corpus=work / name / "corpus",
            embedder=embedder,
            normalize=True,
            output=work / name / "embeddings",
        )
    database = work / "database"
    demo.run("index", "tools/build_index.py", embeddings=database / "embeddings", output=database / "index")
    for name in ("train", "revised", "new"):
        demo.run(
            f"neighbours of {name}",
            "tools/find_neighbours.py",
            corpus=work / name / "corpus",
            embeddings=work / name / "embeddings",
            database=database,
            # The documents to be scored are no part of the database, so there is nothing to keep from them.
            filter="document" if name == "train" else "none",
            output=work / name / "neighbours",
        )
    demo.run(
        "sequences",
        "tools/write_sequences.py",
        corpus=work / "train" / "corpus",
        neighbours=work / "train" / "neighbours",
        database=database,
        output=work / "sequences",
        length=256,
        k=2,
    )

    # Training
    more = {"config.steps": _STEPS.value} if _STEPS.value else {}
    for run, recipe in (("baseline", "experiments/demo.py:demo-baseline"), ("retro", "experiments/demo.py")):
        settings = {"config": recipe, "workdir": work / run, "config.data.sequences": work / "sequences", **more}
        demo.run(f"training of the {run}", "launch/train.py", **settings)

    # Evaluation, sample, report
    for name in EVALUATIONS:
        demo.run(
            f"evaluation on {name} documents",
            "launch/evaluate.py",
            workdir=f"{work / 'baseline'},{work / 'retro'}",
            corpus=work / name / "corpus",
            neighbours=work / name / "neighbours",
            database=database,
            output=work / f"bpb_{name}.json",
        )
    sampling = {"workdir": work / "retro", "prompt": _beginning(work, 240), "max_new_tokens": 96, "temperature": 0}
    demo.run(
        "sample with retrieval",
        "launch/sample.py",
        **sampling,
        database=database,
        embedder=embedder,
        output=work / "sample_on.json",
    )
    demo.run("sample without retrieval", "launch/sample.py", **sampling, output=work / "sample_off.json")
    excerpt = work / "text" / "excerpt.txt"
    with atomic_write(excerpt) as temporary:
        temporary.write_text(_beginning(work, 1600), encoding="utf-8")
    page = work / "explorer.html"
    demo.run(
        "explorer's page",
        "launch/explore.py",
        workdir=work / "retro",
        database=database,
        embedder=embedder,
        prompt_file=excerpt,
        max_new_tokens=0,
        html=page,
    )
    report = _write_report(work, demo.stages, page)
    print(f"\nThe report: {report}\nWhat retrieval changed, token by token: {page}")


def _beginning(work: Path, characters: int) -> str:
    """The first words of a revised document: 240 characters are a little more than one chunk."""
    with open(work / "text" / "revised.jsonl", encoding="utf-8") as file:
        text = json.loads(file.readline())["text"]
    return text[:characters].rsplit(" ", 1)[0]


def _write_report(work: Path, stages: list[tuple[str, float]], explorer: Path) -> Path:
    results = {
        name: json.loads((work / f"bpb_{name}.json").read_text(encoding="utf-8"))["results"] for name in EVALUATIONS
    }
    counts = {
        "documents trained on": _count(work / "train" / "corpus", "documents"),
        "chunks in the database": _count(work / "database" / "corpus", "chunks"),
        "training sequences": _count(work / "sequences", "sequences"),
    }
    page = render(
        title="retro_jax demo",
        introduction=INTRODUCTION,
        facts=[
            *((name, f"{count:,}") for name, count in counts.items()),
            ("steps of each model", f"{results['revised'][0]['step']:,}"),
            ("time of all stages", f"{sum(seconds for _, seconds in stages) / 60:.1f} min"),
        ],
        curves={name: read_metrics(work / name) for name in ("baseline", "retro")},
        evaluations=[(*EVALUATIONS[name], results[name]) for name in EVALUATIONS],
        samples=[_read(work / f"sample_{mode}.json") for mode in ("on", "off")],
        stages=stages,
        explorer=(explorer.name, "The same for a revised document, token by token"),
    )
    path = work / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _count(directory: Path, unit: str) -> int:
    return _read(directory / "manifest.json")["counts"][unit]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    program.run(main)
