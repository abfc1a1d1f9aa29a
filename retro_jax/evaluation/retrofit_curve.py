"""What RETROfit reaches by which step, beside a RETRO from scratch and the decoder alone (paper section 4.2, figure 5).

Figures are those of a suite (`retro_jax.evaluation.suite`) of the runs `baseline`, `retro`, `retrofit`, which begins
with the baseline's last step, and `retrofit_short`, the same with few steps of its own schedule.
"""

from collections.abc import Mapping
from typing import Any

from retro_jax.evaluation.plots import line_figure, png

# Label of a suite's rows and sweeps to the name in tables and plots.
_LINES = {"baseline": "baseline", "retro-on": "RETRO from scratch, ON", "retrofit-on": "RETROfit, ON"}
_SHORT = "retrofit_short"


def retrofit_curve(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The curve on one set, JSON-serialisable.

    Args:
      results: of the suite, which swept over steps on this set.
      name: of the set.

    Returns:
      "set"; "lines": name to [step, bits per byte] in order, RETROfit from step 0, where it is the baseline that it
      begins with; "short": [step, bits per byte] of the short run; "recovered": the share of the difference from the
      baseline to the RETRO from scratch, at their last step, that RETROfit makes up at each of its steps (above 1 it is
      beyond it, below 0 worse than the baseline), and "recovered_short" of the short run: None where the RETRO from
      scratch is not better than the baseline.
    """
    swept = {sweep["model"]: sweep["points"] for sweep in results["sweeps"] if _is(sweep, name)}
    lines = {shown: [[point["x"], point["bits_per_byte"]] for point in swept[label]] for label, shown in _LINES.items()}
    baseline, scratch, fitted = lines.values()
    fitted.insert(0, [0, baseline[-1][1]])
    rows = next(entry["rows"] for entry in results["sets"] if entry["name"] == name)
    short = next(row["bits_per_byte"] for row in rows if row["label"] == f"{_SHORT}-on")
    step = next(model["step"] for model in results["models"] if model["name"] == _SHORT)
    gain = baseline[-1][1] - scratch[-1][1]

    def recovered(value: float) -> float | None:
        return (baseline[-1][1] - value) / gain if gain > 0 else None

    return {
        "set": name,
        "lines": lines,
        "short": [step, short],
        "recovered": [[step, recovered(value)] for step, value in fitted],
        "recovered_short": recovered(short),
    }


def markdown_table(curve: Mapping[str, Any]) -> str:
    """Bits per byte of each line at each step, and below them the short run."""
    lines = {name: dict(map(tuple, points)) for name, points in curve["lines"].items()}
    recovered = dict(map(tuple, curve["recovered"]))
    header = ("step", *lines, "share of the gain")
    body = [
        (
            str(step),
            *(_written(points.get(step), ".4f") for points in lines.values()),
            _written(recovered.get(step), ".0%"),
        )
        for step in sorted(set().union(*lines.values()))
    ]
    step, value = curve["short"]
    others = ("",) * (len(lines) - 1)
    body.append(
        (f"{step}, a run of its own", *others, _written(value, ".4f"), _written(curve["recovered_short"], ".0%"))
    )
    rule = ("---:",) * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body)) + "\n"


def plot(curve: Mapping[str, Any]) -> bytes:
    """The lines and the short run's point, as PNG."""
    step, value = curve["short"]
    lines = {**curve["lines"], f"RETROfit of {step} steps, ON": [(step, value)]}
    return png(
        line_figure(lines, x=f"training step ({curve['set']}); RETROfit begins with the baseline of the last step")
    )


def _is(sweep: Mapping[str, Any], name: str) -> bool:
    return sweep["kind"] == "step" and sweep["set"] == name


def _written(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
