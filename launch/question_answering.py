"""Question answering from text to table: closed book, with passages as neighbours, RETRO++, and a decoder that reads.

    python launch/question_answering.py --data=FOLDER --set=squad-1.1-dev-en --workdir=answering
    python launch/question_answering.py --data=FOLDER --workdir=answering --retro=runs/retro --baseline=runs/baseline
    python launch/question_answering.py --data=FOLDER --workdir=answering-trial --size=trial    # minutes: does it run?

FOLDER holds passages and questions, which are not part of this repository:

    NAME.passages.jsonl.gz     {"id": …, "title": …, "text": …} a line
    NAME.questions.jsonl.gz    {"question": …, "answers": […], "passage_id": …, "title": …} a line

Unless --retro and --baseline name trained runs (of one tokenizer), a RETRO and a baseline are trained first, on the
passages and on the documents of --text. Passages are found by BM25 and by vectors. Five runs are fine-tuned on the
questions about one part of the articles, their checkpoints compared on a second part, and scored on a third. Every step
is a program of tools/ or launch/, run with the command that is printed; after an interruption the same command goes on.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from retro_jax import program
from retro_jax.errors import UserError
from retro_jax.evaluation.question_answering import table
from retro_jax.files import atomic_write, file_sha256
from retro_jax.interop.checkpoint import open_base
from retro_jax.pipeline import Pipeline
from retro_jax.training.workdir import TOKENIZER

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained and asked.

    Attributes:
      vocab_size: of the tokenizer; that of the recipe in experiments/results.py.
      steps: of pre-training.
      text_bytes: of --text that are taken.
      retrievers: that find passages; those of the first one are read.
      dev_questions, test_questions: asked at most.
    """

    vocab_size: int
    steps: int
    text_bytes: int
    retrievers: tuple[str, ...]
    dev_questions: int
    test_questions: int


