"""Exact bits-per-byte of trained runs over whole documents, with retrieval off, on and shuffled.

    python launch/evaluate.py --workdir=runs/baseline,runs/retro --corpus=valid/corpus \\
        --neighbours=valid/neighbours --database=database --output=bpb.json
    launch/local.sh -n 2 python launch/evaluate.py ...        # in several processes, with the same figures

A baseline is evaluated as it is. A RETRO is evaluated OFF (no retrieval), ON, and with the neighbours of other
documents (shuffled): when shuffled is as good as ON, retrieval is not used.
"""

from absl import flags

from retro_jax import program
from retro_jax.data.corpus import Corpus
from retro_jax.data.stage import write_json
from retro_jax.data.text import METADATA_KEYS
from retro_jax.errors import UserError
from retro_jax.evaluation.bits_per_byte import document_groups, document_scores
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import collect
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.passes import scored_spans
from retro_jax.evaluation.table import format_table
from retro_jax.parallel import hosts
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.retrieval.segments import DatabaseCorpus
from retro_jax.training.trained import TrainedRun, load_trained

MODES = ("off", "on", "shuffled")

_WORKDIR = flags.DEFINE_list("workdir", None, "Runs to evaluate, separated by commas.")
_CORPUS = flags.DEFINE_string("corpus", None, "Corpus stage with the documents to score.")
_NEIGHBOURS = flags.DEFINE_string("neighbours", None, "Neighbours stage of that corpus; needed for on and shuffled.")
_DATABASE = flags.DEFINE_string("database", None, "Retrieval database the neighbours are from.")
_MODES = flags.DEFINE_list("modes", list(MODES), "What to evaluate of a RETRO: off, on, shuffled.")
_K = flags.DEFINE_integer("k", None, "Neighbours for each chunk; as in training by default.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("window", None, "Tokens of a window; the trained length, at most 2048, by default.")
_STRIDE = flags.DEFINE_integer("stride", None, "Tokens between windows; half the window by default.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Windows at a time; does not change the result.", lower_bound=1)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.")
_GROUP_BY = flags.DEFINE_string("group_by", None, "Metadata key of the documents (source, language) to report by.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures.")
program.define_cluster_flags()
flags.mark_flags_as_required(["workdir", "corpus"])


def main() -> None:
    program.start_cluster()
    corpus = Corpus(_CORPUS.value)
    unknown = [mode for mode in _MODES.value if mode not in MODES]
    if unknown:
        raise UserError(f"--modes: {unknown[0]!r} is none of {', '.join(MODES)}")
    if not (_WORKDIR.value and _MODES.value):
        raise UserError("--workdir and --modes must not be empty")
    if _GROUP_BY.value and _GROUP_BY.value not in METADATA_KEYS:
        raise UserError(f"--group_by: {_GROUP_BY.value!r} is none of {', '.join(METADATA_KEYS)}")
    results = []
    for workdir in _WORKDIR.value:
        results += _evaluate_run(load_trained(workdir, step=_STEP.value), corpus)
    if not hosts.is_primary():
        return
    print(format_table(results))
    if _OUTPUT.value:
        measured = {"corpus": _CORPUS.value, "corpus_fingerprint": corpus.fingerprint, "results": results}
        write_json(_OUTPUT.value, measured)


def _evaluate_run(run: TrainedRun, corpus: Corpus) -> list[dict]:
    run.check_tokenizer(corpus.tokenizer_fingerprint, _CORPUS.value)
    window = _WINDOW.value or min(2048, run.config.data.length)
    chunk = run.config.model.chunk_length
    stride = _STRIDE.value or max(1, window // chunk // 2) * chunk
    forward = Forward(run.plan, run.params, run.mesh, batch_size=_BATCH_SIZE.value, vocab_block=run.config.vocab_block)
    groups = document_groups(corpus, _GROUP_BY.value)
    results = []
    for mode in ["baseline"] if run.config.model.is_baseline else _MODES.value:
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


def _k(run: TrainedRun) -> int:
    return _K.value or run.config.data.neighbours


if __name__ == "__main__":
    program.run(main)
