"""A report shows what there is: other divisions of the text apart, empty cells where a suite knows less."""

import json
import math

import pytest

from retro_jax.errors import UserError
from retro_jax.evaluation.suite_report import plots, write_report
from retro_jax.evaluation.suite_results import RESULTS, load_results, side_by_side

CLASSES = ("0-6.25 %", "50-100 %")


def score(bits):
    return {"bits_per_byte": bits, "nats_per_token": bits, "nats": bits, "tokens": 1, "bytes": 10, "documents": 9}


def difference(first, second, part, name):
    interval = {"estimate": -0.1, "low": -0.2, "high": -0.05, "units": 9, "is_certain": True}
    return {"first": first, "second": second, "part": part, "name": name, **interval}


def row(label, model, method, bits, *, division=None, completed=False, reference=None, options=None, settings=None):
    """A row of a suite; `division` names how its neighbours divide the text, None for one that has none."""
    found = {"label": label, "model": model, "method": method, "k": None, "reference": reference, **score(bits)}
    found |= {"options": options or {}, "settings": settings or {}}
    found |= {"parts": {"source": {"all": score(bits)}}, "digests": {"source": "s"}}
    if division:
        for part in ("overlap", "run"):
            found["parts"][part] = {name: score(bits + number) for number, name in enumerate(CLASSES)}
        found["digests"] |= {"overlap": division, "run": division, "leakage": division}
        points = ((0.5, 3, bits - 0.5), (1.0, 4, bits))
        found["leakage"] = [{"alpha": alpha, "chunks": chunks, "bits_per_byte": at} for alpha, chunks, at in points]
    if completed:
        found["digests"]["completions"] = "c"
        natural = {"accuracy": 0.5, "bits_per_byte": bits, "nats_per_token": bits, "completions": 9}
        found |= {"completions": {"natural": natural}, "word_perplexity": 10 * bits}
    return found


def results(*rows, sweeps=(), left_out=(), parameters=None):
    differences = [
        difference(one["reference"], one["label"], part, name)
        for one in rows
        if one["reference"]
        for part, names in (("all", ["all"]), ("overlap", CLASSES), ("leakage", ["50 %", "100 %"]))
        for name in names
        if part == "all" or part in one["digests"]
    ]
    models = [
        {"name": name, "step": 1, "parameters": (parameters or {}).get(name, 1000)}
        for name in dict.fromkeys(one["model"] for one in rows)
    ]
    described = {"name": "valid", "documents": 9, "chunks": 4, "bytes": 10, "tokens": 1}
    sets = [{**described, "rows": list(rows), "differences": differences}]
    return {**RESULTS, "models": models, "sets": sets, "sweeps": list(sweeps), "left_out": list(left_out)}


def retro(division, *, completed=False):
    """Rows of a baseline and of a RETRO."""
    common = {"division": division, "completed": completed}
    return (
        row("baseline", "baseline", "baseline", 2.5, **common),
        row("retro-off", "retro", "off", 2.6, reference="baseline", **common),
        row("retro-on", "retro", "on", 2.3, reference="baseline", **common),
    )


def text_of(directory, found):
    write_report(directory, "title", found)
    return (directory / "results.md").read_text()


