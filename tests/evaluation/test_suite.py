"""launch/evaluate.py --suite=paper: all that applies, once, with figures that agree with each other."""

import json
import math
import shutil

import numpy as np
import processes
import pytest
import tiny_bert
from small_run import error_line, run_program

from retro_jax.data.corpus import Corpus
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index


@pytest.fixture(scope="module")
def searchable(small_data, tmp_path_factory):
    """The small database with vectors and an index, and the embedder they are from."""
    root = tmp_path_factory.mktemp("searchable")
    directory, database = tiny_bert.write_tiny_bert(root / "embedder"), root / "database"
    shutil.copytree(small_data.database, database)
    embedder = Embedder.load(directory, normalize=False, max_length=96)
    embed_corpus(Corpus(database / "corpus"), embedder, database / "embeddings")
    build_index(EmbeddingSet(database / "embeddings"), database / "index")
    return database, directory


@pytest.fixture(scope="module")
def suite(small_data, searchable, finished_run, finished_baseline, tmp_path_factory):
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
        f"--database={searchable[0]}",
        f"--embedder={searchable[1]}",
        f"--sets={evaluated}",
        "--sweeps=query",
        "--shares=1,0.5",
        "--ks=1,2,4,100",
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
        assert 0 <= row["completions"]["natural"]["accuracy"] <= 1
    for label in ("baseline", "retro-off", "retro-on"):
        natural, padded = (rows[label]["completions"][alignment] for alignment in ("natural", "padded"))
        assert natural["completions"] == padded["completions"] == entry["documents"]
    off, on = (rows[f"retro-{mode}"]["completions"]["padded"] for mode in ("off", "on"))
    assert on["bits_per_byte"] != off["bits_per_byte"]  # what the last chunk of the context retrieves is read
    assert "padded" not in rows["retro-shuffled"]["completions"]
    assert rows["baseline-cache"]["options"]["cache_size"] == 1024


def test_bits_per_byte_of_alpha_are_those_of_the_chunks_that_leak_no_more(suite, results):
    (entry,) = results["sets"]
    row = next(row for row in entry["rows"] if row["label"] == "retro-on")
    points = row["leakage"]
    assert [point["alpha"] for point in points] == [eighth / 8 for eighth in range(1, 9)]
    assert points[0]["chunks"] < points[-1]["chunks"] == entry["chunks"]
    nats = np.load(suite[1] / "losses" / "query" / "retro-on-step40-k2" / "nats.npy").sum(1, dtype=np.float64)
    assert nats.sum() / math.log(2) / entry["bytes"] == pytest.approx(points[-1]["bits_per_byte"])
    differences = {
        one["name"]: one["estimate"]
        for one in entry["differences"]
        if (one["first"], one["second"], one["part"]) == ("baseline", "retro-on", "leakage")
    }
    baseline = next(row for row in entry["rows"] if row["label"] == "baseline")["leakage"]
    for point, first in zip(points, baseline, strict=True):
        if point["bytes"]:
            gap = point["bits_per_byte"] - first["bits_per_byte"]
            assert differences[f"{100 * point['alpha']:g} %"] == pytest.approx(gap, abs=1e-9)


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
    assert [point["x"] for point in sweeps["k", "retro"]] == [1, 2, 4]
    assert "query: k = 100, as 4 neighbours of a chunk are stored" in results["left_out"]
    assert sweeps["k", "retro"][1]["bits_per_byte"] == on["bits_per_byte"]
    assert len({point["bits_per_byte"] for point in sweeps["k", "retro"]}) == 3
    for points in sweeps.values():
        for point in points:
            growth = point["bits_per_byte"] - points[0]["bits_per_byte"]
            assert point["growth"]["estimate"] == pytest.approx(growth, abs=1e-9)
    assert sweeps["k", "retro"][1]["parts"] == on["parts"]
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
    flags, report, stdout = suite
    assert "left out: query: k = 100, as 4 neighbours of a chunk are stored" in stdout
    losses = report / "losses" / "query"
    before = {path: path.stat().st_mtime_ns for path in losses.glob("*/manifest.json")}
    shutil.rmtree(losses / "retro-on-step40-k2")
    status, _, stderr = run_program("launch/evaluate.py", *flags)
    assert status == 0, stderr
    changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == [losses / "retro-on-step40-k2" / "manifest.json"]
    assert json.loads((report / "results.json").read_text())["sets"] == results["sets"]


