"""All results of docs/results, from text to report: RETRO against the same decoder and other methods on real text.

    python launch/results.py --data=FOLDER --publish=docs/results
    python launch/results.py --data=FOLDER --publish=docs/results-large --size=large      # one GPU
    python launch/results.py --data=FOLDER --size=trial                                   # minutes: does it run?

FOLDER holds text that is not part of this repository:

    corpus/train-*.jsonl.gz        documents with id, source, domain, language, text: trained on and retrieved from
    corpus/valid-*.jsonl.gz        the same kind of documents, held out
    corpus/redundant-*.jsonl.gz    optional: documents of which train holds other versions, named by `train_id`
    wikitext/valid.txt             optional: WikiText's validation articles, raw
    lambada/*.jsonl                optional: LAMBADA's examples, {"text": ...} a line

The collections (`domain`) that `small` takes are named in retro_jax/result_sizes.py; for other text name yours there.
Every step is a program of tools/ or launch/, run with the command that is printed; after an interruption the same
command goes on where it stopped. The last step is a corpus of planted facts (tools/make_planted_text.py), which shows
whether the model looks up what it cannot know. With --publish tables and plots, commands, seeds, versions, machine and
checksums are put into a folder of small files (up to 4 MB each), which is replaced as a whole.
"""

import json
import os
import shlex
import sys
from pathlib import Path

from absl import flags

from retro_jax import machine, program
from retro_jax.data.stage import load_manifest
from retro_jax.errors import UserError
from retro_jax.pipeline import Pipeline
from retro_jax.publishing import check_target, publish
from retro_jax.result_sizes import SIZES, Size

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("knn_lm", "cache", "prepend", "bm25", "bm25_rerank")

_TEXT = """\
## Real text

RETRO and the same decoder without retrieval, the baseline, were trained on the same {documents:,} documents of
{bytes:,} bytes. These are the database too, {chunks:,} chunks; in training no chunk retrieves from its own document. ON
reads the database, OFF is the same RETRO without it, and shuffled gives every chunk the neighbours of another
document's. Held-out documents and database are of"""
_PLANTED = """\
## Planted facts

The database is a register of people who do not exist. Both models were trained on {documents:,} texts that ask for an
entry and then give it, and are asked for facts of other people, on whom nothing was trained. A value is one of twelve,
so guessing finds 8.3 %."""
SEED = 0  # of all that is drawn
_TRAINING_SEEDS = {"config.seed": SEED, "config.data.seed": SEED}

_DATA = flags.DEFINE_string("data", None, "Folder with the text; see above.", required=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory for everything that is made; by default results, or results-SIZE where it is not small."
)
_SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "How much text, and which recipe of experiments/results.py.")
_PUBLISH = flags.DEFINE_string("publish", None, "Folder to put tables and plots into, and how they were made.")
_EMBEDDER = flags.DEFINE_string("embedder", None, "BERT to embed with; all-MiniLM-L6-v2 is downloaded by default.")


def main() -> None:
    data, name, size = Path(_DATA.value), _SIZE.value, SIZES[_SIZE.value]
    work = Path(_WORKDIR.value or ("results" if name == "small" else f"results-{name}"))
    inputs = _inputs(data)
    if _PUBLISH.value:
        check_target(Path(_PUBLISH.value), work)
    work.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(work, ROOT, f"python launch/results.py {shlex.join(sys.argv[1:])}", os.environ)
    embedder = _EMBEDDER.value
    if embedder is None:
        embedder = work / "embedder"
        pipeline.run("embedder", "tools/fetch_embedder.py", output=embedder)
    sets = _choose_text(pipeline, inputs, work, size)
    _index(pipeline, work, sets, embedder, size)
    _train(pipeline, work, size)
    pipeline.run(
        "evaluation",
        "launch/evaluate.py",
        suite="paper",
        workdir=(work / "baseline", work / "retro"),
        database=work / "database",
        embedder=embedder,
        sets=[work / name for name in sets],
        sweeps=[name for name in ("valid", "redundant") if name in sets],
        ks=size.ks,
        shares=size.shares,
        steps=size.steps,
        methods=METHODS,
        tuning=work / "valid",
        datastore_share=size.datastore_share,
        output=work / "report",
    )
    _planted(pipeline, work / "planted", embedder, size)
    found = _what_was_looked_up(work / "planted" / "report" / "results.json")
    print("\n".join(found))
    if _PUBLISH.value:
        _publish(pipeline, work, data, inputs, found)
    minutes = sum(seconds for _, seconds in pipeline.stages) / 60
    print(f"\nAll in {minutes:.0f} minutes: {work / 'report' / 'results.html'}, {work / 'planted' / 'report'}")


