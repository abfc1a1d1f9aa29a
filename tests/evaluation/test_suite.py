"""launch/evaluate.py --suite=paper: all that applies, once, with figures that agree with each other."""

import json
import math
import shutil

import pytest
from small_run import error_line, run_program

from retro_jax.errors import UserError
from retro_jax.evaluation.suite_report import side_by_side


@pytest.fixture(scope="module")
def suite(small_data, finished_run, finished_baseline, tmp_path_factory):
    """Flags of a suite, its directory, and what it printed."""
    root = tmp_path_factory.mktemp("suite")
    evaluated = root / "query"
    shutil.copytree(small_data.corpus, evaluated / "corpus")
    shutil.copytree(small_data.neighbours, evaluated / "neighbours")
    with open(evaluated / "documents.jsonl", "w") as file:
        for line in (small_data.corpus.parent / "query.jsonl").read_text().splitlines():
            row = json.loads(line)
            words = row["text"].split()
            file.write(json.dumps({**row, "words": len(words), "completion": words[-1]}) + "\n")
    flags = [
        "--suite=paper",
        f"--workdir={finished_run},{finished_baseline}",
        f"--database={small_data.database}",
        f"--sets={evaluated}",
        "--sweeps=query",
        "--shares=1,0.5",
        "--ks=1,2,100",
        "--steps=30",
        "--methods=cache",
        f"--output={root / 'report'}",
    ]
    status, stdout, stderr = run_program("launch/evaluate.py", *flags)
    assert status == 0, stderr
    return flags, root / "report", stdout


@pytest.fixture(scope="module")
def results(suite):
    return json.loads((suite[1] / "results.json").read_text())


def test_every_method_scores_the_same_text_and_its_parts_add_up(results):
    (entry,) = results["sets"]
    rows = {row["label"]: row for row in entry["rows"]}
    assert list(rows) == ["baseline", "baseline-cache", "retro-off", "retro-on", "retro-shuffled"]
    for row in rows.values():
        assert row["bytes"] == entry["bytes"] and row["documents"] == entry["documents"]
        assert row["leakage"][-1]["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-9)
        assert row["word_perplexity"] == pytest.approx(math.exp(row["nats"] / entry["words"]))
        for part in ("source", "overlap", "run"):
            assert sum(score["nats"] for score in row["parts"][part].values()) == pytest.approx(row["nats"])
            assert sum(score["bytes"] for score in row["parts"][part].values()) == entry["bytes"]
    for label in ("baseline", "retro-off"):
        natural, padded = (rows[label]["completions"][alignment] for alignment in ("natural", "padded"))
        assert natural["completions"] == padded["completions"] == entry["documents"]


def test_every_difference_agrees_with_the_rows_and_has_an_interval(results):
    (entry,) = results["sets"]
    rows = {row["label"]: row for row in entry["rows"]}
    pairs = {(one["first"], one["second"]) for one in entry["differences"]}
    assert {("baseline", "retro-on"), ("retro-off", "retro-on"), ("retro-on", "retro-shuffled")} < pairs
    for one in entry["differences"]:
        assert one["low"] <= one["estimate"] <= one["high"]
        if one["part"] == "all":
            difference = rows[one["second"]]["bits_per_byte"] - rows[one["first"]]["bits_per_byte"]
            assert one["estimate"] == pytest.approx(difference, abs=1e-12)


def test_sweeps_meet_the_rows_where_they_are_the_same(results):
    on = next(row for row in results["sets"][0]["rows"] if row["label"] == "retro-on")
    sweeps = {(sweep["kind"], sweep["model"]): sweep["points"] for sweep in results["sweeps"]}
    assert [point["x"] for point in sweeps["k", "retro"]] == [1, 2]  # 100 are more than are stored
    assert sweeps["k", "retro"][1]["bits_per_byte"] == on["bits_per_byte"]
    assert sweeps["share", "retro"][0]["bits_per_byte"] == on["bits_per_byte"]
    assert sweeps["share", "retro"][1]["neighbours_found"] < sweeps["share", "retro"][0]["neighbours_found"]
    assert [point["x"] for point in sweeps["step", "retro-on"]] == [30, 40]
    assert sweeps["step", "retro-on"][1]["bits_per_byte"] == on["bits_per_byte"]


def test_the_report_shows_tables_and_plots(suite, results):
    page, text = (suite[1] / "results.html").read_text(), (suite[1] / "results.md").read_text()
    assert "<script" not in page and page.count("<svg") >= 6
    for row in results["sets"][0]["rows"]:
        assert f"{row['bits_per_byte']:.4f}" in page and f"{row['bits_per_byte']:.4f}" in text
    drawn = {path.stem for path in (suite[1] / "plots").glob("*.svg")}
    assert {"gain", "leakage-query", "overlap-query", "k-query", "share-query", "step-query"} <= drawn
    assert all(f"plots/{stem}.svg" in text for stem in drawn)
    assert "python launch/evaluate.py --suite=paper" in text


def test_what_is_finished_is_not_computed_again_and_what_is_lost_is(suite, results):
    flags, report, _ = suite
    losses = report / "losses" / "query"
    before = {path: path.stat().st_mtime_ns for path in losses.glob("*/manifest.json")}
    shutil.rmtree(losses / "retro-on-step40-k2")
    status, _, stderr = run_program("launch/evaluate.py", *flags)
    assert status == 0, stderr
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == [losses / "retro-on-step40-k2" / "manifest.json"]
    assert json.loads((report / "results.json").read_text())["sets"] == results["sets"]


def test_two_suites_lie_side_by_side(suite, results, tmp_path):
    _, report, _ = suite
    shutil.copytree(report, tmp_path / "other", ignore=shutil.ignore_patterns("losses", "methods"))
    flags = (f"--compare={report},{tmp_path / 'other'}", f"--output={tmp_path / 'both'}")
    status, _, stderr = run_program("launch/evaluate.py", *flags)
    assert status == 0, stderr
    text = (tmp_path / "both" / "results.md").read_text()
    assert "report: retro-on" in text and "other: retro-on" in text
    smaller = {**results, "sets": [{**results["sets"][0], "bytes": 1}]}
    with pytest.raises(UserError, match="b scored another text as 'query'"):
        side_by_side({"a": results, "b": smaller})


def test_mistakes_are_named_in_one_line(suite):
    flags, _, _ = suite

    def mistake(*changes):
        names = [change.split("=")[0] for change in changes]
        kept = [flag for flag in flags if flag.split("=")[0] not in names]
        return error_line("launch/evaluate.py", *kept, *(change for change in changes if not change.endswith("=")))

    assert "'valid' is no set of --sets" in mistake("--sweeps=valid")
    assert "no run has a checkpoint of step '29'" in mistake("--steps=30,29")
    assert "'cash' is no comparison method; did you mean 'cache'?" in mistake("--methods=cash")