def test_two_suites_lie_side_by_side(suite, results, finished_baseline, tmp_path):
    """The other one is of a baseline alone, without a database."""
    flags, report, _ = suite
    sets = next(flag for flag in flags if flag.startswith("--sets"))
    alone = ("--suite=paper", f"--workdir={finished_baseline}", sets, "--step=30", f"--output={tmp_path / 'alone'}")
    status, stdout, stderr = run_program("launch/evaluate.py", *alone)
    assert status == 0, stderr
    assert "left out: comparison methods, which read a database" in stdout
    status, _, stderr = run_program(
        "launch/evaluate.py", f"--compare={tmp_path / 'alone'},{report}", f"--output={tmp_path / 'both'}"
    )
    assert status == 0, stderr
    text = (tmp_path / "both" / "results.md").read_text()
    (other,) = json.loads((tmp_path / "alone" / "results.json").read_text())["sets"][0]["rows"]
    first = next(row for row in results["sets"][0]["rows"] if row["label"] == "baseline")
    assert other["bits_per_byte"] != first["bits_per_byte"]
    for name, row in (("alone", other), ("report", first)):
        assert f"| {name}: baseline | - | {row['bits_per_byte']:.4f} |" in text
    assert "leakage" not in other and "| at most | 12.5 % |" in text


@pytest.mark.slow
def test_a_bare_suite_runs_all_that_applies(suite, tmp_path):
    kept = [flag for flag in suite[0] if flag.split("=")[0] not in ("--sweeps", "--methods", "--steps", "--output")]
    status, stdout, stderr = run_program("launch/evaluate.py", *kept, f"--output={tmp_path / 'report'}", timeout=900)
    assert status == 0, stderr
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    labels = [row["label"] for row in found["sets"][0]["rows"]]
    assert labels == [
        *("baseline", "baseline-knn_lm", "baseline-cache", "baseline-prepend", "baseline-rag"),
        *("retro-off", "retro-on", "retro-shuffled", "retro-bm25", "retro-bm25_rerank"),
    ]
    assert {sweep["kind"] for sweep in found["sweeps"]} == {"k", "share", "step"}
    assert "spalm, which needs a tuning set" in found["left_out"] and "left out: spalm" in stdout


def test_losses_of_other_completions_are_not_taken_for_these(suite, tmp_path):
    flags, report, _ = suite
    evaluated = tmp_path / "query"
    shutil.copytree(next(flag for flag in flags if flag.startswith("--sets")).split("=")[1], evaluated)
    shutil.copytree(report, tmp_path / "report")
    rows = [json.loads(line) for line in (evaluated / "documents.jsonl").read_text().splitlines()]
    rows[0]["completion"] = " ".join(rows[0]["text"].split(" ")[-3:])
    (evaluated / "documents.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    changes = (f"--sets={evaluated}", f"--output={tmp_path / 'report'}")
    kept = [flag for flag in flags if flag.split("=")[0] not in ("--sets", "--output")]
    line = error_line("launch/evaluate.py", *kept, *changes)
    assert "settings.asked" in line and "give another directory or remove it" in line


def test_several_processes_are_refused(suite):
    ends = processes.finish(processes.start(2, "launch/evaluate.py", *suite[0]))
    for status, _, stderr in ends:
        assert status == 1 and "Traceback" not in stderr
    assert any("error: --suite runs in one process" in stderr for _, _, stderr in ends)


def test_mistakes_are_named_in_one_line(suite):
    flags, _, _ = suite

    def mistake(*changes):
        names = [change.split("=")[0] for change in changes]
        kept = [flag for flag in flags if flag.split("=")[0] not in names]
        return error_line("launch/evaluate.py", *kept, *(change for change in changes if not change.endswith("=")))

    assert "'valid' is no set of --sets" in mistake("--sweeps=valid")
    assert "--steps: '29' is not a step that any run has a checkpoint of" in mistake("--steps=30,29")
    assert "--ks: '0' is not a number of neighbours" in mistake("--ks=0")
    assert "--shares: 'half' is not a share in (0, 1]" in mistake("--shares=half")
    assert "a RETRO with retrieval needs --database; or give --modes=off" in mistake("--database=", "--embedder=")
    assert "'cash' is no comparison method; did you mean 'cache'?" in mistake("--methods=cash")