def _inputs(data: Path) -> dict[str, list[Path]]:
    """Files of each kind of text in the folder."""
    patterns = {
        "train": "corpus/train-*.jsonl*",
        "valid": "corpus/valid-*.jsonl*",
        "redundant": "corpus/redundant-*.jsonl*",
        "wikitext": "wikitext/valid.txt",
        "lambada": "lambada/*.jsonl",
    }
    found = {name: sorted(data.glob(pattern)) for name, pattern in patterns.items()}
    for needed in ("train", "valid"):
        if not found[needed]:
            raise UserError(f"--data: {data}/corpus/{needed}-*.jsonl.gz: no such file; `--help` says what is needed")
    return found


def _choose_text(pipeline: Pipeline, inputs: dict[str, list[Path]], work: Path, size: Size) -> list[str]:
    """Makes the text of the database and of every set; gives the sets' names."""
    redundant = inputs["redundant"]
    pipeline.run(
        "text of the database",
        "tools/select_documents.py",
        input=inputs["train"],
        output=work / "database" / "documents.jsonl",
        files=size.files,
        languages=size.languages,
        domains=size.domains,
        max_characters=size.max_characters,
        **({"bytes": size.train_bytes} if size.train_bytes else {}),
        **({"always": redundant} if redundant else {}),
    )
    pipeline.run(
        "text of valid",
        "tools/select_documents.py",
        input=inputs["valid"],
        output=work / "valid" / "documents.jsonl",
        languages=size.languages,
        domains=(*size.domains, *size.more_domains),
        max_characters=size.valid_characters,
        **({"bytes": size.valid_bytes} if size.valid_bytes else {}),
    )
    sets = ["valid"]
    if redundant:
        sets.append("redundant")
        pipeline.run(
            "text of redundant",
            "tools/select_documents.py",
            input=redundant,
            max_characters=size.valid_characters,
            output=work / "redundant" / "documents.jsonl",
        )
    for name, count in (("wikitext", size.articles), ("lambada", size.passages)):
        if inputs[name]:
            sets.append(name)
            pipeline.run(
                f"text of {name}",
                "tools/make_evaluation_text.py",
                kind=name,
                input=inputs[name],
                documents=count,
                output=work / name / "documents.jsonl",
            )
    return sets


def _index(pipeline: Pipeline, work: Path, sets: list[str], embedder: Path | str, size: Size) -> None:
    """Tokens, vectors, the index, and the neighbours of everything."""
    database, tokenizer = work / "database", work / "tokenizer.model"
    documents = {"database": database / f"documents-*-of-{size.files:05d}.jsonl"}
    documents |= {name: work / name / "documents.jsonl" for name in sets}
    pipeline.run(
        "tokenizer",
        "tools/train_tokenizer.py",
        input=documents["database"],
        vocab_size=size.vocab_size,
        max_sentences=200_000,
        seed=SEED,
        output=tokenizer,
    )
    _embed(pipeline, work, documents, tokenizer, embedder)
    pipeline.run("index", "tools/build_index.py", embeddings=database / "embeddings", output=database / "index")
    pipeline.run(
        "neighbours of the database",
        "tools/find_neighbours.py",
        corpus=database / "corpus",
        database=database,
        k=8,
        output=database / "neighbours",
    )
    for name in sets:
        pipeline.run(
            f"neighbours of {name}",
            "tools/find_neighbours.py",
            corpus=work / name / "corpus",
            embeddings=work / name / "embeddings",
            database=database,
            filter="none",
            k=100,
            output=work / name / "neighbours",
        )


def _train(pipeline: Pipeline, work: Path, size: Size) -> None:
    pipeline.run(
        "sequences",
        "tools/write_sequences.py",
        corpus=work / "database" / "corpus",
        neighbours=work / "database" / "neighbours",
        database=work / "database",
        length=size.length,
        k=2,
        seed=SEED,
        output=work / "sequences",
    )
    for run, suffix in (("baseline", "-baseline"), ("retro", "")):
        pipeline.run(
            f"training of the {run}",
            "launch/train.py",
            config=f"experiments/results.py:{_SIZE.value}{suffix}",
            workdir=work / run,
            **{"config.data.sequences": work / "sequences"},
            **_TRAINING_SEEDS,
        )