def cells(text, label):
    """Of every table line that begins with a label its cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [line[1:] for line in lines if line[0] == label]


def test_suites_that_know_less_lie_beside_those_that_know_more(tmp_path):
    more, less = results(*retro("k=2", completed=True)), results(row("baseline", "baseline", "baseline", 2.4))
    for order in ({"more": more, "less": less}, {"less": less, "more": more}):
        text = text_of(tmp_path, side_by_side(order)).split("## valid")[1]
        (scores,) = cells(text, "less: baseline")  # neither parts, nor leakage, nor completions
        assert scores[1] == "2.4000" and scores[2:4] == ["", ""] and scores[-1] == ""
        assert cells(text, "more: baseline")[0][-1] == "25.00"
        assert cells(text, "more: retro-on")[0][2] == "-0.1000 [-0.2000, -0.0500]"


def test_suites_that_divide_the_text_otherwise_have_tables_and_plots_of_their_own(tmp_path):
    both = side_by_side({"a": results(*retro("k=2")), "b": results(*retro("k=10"))})
    drawn = plots(both)
    assert {"leakage-valid", "leakage-valid-2", "overlap-valid", "overlap-valid-2"} <= set(drawn)
    assert "a: retro-on" in drawn["leakage-valid"] and "b: retro-on" not in drawn["leakage-valid"]
    assert "b: retro-on" in drawn["overlap-valid-2"] and "a: retro-on" not in drawn["overlap-valid-2"]
    text = text_of(tmp_path, both)
    assert text.count("| at most | 50 % | 100 % |") == 2 and text.count(f"| {' | '.join(CLASSES)} |") == 2
    same = side_by_side({"a": results(*retro("k=2")), "b": results(*retro("k=2"))})
    assert "leakage-valid-2" not in plots(same)
    assert text_of(tmp_path, same).count("| at most | 50 % | 100 % |") == 1


def test_every_alpha_and_every_part_has_its_difference_from_the_first_row(tmp_path):
    text = text_of(tmp_path, results(*retro("k=2")))
    interval = "-0.1000 [-0.2000, -0.0500]"
    assert cells(text, "retro-on less baseline") == [[interval] * 2] * 2
    assert cells(text, "share of chunks") == [["75.0 %", "100.0 %"]]


def test_the_axis_of_differences_names_what_they_are_from():
    _, off, on = retro("k=2")
    alone = results({**off, "reference": None}, {**on, "reference": "retro-off"})
    assert "difference from retro-off in bits per byte" in plots(alone)["gain"]
    both = plots(side_by_side({"a": alone, "b": results(*retro("k=2"))}))["gain"]
    assert "difference from the first of its suite" in both and "b: retro-on" in both and "a: retro-on" in both
    assert "difference from baseline" in plots(results(*retro("k=2")))["overlap-valid"]


def test_models_of_several_sizes_are_drawn_by_their_parameters():
    rows = (
        row("small", "small", "baseline", 2.9),
        row("large", "large", "baseline", 2.2, reference="small"),
        row("retro-on", "retro", "on", 2.1, reference="small"),
    )
    drawn = plots(results(*rows, parameters={"small": 1_000, "large": 30_000, "retro": 30_000}))
    assert "parameters" in drawn["size-valid"] and "30,000" in drawn["size-valid"]
    assert "size-valid" not in plots(results(*rows))


def test_what_a_method_was_made_with_stands_below_the_table(tmp_path):
    parameters = [{"weight": 0.118, "sharpness": 0.0123456}]
    tuned = {"tuned_on": "the other half of valid", "parameters": parameters}
    options = {"neighbours": 10, "datastore_share": 0.1, "bm25": {"k1": 1.2}}
    method = row("baseline-knn_lm", "baseline", "knn_lm", 2.4, reference="baseline", options=options, settings=tuned)
    text = text_of(tmp_path, results(row("baseline", "baseline", "baseline", 2.5), method))
    line = "baseline-knn_lm: neighbours 10, datastore share 0.1, bm25 (k1 1.2); tuned on the other half of valid; "
    assert f"{line}weight 0.118, sharpness 0.01235." in text.splitlines()


def sweep(kind="k", **changes):
    interval = {"estimate": -0.1, "low": -0.2, "high": -0.05, "units": 9, "is_certain": True}
    points = [
        {
            "x": x,
            "bits_per_byte": 2.5 - 0.1 * x,
            "difference": interval,
            "growth": {**interval, "estimate": -0.1 * x, "is_certain": x > 1},
            "parts": {"overlap": {name: score(2.5 - 0.1 * x * number) for number, name in enumerate(CLASSES)}},
        }
        for x in (1, 2)
    ]
    off = {"parts": {"overlap": {name: score(2.5) for name in CLASSES}}}
    return {"kind": kind, "set": "valid", "model": "retro", "off": off, "points": points, **changes}


def test_a_sweep_tells_its_growth_from_the_first_point_and_by_parts(tmp_path):
    found = results(*retro("k=2"), sweeps=[sweep()])
    text = text_of(tmp_path, found)
    assert cells(text, "1")[0][-2:] == ["-0.1000 [-0.2000, -0.0500]", ""]
    assert cells(text, "2")[0][-1] == "-0.2000 [-0.2000, -0.0500]"
    drawn = plots(found)
    assert "bits per byte less OFF" in drawn["k-valid-overlap-1"] and CLASSES[1] in drawn["k-valid-overlap-1"]
    assert "plots/k-valid-overlap-1.svg" in text and "k-valid-source-1" not in drawn


def test_what_is_left_out_is_named(tmp_path):
    found = results(*retro("k=2"), left_out=["valid: k = 100, as 4 neighbours of a chunk are stored", "spalm"])
    assert "Left out: valid: k = 100, as 4 neighbours of a chunk are stored; spalm." in text_of(tmp_path, found)
    assert "a: spalm" in text_of(tmp_path, side_by_side({"a": found, "b": results(*retro("k=2"))}))
    assert "Left out" not in text_of(tmp_path, results(*retro("k=2")))


def test_suites_of_other_text_are_refused():
    other = results(*retro("k=2"))
    other["sets"][0]["bytes"] = 11
    with pytest.raises(UserError, match="b scored another text as 'valid'"):
        side_by_side({"a": results(*retro("k=2")), "b": other})


def test_results_that_are_none_are_named_in_one_line(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="no such file; finish this suite first"):
        load_results(tmp_path)
    text = json.dumps(results(*retro("k=2")))
    path.write_text(text)
    assert math.isclose(load_results(tmp_path)["sets"][0]["rows"][0]["bits_per_byte"], 2.5)
    for damaged, message in ((text[:-9], "not JSON"), ("[]", "no results of a suite"), ("{}", "no results of a suite")):
        path.write_text(damaged)
        with pytest.raises(UserError, match=rf"results\.json: {message}.*; run the suite again"):
            load_results(tmp_path)
