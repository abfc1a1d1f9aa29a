"""The curve of RETROfit holds the suite's figures, and says what share of the gain is made up."""

import pytest
from small_run import error_line

from retro_jax.evaluation.retrofit_curve import markdown_table, plot, retrofit_curve


def results(scratch=2.4):
    """A suite's, of one set, with steps 10 and 20."""

    def sweep(label, *values):
        points = [{"x": step, "bits_per_byte": value} for step, value in zip((10, 20), values, strict=True)]
        return {"kind": "step", "set": "s", "model": label, "points": points}

    return {
        "models": [{"name": name, "step": 1 if "short" in name else 20} for name in ("baseline", "retrofit_short")],
        "sets": [{"name": "s", "rows": [{"label": "retrofit_short-on", "bits_per_byte": 2.58}]}],
        "sweeps": [
            sweep("baseline", 3.0, 2.6),
            sweep("retro-off", 3.1, 2.7),
            sweep("retro-on", 2.9, scratch),
            sweep("retrofit-on", 2.5, 2.45),
            {"kind": "step", "set": "other", "model": "baseline", "points": [{"x": 5, "bits_per_byte": 9.0}]},
            {"kind": "k", "set": "s", "model": "retro", "points": [{"x": 1, "bits_per_byte": 9.0}]},
        ],
    }


def test_the_curve_begins_with_the_baseline_and_tells_the_share_of_the_gain():
    curve = retrofit_curve(results(), "s")
    baseline, scratch, fitted = curve["lines"].values()
    assert (baseline, scratch) == ([[10, 3.0], [20, 2.6]], [[10, 2.9], [20, 2.4]])
    assert fitted == [[0, 2.6], [10, 2.5], [20, 2.45]]
    assert [step for step, _ in curve["recovered"]] == [0, 10, 20]
    assert [share for _, share in curve["recovered"]] == pytest.approx([0, 0.5, 0.75])
    assert curve["short"] == [1, 2.58] and curve["recovered_short"] == pytest.approx(0.1)
    rows = markdown_table(curve).splitlines()
    assert rows[2:] == [
        "| 0 |  |  | 2.6000 | 0% |",
        "| 10 | 3.0000 | 2.9000 | 2.5000 | 50% |",
        "| 20 | 2.6000 | 2.4000 | 2.4500 | 75% |",
        "| 1, a run of its own |  |  | 2.5800 | 10% |",
    ]
    assert plot(curve)[:4] == b"\x89PNG"


def test_where_retrieval_gains_nothing_there_is_no_share_of_it():
    curve = retrofit_curve(results(scratch=2.7), "s")
    assert curve["recovered_short"] is None and {share for _, share in curve["recovered"]} == {None}
    assert markdown_table(curve).splitlines()[3] == "| 10 | 3.0000 | 2.9000 | 2.5000 |  |"


def test_a_demo_that_is_not_there_is_named(tmp_path):
    message = error_line("launch/retrofit_curve.py", f"--demo={tmp_path}", f"--workdir={tmp_path / 'curve'}")
    assert "sequences: no such directory; `make demo` makes it" in message and not (tmp_path / "curve").exists()
