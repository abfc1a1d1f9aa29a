"""All results of docs/results.md, from text to report: RETRO against the same decoder and other methods on real text.

    python launch/results.py --data=FOLDER --workdir=results
    python launch/results.py --data=FOLDER --workdir=results-large --size=large      # one GPU
    python launch/results.py --data=FOLDER --workdir=results-trial --size=trial      # minutes: does everything run?

FOLDER holds text that is not part of this repository:

    corpus/train-*.jsonl.gz        documents with id, source, domain, language, text: trained on and retrieved from
    corpus/valid-*.jsonl.gz        the same kind of documents, held out
    corpus/redundant-*.jsonl.gz    optional: documents of which train holds other versions, named by `train_id`
    wikitext/valid.txt             optional: WikiText's validation articles, raw
    lambada/*.jsonl                optional: LAMBADA's examples, {"text": ...} a line

Every step is a program of tools/ or launch/, run with the command that is printed; after an interruption the same
command goes on where it stopped. The last step is a corpus of planted facts (tools/make_planted_text.py), which shows
whether the model looks up what it cannot know.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.errors import UserError
from retro_jax.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Size:
    """How much text a size takes, and how it is evaluated.

    Attributes:
      languages: patterns of the documents' languages.
      train_bytes, valid_bytes: text trained on and retrieved from, and validated on; equal shares of every source.
      max_characters, valid_characters: documents longer than this are cut; many short ones say more than a few long.
      articles, passages: of WikiText and LAMBADA.
      vocab_size: of the tokenizer.
      length: tokens of a training sequence, and of a window.
      steps: checkpoints whose loss is drawn against the step.
      ks, shares: swept over.
      datastore_share: of the database's documents, for the datastore of kNN-LM, which has a key a token.
      people: of whom facts are planted.
    """

    languages: tuple[str, ...]
    train_bytes: int
    valid_bytes: int
    max_characters: int
    valid_characters: int
    articles: int
    passages: int
    vocab_size: int
    length: int
    steps: tuple[int, ...]
    ks: tuple[int, ...]
    shares: tuple[float, ...]
    datastore_share: float
    people: int


_LANGUAGES = ("en", "python", "c", "c++", "java", "javascript", "typescript", "go", "rust", "kotlin", "ruby", "shell")
SIZES = {
    "small": Size(
        languages=_LANGUAGES,
        train_bytes=16_000_000,
        valid_bytes=600_000,
        max_characters=20_000,
        valid_characters=8_000,
        articles=16,
        passages=300,
        vocab_size=4096,
        length=512,
        steps=(750, 1500, 2250),
        ks=(1, 2, 4, 10, 20, 40),
        shares=(1.0, 0.5, 0.25, 0.125, 0.0625),
        datastore_share=0.1,
        people=1500,
    ),
    "large": Size(
        languages=_LANGUAGES,
        train_bytes=170_000_000,
        valid_bytes=2_000_000,
        max_characters=100_000,
        valid_characters=30_000,
        articles=60,
        passages=1000,
        vocab_size=16_384,
        length=1024,
        steps=(1000, 2000, 3000),
        ks=(1, 2, 3, 4, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100),
        shares=(1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125),
        datastore_share=0.1,
        people=1500,
    ),
    "trial": Size(
        languages=("en",),
        train_bytes=300_000,
        valid_bytes=50_000,
        max_characters=4_000,
        valid_characters=2_000,
        articles=2,
        passages=20,
        vocab_size=1024,
        length=256,
        steps=(15,),
        ks=(1, 10),
        shares=(1.0, 0.25),
        datastore_share=0.5,
        people=60,
    ),
}
METHODS = ("knn_lm", "cache", "prepend", "bm25", "bm25_rerank")

_DATA = flags.DEFINE_string("data", None, "Folder with the text; see above.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "results", "Directory for everything that is made.")
_SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "How much text, and which recipe of experiments/results.py.")
_PUBLISH = flags.DEFINE_string("publish", None, "Folder that tables, plots and figures are copied to.")
_EMBEDDER = flags.DEFINE_string("embedder", None, "BERT to embed with; all-MiniLM-L6-v2 is downloaded by default.")


def main() -> None:
    data, work, size = Path(_DATA.value), Path(_WORKDIR.value), SIZES[_SIZE.value]
    for needed in ("train", "valid"):
        if not list(data.glob(f"corpus/{needed}-*.jsonl*")):
            raise UserError(f"--data: {data}/corpus/{needed}-*.jsonl.gz: no such file; `--help` says what is needed")
    work.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(work, ROOT, "make results", os.environ)
    embedder = _EMBEDDER.value
    if embedder is None:
        embedder = work / "embedder"
        pipeline.run("embedder", "tools/fetch_embedder.py", output=embedder)
    sets = _choose_text(pipeline, data, work, size)
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
    _say_what_was_looked_up(work / "planted" / "report" / "results.json")
    if _PUBLISH.value:
        _publish(work, Path(_PUBLISH.value))
    minutes = sum(seconds for _, seconds in pipeline.stages) / 60
    print(f"\nAll in {minutes:.0f} minutes: {work / 'report' / 'results.html'}, {work / 'planted' / 'report'}")


def _choose_text(pipeline: Pipeline, data: Path, work: Path, size: Size) -> list[str]:
    """Makes the text of the database and of every set; gives the sets' names."""
    redundant = sorted(data.glob("corpus/redundant-*.jsonl*"))
    pipeline.run(
        "text of the database",
        "tools/select_documents.py",
        input=data / "corpus" / "train-*",
        bytes=size.train_bytes,
        output=work / "database" / "documents.jsonl",
        languages=size.languages,
        max_characters=size.max_characters,
        **({"always": redundant[0]} if redundant else {}),
    )
    pipeline.run(
        "text of valid",
        "tools/select_documents.py",
        input=data / "corpus" / "valid-*",
        bytes=size.valid_bytes,
        output=work / "valid" / "documents.jsonl",
        languages=size.languages,
        max_characters=size.valid_characters,
    )
    sets = ["valid"]
    if redundant:
        sets.append("redundant")
        options = {"input": redundant[0], "max_characters": size.max_characters}
        output = work / "redundant" / "documents.jsonl"
        pipeline.run("text of redundant", "tools/select_documents.py", **options, output=output)
    for name, pattern, count in (("wikitext", "valid.txt", size.articles), ("lambada", "*.jsonl", size.passages)):
        found = sorted((data / name).glob(pattern))
        if found:
            sets.append(name)
            options = {"kind": name, "input": found[0], "documents": count}
            output = work / name / "documents.jsonl"
            pipeline.run(f"text of {name}", "tools/make_evaluation_text.py", **options, output=output)
    return sets