SIZES = {
    "small": Size(4096, 450, 4_000_000, ("dense", "bm25"), 200, 100_000),
    "large": Size(16_384, 4000, 170_000_000, ("dense", "bm25"), 1_000, 100_000),
    "trial": Size(1024, 20, 200_000, ("bm25",), 8, 16),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One fine-tuning.

    Attributes:
      name: in the table.
      base: "retro" or "baseline".
      layout: of LAYOUTS.
      recipe: suffix in experiments/question_answering.py.
    """

    name: str
    base: str
    layout: str
    recipe: str = ""


# Flags of tools/write_answers.py: 20 passages each, and chunks of prompt for RETRO++'s passage and for a whole window.
LAYOUTS: dict[str, dict[str, int]] = {
    "neighbours": {"prompt_chunks": 1, "passages": 20},
    "plus": {"prompt_chunks": 3, "passages": 19, "passages_in_prompt": 1},
    "reading": {"prompt_chunks": 7, "passages": 0, "passages_in_prompt": 20},
}
ARMS = {
    "closed-baseline": Arm("baseline, closed book", "baseline", "neighbours", "-decoder"),
    "closed-retro": Arm("RETRO[OFF], closed book", "retro", "neighbours", "-decoder"),
    "on": Arm("RETRO[ON]", "retro", "neighbours"),
    "plus": Arm("RETRO++", "retro", "plus"),
    "reading": Arm("baseline, reading", "baseline", "reading", "-decoder"),
}
CHUNK_LENGTH, NEIGHBOUR_LENGTH = 64, 128
PASSAGE_LENGTH = 112  # tokens, so that a passage with its title is about a neighbour

_DATA = flags.DEFINE_string("data", None, "Folder with passages and questions; see above.", required=True)
_SET = flags.DEFINE_string("set", None, "NAME of the set; needed where the folder holds several.")
_TEXT = flags.DEFINE_string("text", None, "Documents to pre-train on besides the passages, files or patterns.")
_RETRO = flags.DEFINE_string("retro", None, "Trained RETRO to begin with.")
_BASELINE = flags.DEFINE_string("baseline", None, "Trained baseline to begin with.")
_WORKDIR = flags.DEFINE_string("workdir", "answering", "Directory for everything that is made.")
_SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "How much is trained and asked.")
_EMBEDDER = flags.DEFINE_string("embedder", None, "BERT to embed with; all-MiniLM-L6-v2 is downloaded by default.")


def main() -> None:
    work, size = Path(_WORKDIR.value), SIZES[_SIZE.value]
    passages, questions = _inputs(Path(_DATA.value))
    if (_RETRO.value is None) != (_BASELINE.value is None):
        raise UserError("give both --retro and --baseline, or neither")
    work.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(work, ROOT, "python launch/question_answering.py", os.environ)
    if _RETRO.value is None:
        bases = _pretrain(pipeline, work, passages, size)
    else:
        bases = {"retro": Path(_RETRO.value), "baseline": Path(_BASELINE.value)}
    tokenizer = _tokenizer(bases)
    _check_kinds(bases)
    _retrieve(pipeline, work, passages, questions, tokenizer, size)
    examples = work / f"questions-{size.retrievers[0]}"
    for name, layout in LAYOUTS.items():
        pipeline.run(
            f"sequences, {name}",
            "tools/write_answers.py",
            examples=examples / "train.jsonl",
            tokenizer=tokenizer,
            output=work / "answers" / name,
            chunk_length=CHUNK_LENGTH,
            neighbour_length=NEIGHBOUR_LENGTH,
            **layout,
        )
    results = [_arm(pipeline, work, name, arm, bases[arm.base], examples, size) for name, arm in ARMS.items()]
    _write_table(work, results, size)


def _inputs(data: Path) -> tuple[Path, Path]:
    """Files of the passages and the questions."""
    found = {path.name.split(".passages.jsonl")[0]: path for path in sorted(data.glob("*.passages.jsonl*"))}
    if not found:
        raise UserError(f"--data: {data}/NAME.passages.jsonl.gz: no such file; `--help` says what is needed")
    name = _SET.value or next(iter(found))
    if name not in found or (_SET.value is None and len(found) > 1):
        raise UserError(f"--set names one of the sets in {data}: {', '.join(found)}")
    questions = found[name].with_name(found[name].name.replace(".passages.", ".questions."))
    if not questions.is_file():
        raise UserError(f"{questions}: no such file; `--help` says what is needed")
    return found[name], questions


def _pretrain(pipeline: Pipeline, work: Path, passages: Path, size: Size) -> dict[str, Path]:
    """Trains a RETRO and a baseline on the passages and what else there is, with neighbours by BM25."""
    text = [passages]
    if _TEXT.value:
        text.append(work / "text.jsonl")
        pipeline.run(
            "text", "tools/select_documents.py", input=_TEXT.value, bytes=size.text_bytes, output=work / "text.jsonl"
        )
    database, tokenizer = work / "database", work / f"tokenizer-{size.vocab_size}.model"
    if not tokenizer.is_file():  # one file, which is whole or not there
        pipeline.run("tokenizer", "tools/train_tokenizer.py", input=text, vocab_size=size.vocab_size, output=tokenizer)
    pipeline.run("corpus", "tools/build_corpus.py", input=text, tokenizer=tokenizer, output=database / "corpus")
    pipeline.run(
        "neighbours",
        "tools/find_neighbours.py",
        corpus=database / "corpus",
        database=database,
        retriever="bm25",
        k=4,
        output=database / "neighbours",
    )
    pipeline.run(
        "sequences",
        "tools/write_sequences.py",
        corpus=database / "corpus",
        neighbours=database / "neighbours",
        database=database,
        length=512,
        k=2,
        packing="packed",
        output=work / "sequences",
    )
    for run, suffix in (("baseline", "-baseline"), ("retro", "")):
        pipeline.run(
            f"pre-training of the {run}",
            "launch/train.py",
            config=f"experiments/results.py:{_SIZE.value}{suffix}",
            workdir=work / run,
            **{
                "config.data.sequences": work / "sequences",
                "config.steps": size.steps,
                "config.optimizer.warmup_steps": size.steps // 10,
            },
        )
    return {run: work / run for run in ("retro", "baseline")}


def _tokenizer(bases: dict[str, Path]) -> Path:
    """The tokenizer of both runs."""
    paths = [base / TOKENIZER for base in bases.values()]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; --retro and --baseline name the directories of trained runs")
    if len({file_sha256(path) for path in paths}) > 1:
        raise UserError(f"{paths[0]} and {paths[1]} are two tokenizers; the runs to compare must have one")
    return paths[0]


def _check_kinds(bases: dict[str, Path]) -> None:
    """Raises UserError when one is the other, since the table's rows would have wrong names, or has other chunks."""
    models = {name: open_base(base).config for name, base in bases.items()}
    for name, model in models.items():
        if model.is_baseline != (name == "baseline"):
            raise UserError(f"--{name}={bases[name]}: this model is a {'baseline' if model.is_baseline else 'RETRO'}")
    for name, model in models.items():
        if (model.chunk_length, model.neighbour_length) != (CHUNK_LENGTH, NEIGHBOUR_LENGTH):
            raise UserError(
                f"--{name}={bases[name]}: this model has chunks of {model.chunk_length} tokens and neighbours of "
                f"{model.neighbour_length}, here they have {CHUNK_LENGTH} and {NEIGHBOUR_LENGTH}; "
                "docs/question-answering.md has the steps one by one, with flags for both"
            )


def _retrieve(pipeline: Pipeline, work: Path, passages: Path, questions: Path, tokenizer: Path, size: Size) -> None:
    """Passages as a database, and those of every question."""
    database, options = work / "passages", {}
    pipeline.run(
        "corpus of passages",
        "tools/build_corpus.py",
        input=passages,
        tokenizer=tokenizer,
        chunk_length=PASSAGE_LENGTH,
        output=database / "corpus",
    )
    for retriever in size.retrievers:
        if retriever == "dense":
            embedder = _EMBEDDER.value or work / "embedder"
            if _EMBEDDER.value is None:
                pipeline.run("embedder", "tools/fetch_embedder.py", output=embedder)
            pipeline.run(
                "embeddings of passages",
                "tools/embed_chunks.py",
                corpus=database / "corpus",
                embedder=embedder,
                normalize=True,
                output=database / "embeddings",
            )
            pipeline.run(
                "index of passages",
                "tools/build_index.py",
                embeddings=database / "embeddings",
                output=database / "index",
            )
            options = {"embedder": embedder}
        pipeline.run(
            f"passages by {retriever}",
            "tools/retrieve_passages.py",
            questions=questions,
            database=database,
            retriever=retriever,
            k=20,
            dev_share=0.1,
            test_share=0.2,
            output=work / f"questions-{retriever}",
            **(options if retriever == "dense" else {}),
        )


def _arm(pipeline: Pipeline, work: Path, name: str, arm: Arm, base: Path, examples: Path, size: Size) -> dict[str, Any]:
    """Fine-tunes, chooses a checkpoint on dev, and answers test with it; gives the result on test."""
    run = work / "runs" / name
    pipeline.run(
        f"fine-tuning, {arm.name}",
        "launch/train.py",
        config=f"experiments/question_answering.py:{_SIZE.value}{arm.recipe}",
        workdir=run,
        **{
            "config.init_from": base,
            "config.data.sequences": work / "answers" / arm.layout,
            "config.data.neighbours": LAYOUTS[arm.layout]["passages"] or 1,
        },
    )
    # In the run's directory, which belongs to the model that it began with: another one is refused above.
    dev, test = (run / f"{part}.json" for part in ("dev", "test"))
    common = {"workdir": run, "sequences": work / "answers" / arm.layout}
    if not dev.is_file():
        pipeline.run(
            f"dev, {arm.name}",
            "launch/answer.py",
            examples=examples / "dev.jsonl",
            steps="all",
            limit=size.dev_questions,
            output=dev,
            **common,
        )
    if not test.is_file():
        (step,) = json.loads(dev.read_text(encoding="utf-8"))["best_steps"].values()
        pipeline.run(
            f"test, {arm.name}",
            "launch/answer.py",
            examples=examples / "test.jsonl",
            steps=step,
            limit=size.test_questions,
            output=test,
            **common,
        )
    (result,) = json.loads(test.read_text(encoding="utf-8"))["results"]
    return result


def _write_table(work: Path, results: list[dict[str, Any]], size: Size) -> None:
    """Recall of the passages and exact match of the arms, on test, as Markdown."""
    lines = ["| passages | recall@1 | recall@5 | recall@20 | answer in the 20 |", "| --- | --- | --- | --- | --- |"]
    for retriever in size.retrievers:
        manifest = json.loads((work / f"questions-{retriever}" / "manifest.json").read_text(encoding="utf-8"))
        recall = manifest["counts"]["test"]["recall"]
        shares = [recall[n]["passage"] for n in ("1", "5", "20")] + [recall["20"]["answer"]]
        cells = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
        lines.append(f"| {retriever} | {' | '.join(cells)} |")
    text = "\n".join([*lines, "", table(results, [arm.name for arm in ARMS.values()])])
    with atomic_write(work / "results.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{work / 'results.md'}; every answer is in {work / 'runs'}/*/test.json")


if __name__ == "__main__":
    program.run(main)