def _planted(pipeline: Pipeline, work: Path, embedder: Path | str, size: Size) -> None:
    """Facts of people who do not exist: asked for without and with the register that holds them."""
    text, tokenizer = work / "text", work / "tokenizer.model"
    pipeline.run("planted text", "tools/make_planted_text.py", people=size.people, seed=SEED, output=text)
    questions = work / "questions" / "documents.jsonl"
    pipeline.run(
        "planted questions",
        "tools/make_evaluation_text.py",
        kind="questions",
        input=text / "questions.jsonl",
        output=questions,
    )
    pipeline.run(
        "planted tokenizer",
        "tools/train_tokenizer.py",
        input=(text / "train.jsonl", text / "register.jsonl"),
        vocab_size=1024,
        model_type="bpe",
        seed=SEED,
        output=tokenizer,
    )
    documents = {name: text / f"{name}.jsonl" for name in ("register", "train")} | {"questions": questions}
    _embed(pipeline, work, documents, tokenizer, embedder, chunk_length=32, of="planted ")
    register = work / "register"
    pipeline.run("planted index", "tools/build_index.py", embeddings=register / "embeddings", output=register / "index")
    for name in ("train", "questions"):
        pipeline.run(
            f"planted neighbours of {name}",
            "tools/find_neighbours.py",
            corpus=work / name / "corpus",
            embeddings=work / name / "embeddings",
            database=register,
            filter="none",
            k=4,
            output=work / name / "neighbours",
        )
    pipeline.run(
        "planted sequences",
        "tools/write_sequences.py",
        corpus=work / "train" / "corpus",
        neighbours=work / "train" / "neighbours",
        database=register,
        length=64,
        k=1,
        seed=SEED,
        output=work / "sequences",
    )
    for run, recipe in (("baseline", "demo-baseline"), ("retro", "demo")):
        pipeline.run(
            f"planted training of the {run}",
            "launch/train.py",
            config=f"experiments/planted.py:{recipe}",
            workdir=work / run,
            **{"config.data.sequences": work / "sequences", "config.steps": size.planted_steps},
            **_TRAINING_SEEDS,
        )
    pipeline.run(
        "planted evaluation",
        "launch/evaluate.py",
        suite="paper",
        workdir=(work / "baseline", work / "retro"),
        database=register,
        embedder=embedder,
        sets=work / "questions",
        sweeps=(),
        steps=(),
        methods=(),
        output=work / "report",
    )


def _embed(
    pipeline: Pipeline,
    work: Path,
    documents: dict[str, Path],
    tokenizer: Path,
    embedder: Path | str,
    chunk_length: int = 64,
    of: str = "",
) -> None:
    """Chunks of each set's documents, and their vectors, in `work`/NAME; names of stages begin with `of`."""
    for name, files in documents.items():
        pipeline.run(
            f"{of}corpus of {name}",
            "tools/build_corpus.py",
            input=files,
            tokenizer=tokenizer,
            chunk_length=chunk_length,
            output=work / name / "corpus",
        )
        pipeline.run(
            f"{of}embeddings of {name}",
            "tools/embed_chunks.py",
            corpus=work / name / "corpus",
            embedder=embedder,
            normalize=True,
            compute_dtype="bfloat16" if machine.multiplies_bfloat16() else "float32",
            output=work / name / "embeddings",
        )


def _what_was_looked_up(path: Path) -> list[str]:
    """Shares of the planted values that are found: with the register nearly all, without it by chance."""
    (questions,) = json.loads(path.read_text(encoding="utf-8"))["sets"]
    return [
        f"planted values right, {row['label']}: {100 * row['completions']['natural']['accuracy']:.1f} %"
        for row in questions["rows"]
    ]


def _publish(pipeline: Pipeline, work: Path, data: Path, inputs: dict[str, list[Path]], found: list[str]) -> None:
    """Puts both reports, and how they were made, into the folder of --publish."""
    text = {str(path.relative_to(data)): path for paths in inputs.values() for path in paths}
    text |= {f"{work.name}/{path.relative_to(work)}": path for path in sorted(work.glob("*/documents*.jsonl"))}
    seeds = dict.fromkeys(("tokenizers", "order of sequences", "parameters", "planted people", "bootstrap"), SEED)
    size, target = SIZES[_SIZE.value], Path(_PUBLISH.value)
    collections = "all collections" if "*" in size.domains else f"the collections {', '.join(size.domains)}"
    if size.more_domains:
        collections += f"; held-out documents also of {', '.join(size.more_domains)}"
    paths = {data: "FOLDER", work: work.name, target: target.name, Path(_EMBEDDER.value or ""): "EMBEDDER"}
    listed = "\n".join(f"- {value}" for value in found)
    publish(
        target,
        {"text": work / "report", "planted": work / "planted" / "report"},
        title=f"Results: {_SIZE.value}",
        introduction={
            "text": f"{_TEXT.format(**_counts(work / 'database'))} {collections}.",
            "planted": f"{_PLANTED.format(**_counts(work / 'planted' / 'train'))}\n\n{listed}",
        },
        provenance=pipeline.provenance(text=text, seeds=seeds),
        spelling={str(path): name for path, name in paths.items() if path.is_absolute()},
    )
    print(f"published: {target / 'README.md'}")


def _counts(directory: Path) -> dict[str, int]:
    """Documents, bytes and chunks of a set."""
    return load_manifest(directory / "corpus", "corpus").counts


if __name__ == "__main__":
    program.run(main)