def _index(pipeline: Pipeline, work: Path, sets: list[str], embedder: Path | str, size: Size) -> None:
    """Tokens, vectors, the index, and the neighbours of everything."""
    database, tokenizer = work / "database", work / "tokenizer.model"
    pipeline.run(
        "tokenizer",
        "tools/train_tokenizer.py",
        input=database / "documents.jsonl",
        vocab_size=size.vocab_size,
        max_sentences=200_000,
        output=tokenizer,
    )
    _embed(pipeline, work, ["database", *sets], tokenizer, embedder)
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
        output=work / "sequences",
    )
    for run, suffix in (("baseline", "-baseline"), ("retro", "")):
        pipeline.run(
            f"training of the {run}",
            "launch/train.py",
            config=f"experiments/results.py:{_SIZE.value}{suffix}",
            workdir=work / run,
            **{"config.data.sequences": work / "sequences"},
        )


def _planted(pipeline: Pipeline, work: Path, embedder: Path | str, size: Size) -> None:
    """Facts of people who do not exist: asked for without and with the register that holds them."""
    text, tokenizer = work / "text", work / "tokenizer.model"
    pipeline.run("planted text", "tools/make_planted_text.py", people=size.people, output=text)
    for name, source in (("register", "register"), ("train", "train")):
        _link(text / f"{source}.jsonl", work / name / "documents.jsonl")
    pipeline.run(
        "planted questions",
        "tools/make_evaluation_text.py",
        kind="questions",
        input=text / "questions.jsonl",
        output=work / "questions" / "documents.jsonl",
    )
    pipeline.run(
        "planted tokenizer",
        "tools/train_tokenizer.py",
        input=(text / "train.jsonl", text / "register.jsonl"),
        vocab_size=1024,
        model_type="bpe",
        output=tokenizer,
    )
    _embed(pipeline, work, ["register", "train", "questions"], tokenizer, embedder, chunk_length=32)
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
        output=work / "sequences",
    )
    for run, recipe in (("baseline", "demo-baseline"), ("retro", "demo")):
        pipeline.run(
            f"planted training of the {run}",
            "launch/train.py",
            config=f"experiments/planted.py:{recipe}",
            workdir=work / run,
            **{"config.data.sequences": work / "sequences"},
        )
    pipeline.run(
        "planted evaluation",
        "launch/evaluate.py",
        suite="paper",
        workdir=(work / "baseline", work / "retro"),
        database=register,
        embedder=embedder,
        sets=work / "questions",
        output=work / "report",
    )


def _embed(
    pipeline: Pipeline,
    work: Path,
    names: list[str],
    tokenizer: Path,
    embedder: Path | str,
    chunk_length: int = 64,
) -> None:
    """Chunks of each NAME/documents.jsonl, and their vectors."""
    for name in names:
        prefix = f"{work.name}: " if chunk_length != 64 else ""
        pipeline.run(
            f"{prefix}corpus of {name}",
            "tools/build_corpus.py",
            input=work / name / "documents.jsonl",
            tokenizer=tokenizer,
            chunk_length=chunk_length,
            output=work / name / "corpus",
        )
        pipeline.run(
            f"{prefix}embeddings of {name}",
            "tools/embed_chunks.py",
            corpus=work / name / "corpus",
            embedder=embedder,
            normalize=True,
            output=work / name / "embeddings",
        )


def _say_what_was_looked_up(path: Path) -> None:
    """Shares of the planted values that are found: with the register nearly all, without it by chance."""
    (questions,) = json.loads(path.read_text(encoding="utf-8"))["sets"]
    for row in questions["rows"]:
        print(f"planted values right, {row['label']}: {100 * row['completions']['natural']['accuracy']:.1f} %")


def _publish(work: Path, target: Path) -> None:
    """Copies both reports, without the losses they are made from."""
    for name, report in (("text", work / "report"), ("planted", work / "planted" / "report")):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(report, target / name, ignore=shutil.ignore_patterns("losses", "methods"))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.hardlink_to(source)


if __name__ == "__main__":
    program.run(main)
