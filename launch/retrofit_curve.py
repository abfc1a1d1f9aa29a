"""RETROfit of the demo's baseline, step by step, beside a RETRO from scratch and the baseline themselves.

    make demo
    python launch/retrofit_curve.py --demo=demo --workdir=retrofit-curve
    python launch/retrofit_curve.py --demo=demo --workdir=trial --steps=8 --every=4      # does everything run?

From the sequences of a finished demo it trains the baseline, the RETRO, the RETROfit of that baseline, and one of 3 %
of the steps, the share that the paper finds enough (section 4.2), keeping checkpoints; scores them on the demo's
documents; and writes curve.json, curve.md and curve-SET.png into the workdir. Nothing is written into the demo. Every
step is a program of launch/, run with the command that is printed; after an interruption the same command goes on where
it stopped.
"""

import json
import os
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.errors import UserError
from retro_jax.evaluation.retrofit_curve import markdown_table, plot, retrofit_curve
from retro_jax.files import atomic_write, write_json
from retro_jax.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent
SETS = ("revised", "new")
SHARE = 0.03  # of the steps, of the short RETROfit
WARMUP = 0.125  # of the steps, as in experiments/demo.py

_DEMO = flags.DEFINE_string("demo", "demo", "Workdir of a finished demo.")
_WORKDIR = flags.DEFINE_string("workdir", "retrofit-curve", "Directory for everything that is made.")
_STEPS = flags.DEFINE_integer("steps", 400, "Training steps of each model, as many as the demo's.", lower_bound=4)
_EVERY = flags.DEFINE_integer("every", 40, "Steps between the points of the curve.", lower_bound=1)


def main() -> None:
    demo, work, steps, every = Path(_DEMO.value), Path(_WORKDIR.value), _STEPS.value, _EVERY.value
    for needed in ("sequences", "database", *SETS):
        if not (demo / needed).is_dir():
            raise UserError(f"--demo: {demo / needed}: no such directory; `make demo` makes it")
    if every >= steps:
        raise UserError(f"--every={every} must be below --steps={steps}")
    work.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(work, ROOT, "python launch/retrofit_curve.py", os.environ)
    base = {"config.init_from": work / "baseline"}
    _train(pipeline, work / "baseline", "demo.py:demo-baseline", steps)
    _train(pipeline, work / "retro", "demo.py", steps)
    _train(pipeline, work / "retrofit", "retrofit_demo.py", steps, **base)
    _train(pipeline, work / "retrofit_short", "retrofit_demo.py", max(2, round(SHARE * steps)), **base)
    pipeline.run(
        "evaluation",
        "launch/evaluate.py",
        suite="paper",
        workdir=[work / name for name in ("baseline", "retro", "retrofit", "retrofit_short")],
        database=demo / "database",
        sets=[demo / name for name in SETS],
        sweeps=SETS,
        ks=1,
        shares=1,
        methods=(),
        steps=range(every, steps, every),
        output=work / "report",
    )
    _write(work)


def _train(pipeline: Pipeline, workdir: Path, recipe: str, steps: int, **settings: object) -> None:
    settings = {
        "config.data.sequences": Path(_DEMO.value) / "sequences",
        "config.steps": steps,
        "config.optimizer.warmup_steps": max(1, round(WARMUP * steps)),
        "config.checkpoint.every_steps": _EVERY.value,
        "config.checkpoint.keep_every": _EVERY.value,
        **settings,
    }
    name = f"training of {workdir.name}"
    pipeline.run(name, "launch/train.py", config=f"experiments/{recipe}", workdir=workdir, **settings)


def _write(work: Path) -> None:
    results = json.loads((work / "report" / "results.json").read_text(encoding="utf-8"))
    curves = [retrofit_curve(results, name) for name in SETS]
    write_json(work / "curve.json", curves)
    tables = [
        f"## {curve['set']}\n\n![{curve['set']}](curve-{curve['set']}.png)\n\n{markdown_table(curve)}"
        for curve in curves
    ]
    with atomic_write(work / "curve.md") as temporary:
        temporary.write_text("# Bits per byte against training steps\n\n" + "\n".join(tables), encoding="utf-8")
    for curve in curves:
        with atomic_write(work / f"curve-{curve['set']}.png") as temporary:
            temporary.write_bytes(plot(curve))
    print(f"\nThe curve: {work / 'curve.md'}")


if __name__ == "__main__":
    program.run(main)
