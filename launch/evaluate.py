"""Exact bits-per-byte of trained runs over whole documents, with retrieval off, on and shuffled; the paper's suite.

    python launch/evaluate.py --workdir=runs/baseline,runs/retro --corpus=valid/corpus \\
        --neighbours=valid/neighbours --database=database --output=bpb.json
    launch/local.sh -n 2 python launch/evaluate.py ...        # in several processes, with the same figures
    python launch/evaluate.py --suite=paper --workdir=runs/baseline,runs/retro --database=database \\
        --sets=valid,wikitext,lambada --tuning=valid --embedder=embedder --output=results

A baseline is evaluated as it is. A RETRO is evaluated OFF (no retrieval), ON, and with the neighbours of other
documents (shuffled): when shuffled is as good as ON, retrieval is not used.

The suite does everything that applies to sets of documents, each a directory with corpus/, neighbours/ and, for
completions and words, documents.jsonl: by source, by leakage, by overlap, perplexity per word, completions in both
alignments, comparison methods, sweeps over neighbours, database size and training steps, and intervals
for all differences. It writes results.json, results.md, results.html and plots/, and goes on where it was stopped.
Without --methods it runs all that can be made, without --sweeps it sweeps over the first set with neighbours, and
without --steps over up to three earlier checkpoints; `--methods=`, `--sweeps=` and `--steps=` leave these out. What it
leaves out itself it names.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from retro_jax import program
from retro_jax.data.corpus import Corpus
from retro_jax.data.text import METADATA_KEYS
from retro_jax.errors import UserError
from retro_jax.evaluation.bits_per_byte import document_groups, document_scores
from retro_jax.evaluation.choice import chosen_datastore_share, chosen_methods, chosen_steps, chosen_sweeps
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.figures import Examined
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import collect
from retro_jax.evaluation.methods import METHODS, SEARCHES, MethodContext, MethodOptions, check_methods
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.passes import scored_spans
from retro_jax.evaluation.provenance import made_with
from retro_jax.evaluation.suite import KS, MODES, SHARES, Methods, Model, Settings, Suite, check_names
from retro_jax.evaluation.suite_report import write_report
from retro_jax.evaluation.suite_results import load_results, side_by_side
from retro_jax.evaluation.table import format_table
from retro_jax.files import write_json
from retro_jax.parallel import hosts
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.retrieval.segments import DatabaseCorpus
from retro_jax.training.checkpoint import saved_steps
from retro_jax.training.trained import TrainedRun, load_trained
from retro_jax.training.workdir import CHECKPOINTS

_WORKDIR = flags.DEFINE_list("workdir", None, "Runs to evaluate, separated by commas.")
_CORPUS = flags.DEFINE_string("corpus", None, "Corpus stage with the documents to score.")
_NEIGHBOURS = flags.DEFINE_string("neighbours", None, "Neighbours stage of that corpus; needed for on and shuffled.")
_DATABASE = flags.DEFINE_string("database", None, "Retrieval database the neighbours are from.")
_MODES = flags.DEFINE_list("modes", list(MODES), "What to evaluate of a RETRO: off, on, shuffled.")
_K = flags.DEFINE_integer("k", None, "Neighbours for each chunk; as in training by default.", lower_bound=1)
_WINDOW = flags.DEFINE_integer(
    "window", None, "Tokens of a window; the trained length, at most 2048, by default.", lower_bound=1
)
_STRIDE = flags.DEFINE_integer("stride", None, "Tokens between windows; half the window by default.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Windows at a time; does not change the result.", lower_bound=1)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.")
_GROUP_BY = flags.DEFINE_string("group_by", None, "Metadata key of the documents (source, language) to report by.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures; of a suite the directory.")

_SUITE = flags.DEFINE_enum("suite", None, ["paper"], "Evaluate everything that applies, on --sets.")
_SETS = flags.DEFINE_list("sets", [], "Suite: directories of sets of documents.")
_SWEEPS = flags.DEFINE_list(
    "sweeps", None, "Suite: names of sets (of their directories) that sweeps are made on; the first with neighbours."
)
_KS = flags.DEFINE_list("ks", [str(k) for k in KS], "Suite: numbers of neighbours to sweep over.")
_SHARES = flags.DEFINE_list("shares", [str(share) for share in SHARES], "Suite: shares of the database to sweep over.")
_STEPS = flags.DEFINE_list(
    "steps", None, "Suite: earlier checkpoints to score on the swept sets, where a run has them; up to three of them."
)
_METHODS = flags.DEFINE_list("methods", None, f"Suite: comparison methods, of {', '.join(METHODS)}; all that apply.")
_KNN_NEIGHBOURS = flags.DEFINE_integer(
    "knn_neighbours", 10, "Suite: neighbours of a token in kNN-LM and the gate.", lower_bound=1
)
_DATASTORE_SHARE = flags.DEFINE_float(
    "datastore_share",
    None,
    "Suite: of the database, for the datastore of kNN-LM; a million tokens by default.",
)
_DATASTORE_SEARCH = flags.DEFINE_enum("datastore_search", "auto", SEARCHES, "Suite: how the datastore is searched.")
_CACHE_SIZE = flags.DEFINE_integer("cache_size", 1024, "Suite: tokens that the cache remembers.", lower_bound=1)
_PREPENDED = flags.DEFINE_integer("prepended", 2, "Suite: neighbours read by prepend and rag.", lower_bound=1)
_PREPEND_STRIDE = flags.DEFINE_integer(
    "prepend_stride", 1, "Suite: chunks that are scored with the same prepended neighbours.", lower_bound=1
)
_CANDIDATES = flags.DEFINE_integer("candidates", 100, "Suite: neighbours that BM25 re-ranks.", lower_bound=1)
_TUNING = flags.DEFINE_string("tuning", None, "Suite: directory of the set that methods are tuned on.")
_EMBEDDER = flags.DEFINE_string("embedder", None, "Suite: of the database, for completions with padded contexts.")
_COMPARE = flags.DEFINE_list("compare", [], "Suites' directories to lay side by side in --output; nothing is scored.")
program.define_cluster_flags()


def main() -> None:
    if _COMPARE.value:
        _lay_side_by_side()
        return
    if not _WORKDIR.value:
        raise UserError("--workdir: name the runs to evaluate")
    if _SUITE.value:
        _run_suite()
        return
    if not _CORPUS.value:
        raise UserError("--corpus: name the corpus to evaluate on, or give --suite=paper and --sets")
    program.start_cluster()
    corpus = Corpus(_CORPUS.value)
    modes = _modes()
    if _GROUP_BY.value and _GROUP_BY.value not in METADATA_KEYS:
        raise UserError(f"--group_by: {_GROUP_BY.value!r} is none of {', '.join(METADATA_KEYS)}")
    results = []
    for workdir in _WORKDIR.value:
        results += _evaluate_run(load_trained(workdir, step=_STEP.value), corpus, modes)
    if not hosts.is_primary():
        return
    print(format_table(results))
    if _OUTPUT.value:
        measured = {"corpus": _CORPUS.value, "corpus_fingerprint": corpus.fingerprint, "results": results}
        write_json(_OUTPUT.value, measured)


def _modes() -> tuple[str, ...]:
    unknown = [mode for mode in _MODES.value if mode not in MODES]
    if unknown:
        raise UserError(f"--modes: {unknown[0]!r} is none of {', '.join(MODES)}")
    if not _MODES.value:
        raise UserError("--modes must not be empty")
    return tuple(dict.fromkeys(_MODES.value))


def _evaluate_run(run: TrainedRun, corpus: Corpus, modes: Sequence[str]) -> list[dict]:
    run.check_tokenizer(corpus.tokenizer_fingerprint, _CORPUS.value)
    window, stride = _windows(run)
    forward = Forward(run.plan, run.params, run.mesh, batch_size=_BATCH_SIZE.value, vocab_block=run.config.vocab_block)
    groups = document_groups(corpus, _GROUP_BY.value)
    results = []
    for mode in ["baseline"] if run.config.model.is_baseline else modes:
        spans = scored_spans(
            forward,
            corpus,
            window=window,
            stride=stride,
            neighbourhood=_neighbourhood(run, mode),
            description=f"{run.workdir.name} {mode}",
        )
        scores = document_scores(collect(corpus, spans))
        results.append(
            {
                "run": str(run.workdir),
                "step": run.step,
                "mode": mode,
                "k": _k(run) if mode in ("on", "shuffled") else 0,
                "window": window,
                "stride": stride,
                **scores.total().as_json(),
                "groups": {name: score.as_json() for name, score in scores.by_group(groups).items()},
            }
        )
    return results


def _neighbourhood(run: TrainedRun, mode: str) -> Neighbourhood | None:
    if mode not in ("on", "shuffled"):
        return None
    if not (_NEIGHBOURS.value and _DATABASE.value):
        raise UserError("evaluating a RETRO with retrieval needs --neighbours and --database; or give --modes=off")
    table = NeighbourTable(_NEIGHBOURS.value)
    database = DatabaseCorpus(_DATABASE.value)
    run.check_tokenizer(database.tokenizer_fingerprint, _DATABASE.value)
    return Neighbourhood(table, database, _k(run), shuffled=mode == "shuffled")


def _windows(run: TrainedRun) -> tuple[int, int]:
    window = _WINDOW.value or min(2048, run.config.data.length)
    chunk = run.config.model.chunk_length
    return window, _STRIDE.value or max(1, window // chunk // 2) * chunk


def _k(run: TrainedRun) -> int:
    return _K.value or run.config.data.neighbours


def _run_suite() -> None:
    if not (_SETS.value and _OUTPUT.value):
        raise UserError("--suite needs --sets, directories of sets of documents, and --output, a directory")
    program.start_cluster()
    if hosts.is_one_of_several():
        raise UserError("--suite runs in one process, on all its devices; start it once")
    output = Path(_OUTPUT.value)
    check_names([Path(workdir).name for workdir in _WORKDIR.value], "run")
    check_names([Path(directory).name for directory in _SETS.value], "set")
    unknown = set(_SWEEPS.value or ()) - {Path(directory).name for directory in _SETS.value}
    if unknown:
        raise UserError(f"--sweeps: {sorted(unknown)[0]!r} is no set of --sets")
    numbers = {
        "ks": _numbers("ks", _KS.value, int, lambda k: k >= 1, "a number of neighbours, 1 or more"),
        "shares": _numbers("shares", _SHARES.value, float, lambda share: 0 < share <= 1, "a share in (0, 1]"),
    }
    modes = _modes()
    models = [_model(workdir, _STEP.value) for workdir in _WORKDIR.value]
    models.sort(key=lambda model: not model.is_baseline)
    corpus = DatabaseCorpus(_DATABASE.value) if _DATABASE.value else None
    if corpus is None and modes != ("off",) and not all(model.is_baseline for model in models):
        raise UserError("evaluating a RETRO with retrieval needs --database; or give --modes=off")
    opened = {Path(directory): Evaluated.open(directory, corpus) for directory in _SETS.value}
    sweeps = chosen_sweeps(opened.values()) if _SWEEPS.value is None else tuple(_SWEEPS.value)
    run = next((model.run for model in models if not model.is_baseline), models[0].run)
    window, stride = _windows(run)
    settings = Settings(window, stride, _BATCH_SIZE.value, _k(run), modes, **numbers, sweeps=sweeps)
    sets = {}
    for directory, evaluated in opened.items():
        for model in models:
            model.run.check_tokenizer(evaluated.corpus.tokenizer_fingerprint, str(directory))
        sets[evaluated.name] = Examined(directory, evaluated, k=settings.k)
    database = _searchable() if _EMBEDDER.value and _DATABASE.value else None
    methods, left_out = _methods(models, settings, output, corpus)
    suite = Suite(output, settings, sets, methods=methods, database=database, left_out=left_out)
    results = suite.run(models, _earlier(models))
    for line in results["left_out"]:
        print(f"left out: {line}")
    command = f"python launch/evaluate.py {shlex.join(sys.argv[1:])}"
    facts = [*made_with().items(), ("seed of training", str(models[0].run.config.seed)), ("command", command)]
    print(f"The results: {write_report(output, 'Evaluation', results, facts=facts)}")


def _searchable() -> Database:
    """The database with its embedder."""
    from retro_jax.retrieval.embedder import Embedder, EmbeddingSet

    settings = EmbeddingSet(Path(_DATABASE.value) / "embeddings").manifest.settings["embedder"]
    embedder = Embedder.load(_EMBEDDER.value, normalize=settings["normalize"], max_length=settings["max_length"])
    return Database.open(_DATABASE.value, embedder)


def _numbers(
    flag: str, texts: Sequence[str], kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str
) -> tuple[Any, ...]:
    """The values of a flag that is a list of numbers, each once."""
    found = {}
    for text in texts:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise UserError(f"--{flag}: {text!r} is not {what}")
        found[value] = None
    return tuple(found)


def _model(workdir: str, step: int | None) -> Model:
    return Model(Path(workdir).name, load_trained(workdir, step=step))


def _earlier(models: list[Model]) -> list[Model]:
    """The runs at those of --steps that they have a checkpoint of, beside the one that is evaluated anyway."""
    there = {model.name: saved_steps(model.run.workdir / CHECKPOINTS) for model in models}
    if _STEPS.value is None:
        wanted = chosen_steps(there.values(), [model.run.step for model in models])
    else:
        saved = set().union(*there.values())
        found = _numbers("steps", _STEPS.value, int, saved.__contains__, "a step that any run has a checkpoint of")
        wanted = sorted(found)
    return [
        _model(str(model.run.workdir), step)
        for model in models
        for step in wanted
        if step in there[model.name] and step != model.run.step
    ]


def _methods(
    models: list[Model], settings: Settings, output: Path, database: DatabaseCorpus | None
) -> tuple[Methods, list[str]]:
    """Each comparison method on the first run that it is for, and which are left out where nobody names them."""
    names, left_out = _METHODS.value, []
    check_methods(names or ())
    if database is None:
        if names:
            raise UserError("--methods read a database: give --database")
        return {}, [] if names == [] else ["comparison methods, which read a database"]
    tuning = Evaluated.open(_TUNING.value, database) if _TUNING.value else None
    if names is None:
        kinds = {model.is_baseline for model in models}
        names, left_out = chosen_methods(baseline=True in kinds, retro=False in kinds, tuning=tuning is not None)
    share = _DATASTORE_SHARE.value
    options = MethodOptions(
        neighbours=_KNN_NEIGHBOURS.value,
        datastore_share=chosen_datastore_share(database) if share is None else share,
        datastore_search=_DATASTORE_SEARCH.value,
        cache_size=_CACHE_SIZE.value,
        prepended=_PREPENDED.value,
        prepend_stride=_PREPEND_STRIDE.value,
        candidates=_CANDIDATES.value,
    )
    found: Methods = {}
    for name in dict.fromkeys(names):
        kind = METHODS[name]
        model = next((model for model in models if model.is_baseline != kind.for_retro), None)
        if model is None:
            raise UserError(f"--methods: {name} is for a {'RETRO' if kind.for_retro else 'baseline'}; name one")
        context = MethodContext(
            run=model.run,
            window=settings.window,
            stride=settings.stride,
            batch_size=settings.batch_size,
            k=settings.k,
            database=Path(_DATABASE.value),
            work=output / "methods" / model.name,
            tuning=tuning,
            options=options,
        )
        found.setdefault(model.name, []).append(kind(context))
    return found, left_out


def _lay_side_by_side() -> None:
    if len(_COMPARE.value) < 2 or not _OUTPUT.value:
        raise UserError("--compare needs two directories of suites or more, and --output, a directory")
    check_names([Path(directory).name for directory in _COMPARE.value], "suite")
    found = {Path(directory).name: load_results(directory) for directory in _COMPARE.value}
    print(f"The results: {write_report(_OUTPUT.value, 'Side by side', side_by_side(found))}")


if __name__ == "__main__":
    program.run(main)
