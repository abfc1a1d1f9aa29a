"""The paper's evaluation as one resumable piece of work: every model, method, set and sweep that applies.

WORK/losses/SET/METHOD       losses of every token, one stage each; what is finished is not computed again
WORK/completions/...         scores of left-padded completions
WORK/results.json            all figures, computed from these in seconds
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluation.bits_per_byte import document_scores
from retro_jax.evaluation.completions import completion_scores, padded_losses
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.figures import Examined, bits_per_byte_gap, describe
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import TokenLosses, collect, kept_losses
from retro_jax.evaluation.methods import Method
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.passes import document_keys, scored_spans
from retro_jax.evaluation.suite_results import RESULTS
from retro_jax.files import write_json
from retro_jax.model.parameters import count_parameters
from retro_jax.retrieval.database import Database
from retro_jax.training.trained import TrainedRun

# As in the paper's table 14; the database's share of its documents is halved down to a thirty-second.
KS = (1, 2, 3, 4, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
MODES = ("off", "on", "shuffled")
# Windows of chunks with more neighbours than this are scored in smaller batches.
_NEIGHBOURS_A_WINDOW = 8

# Name of a model to the comparison methods that run on it.
Methods = dict[str, list[Method]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a suite evaluates.

    Attributes:
      window, stride: in tokens.
      batch_size: windows at a time; does not change the result.
      k: neighbours fed to a RETRO.
      modes: of MODES, what is evaluated of a RETRO.
      ks, shares: of the sweeps, over the neighbours fed and over the share of the database's documents.
      sweeps: names of the sets that are swept over, and over which models of other steps are scored.
    """

    window: int
    stride: int
    batch_size: int
    k: int
    modes: tuple[str, ...] = MODES
    ks: tuple[int, ...] = KS
    shares: tuple[float, ...] = SHARES
    sweeps: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained run at one step, under the name that reports give it."""

    name: str
    run: TrainedRun

    @property
    def is_baseline(self) -> bool:
        return self.run.config.model.is_baseline

    def describe(self) -> dict[str, Any]:
        """What it is, JSON-serialisable."""
        config = self.run.config
        return {
            "name": self.name,
            "step": self.run.step,
            "parameters": count_parameters(config.model),
            "is_baseline": self.is_baseline,
            "training_tokens": self.run.step * config.batch_size * config.data.length,
            "neighbours_in_training": config.data.neighbours,
        }


class Suite:
    """Scores sets with models and methods, keeps the losses, and gathers the figures."""

    def __init__(
        self,
        work: Path,
        settings: Settings,
        sets: Mapping[str, Examined],
        *,
        methods: Methods | None = None,
        database: Database | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        """Prepares a suite.

        Args:
          work: directory for losses and results.
          settings: how.
          sets: by name.
          methods: name of a model to the comparison methods that run on it.
          database: opened with its embedder, for completions with padded contexts; None leaves these out.
          left_out: what is not evaluated and why, for the report.
        """
        self._work = work
        self._settings = settings
        self._sets = sets
        self._methods = methods or {}
        self._database = database
        self._forwards: dict[tuple[str, bool, int], Forward] = {}
        self._left_out = [*left_out]

    def run(self, models: Sequence[Model], earlier: Sequence[Model] = ()) -> dict[str, Any]:
        """Evaluates everything and writes results.json.

        Args:
          models: baselines and RETROs; the first baseline is what the others are compared with.
          earlier: the same runs at other steps, scored on the swept sets alone.

        Returns:
          what was written: what there is no way to evaluate is named under "left_out".

        Raises:
          UserError: a set has no neighbours for a RETRO with retrieval, or too few.
        """
        self._require_neighbours(models)
        results: dict[str, Any] = {
            **RESULTS,
            "settings": dataclasses.asdict(self._settings),
            "models": [model.describe() for model in models],
            "sets": [self._evaluate(examined, models) for examined in self._sets.values()],
            "sweeps": [],
        }
        for name in self._settings.sweeps:
            examined = self._sets[name]
            reading = [model for model in models if "on" in self._modes(examined, model)]
            if not reading:
                self._left_out.append(f"{name}: sweeps over neighbours and database, as no RETRO is evaluated ON")
            for model in reading:
                results["sweeps"] += self._sweeps(examined, model)
            results["sweeps"] += self._steps(examined, models, earlier)
        results["left_out"] = list(dict.fromkeys(self._left_out))
        write_json(self._work / "results.json", results)
        return results

    def _require_neighbours(self, models: Sequence[Model]) -> None:
        reading = [model.name for model in models if not model.is_baseline]
        if reading and any(map(_retrieves, self._settings.modes)):
            for name, examined in self._sets.items():
                if examined.evaluated.neighbours is None:
                    raise UserError(
                        f"{name}: no neighbours of this set are there, so {reading[0]} cannot be evaluated ON; find "
                        "them first, or give --modes=off"
                    )

    def _evaluate(self, examined: Examined, models: Sequence[Model]) -> dict[str, Any]:
        """Rows and differences of one set."""
        scored: dict[str, TokenLosses] = {}
        padded: dict[str, TokenLosses] = {}
        rows: list[dict[str, Any]] = []
        name = examined.evaluated.name
        for model in models:
            for mode in self._modes(examined, model):
                label, k = _label(model, mode), self._settings.k if _retrieves(mode) else 0
                scored[label] = self._losses(examined, model, mode)
                rows.append({"label": label, "model": model.name, "method": mode, "k": k, "options": {}})
                if examined.completions is None or mode == "shuffled":
                    continue
                if mode == "on" and self._database is None:
                    self._left_out.append(f"{name}: completions with padded contexts ON, which need the embedder")
                else:
                    padded[label] = self._padded_losses(examined, model, mode)
            for method in self._methods.get(model.name, ()):
                if method.needs_neighbours and examined.evaluated.neighbours is None:
                    self._left_out.append(f"{name}: {method.name}, which needs neighbours of the set")
                    continue
                label = _label(model, method.name)
                scored[label] = self._method_losses(examined, model, method)
                row = {"label": label, "model": model.name, "method": method.name, "k": None}
                rows.append({**row, "options": method.settings})
        for row in rows:
            row["reference"] = None if row is rows[0] else rows[0]["label"]
            row |= examined.figures(scored[row["label"]])
            if row["label"] in padded:
                scores = completion_scores(padded[row["label"]], examined.completions)
                row["completions"]["padded"] = scores.as_json()
        differences = []
        for first, second in _pairs(rows):
            entries = examined.differences(scored[first], scored[second])
            if first in padded and second in padded:
                entries += examined.completion_differences(padded[first], padded[second], "padded")
            differences += [{"first": first, "second": second, **entry} for entry in entries]
        return {**describe(examined), "rows": rows, "differences": differences}

    def _modes(self, examined: Examined, model: Model) -> Sequence[str]:
        if model.is_baseline:
            return ("baseline",)
        modes, others = self._settings.modes, tuple(mode for mode in self._settings.modes if mode != "shuffled")
        if others == modes or not others or len(np.unique(document_keys(examined.evaluated.corpus))) > 1:
            return modes
        self._left_out.append(f"{examined.evaluated.name}: shuffled, as all documents are of one group")
        return others

    def _sweeps(self, examined: Examined, model: Model) -> Iterator[dict[str, Any]]:
        """bpb against the neighbours fed and against the share of the database, with the difference from OFF."""
        settings, stored = self._settings, examined.evaluated.neighbours.k
        too_many = [str(k) for k in settings.ks if k > stored]
        if too_many:
            name = examined.evaluated.name
            self._left_out.append(f"{name}: k = {', '.join(too_many)}, as {stored} neighbours of a chunk are stored")
        ks = [k for k in settings.ks if k <= stored]
        for kind, values in (("k", ks), ("share", settings.shares)):
            if values:
                yield self._sweep(kind, examined, model, values)

    def _sweep(self, kind: str, examined: Examined, model: Model, values: Sequence[float]) -> dict[str, Any]:
        """Points of ON, each with its difference from OFF and from the first point, and OFF beside them."""
        off = self._losses(examined, model, "off")
        every = [self._losses(examined, model, "on", **{kind: value}) for value in values]
        points = []
        for value, losses in zip(values, every, strict=True):
            point = {"x": value, **_swept(examined.figures(losses)), "difference": bits_per_byte_gap(off, losses)}
            point["growth"] = bits_per_byte_gap(every[0], losses)
            if kind == "share":
                point["neighbours_found"] = self._neighbours_found(examined.evaluated, value)
            points.append(point)
        swept = {"kind": kind, "set": examined.evaluated.name, "model": model.name}
        return {**swept, "off": _swept(examined.figures(off)), "points": points}

    def _neighbours_found(self, evaluated: Evaluated, share: float) -> float:
        """Mean number of neighbours of a chunk, out of k, when a share of the database is searched."""
        neighbourhood = Neighbourhood(evaluated.neighbours, evaluated.database, self._settings.k, share=share)
        ids = neighbourhood.ids(np.arange(evaluated.corpus.num_chunks))
        return float((ids >= 0).sum(axis=1).mean())

    def _steps(self, examined: Examined, models: Sequence[Model], earlier: Sequence[Model]) -> Iterator[dict[str, Any]]:
        """bpb against the training step, for every run that has models of several steps."""
        for model in models:
            same = sorted([*(one for one in earlier if one.name == model.name), model], key=lambda one: one.run.step)
            if len(same) < 2:
                continue
            for mode in self._modes(examined, model):
                if mode == "shuffled":
                    continue
                every = [self._losses(examined, one, mode) for one in same]
                points = [
                    {
                        "x": one.run.step,
                        "bits_per_byte": document_scores(losses).total().bits_per_byte,
                        "growth": bits_per_byte_gap(every[0], losses),
                    }
                    for one, losses in zip(same, every, strict=True)
                ]
                label = _label(model, mode)
                yield {"kind": "step", "set": examined.evaluated.name, "model": label, "points": points}

    def _losses(
        self, examined: Examined, model: Model, mode: str, *, k: int | None = None, share: float = 1.0
    ) -> TokenLosses:
        """Losses of a model alone, computed once."""
        evaluated, settings = examined.evaluated, self._settings
        described: dict[str, Any] = {"mode": mode, "window": settings.window, "stride": settings.stride}
        if mode == "shuffled":
            described["shuffled"] = "among other groups"
        if examined.completions is not None:
            described["best"] = True
        inputs = {"model": model.run.fingerprint}
        name, neighbourhood = f"{_label(model, mode)}-step{model.run.step}", None
        if _retrieves(mode):
            table = evaluated.neighbours
            neighbourhood = Neighbourhood(
                table,
                evaluated.database,
                settings.k if k is None else k,
                shuffled=mode == "shuffled",
                share=share,
            )
            described |= {"k": neighbourhood.k, "share": share}
            inputs["neighbours"] = table.fingerprint
            name += f"-k{neighbourhood.k}" + (f"-share{share:g}" if share < 1 else "")

        def compute() -> TokenLosses:
            spans = scored_spans(
                self._forward(model, examined, neighbourhood.k if neighbourhood is not None else 0),
                evaluated.corpus,
                window=settings.window,
                stride=settings.stride,
                neighbourhood=neighbourhood,
                description=f"{evaluated.name}: {name}",
            )
            return collect(evaluated.corpus, spans)

        directory = self._work / "losses" / evaluated.name / name
        return kept_losses(directory, evaluated.corpus, compute, settings=described, inputs=inputs)

    def _method_losses(self, examined: Examined, model: Model, method: Method) -> TokenLosses:
        directory = self._work / "losses" / examined.evaluated.name / _label(model, method.name)
        settings = {"window": self._settings.window, "stride": self._settings.stride, **method.settings}
        settings |= _asked(examined)
        inputs = {"model": model.run.fingerprint, **method.inputs}
        if examined.evaluated.neighbours is not None:
            inputs["neighbours"] = examined.evaluated.neighbours.fingerprint
        corpus = examined.evaluated.corpus
        return kept_losses(
            directory,
            corpus,
            lambda: method.losses(examined.evaluated, examined.completions),
            settings=settings,
            inputs=inputs,
        )

    def _padded_losses(self, examined: Examined, model: Model, mode: str) -> TokenLosses:
        settings: dict[str, Any] = {"mode": mode, "window": self._settings.window, "alignment": "padded"}
        settings |= _asked(examined)
        inputs = {"model": model.run.fingerprint}
        database = self._database if mode == "on" else None
        if database is not None:
            settings["k"] = self._settings.k
            inputs["database"] = database.fingerprint

        def compute() -> TokenLosses:
            return padded_losses(
                self._forward(model, examined),
                corpus,
                examined.completions,
                window=self._settings.window,
                database=database,
                k=self._settings.k,
            )

        corpus = examined.evaluated.corpus
        directory = (
            self._work / "losses" / examined.evaluated.name / f"{_label(model, mode)}-step{model.run.step}-padded"
        )
        return kept_losses(directory, corpus, compute, settings=settings, inputs=inputs)

    def _forward(self, model: Model, examined: Examined, k: int = 0) -> Forward:
        """The model, compiled once for each kind of work."""
        # What completions ask for costs the output head once more; and many neighbours fill the memory.
        best = examined.completions is not None
        batch_size = self._settings.batch_size
        if k > _NEIGHBOURS_A_WINDOW:
            batch_size = max(1, batch_size * _NEIGHBOURS_A_WINDOW // k)
        key = (model.run.fingerprint, best, batch_size)
        if key not in self._forwards:
            run = model.run
            self._forwards[key] = Forward(
                run.plan,
                run.params,
                run.mesh,
                batch_size=batch_size,
                best=best,
                vocab_block=run.config.vocab_block,
            )
        return self._forwards[key]


def check_names(names: Sequence[str], what: str) -> None:
    """Raises UserError unless all names differ and can name a directory."""
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{what} {name!r}: a name is of letters, digits, '_', '-' and '.'")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"{what} {repeated[0]!r} is there twice; give each its own name")


def _asked(examined: Examined) -> dict[str, str]:
    """What losses depend on that know the most probable tokens, or any, only where completions are."""
    return {} if examined.completions is None else {"asked": examined.digests["completions"]}


def _swept(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of all figures those that points of a sweep keep."""
    return {name: value for name, value in figures.items() if name not in ("leakage", "settings", "digests")}


def _retrieves(mode: str) -> bool:
    return mode not in ("baseline", "off")


def _label(model: Model, method: str) -> str:
    return model.name if method == "baseline" else f"{model.name}-{method}"


def _pairs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Which rows are compared: each with the first, and within a RETRO each with OFF and with ON."""
    pairs = [(rows[0]["label"], row["label"]) for row in rows[1:]]
    for row in rows:
        own = {other["method"]: other["label"] for other in rows if other["model"] == row["model"]}
        pairs += [
            (own[mode], row["label"]) for mode in ("off", "on") if mode in own and row["method"] not in ("off", mode)
        ]
    return list(dict.fromkeys(pairs))
