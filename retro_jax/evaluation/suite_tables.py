"""The tables of a suite's report: a header and rows of text each."""

from collections.abc import Mapping, Sequence
from typing import Any

# ("table", header, rows)
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def scores_table(entry: Mapping[str, Any]) -> Table:
    """What each method costs on a set, and its differences from the first row of its suite and from OFF."""
    rows = entry["rows"]
    references = {row["reference"] for row in rows} - {None}
    against = f"against {references.pop()}" if len(references) == 1 else "against the first of its suite"
    header = ["", "k", "bits/byte", f"{against} (95 %)", "against OFF (95 %)", "nats/token"]
    words = any("word_perplexity" in row for row in rows)
    body = []
    for row in rows:
        line = [
            row["label"],
            "" if row["k"] is None else str(row["k"] or "-"),
            f"{row['bits_per_byte']:.4f}",
            _difference(entry, row["reference"], row["label"]),
            _difference(entry, _off_of(rows, row), row["label"]),
            f"{row['nats_per_token']:.4f}",
        ]
        if words:
            line.append(f"{row['word_perplexity']:.2f}" if "word_perplexity" in row else "")
        body.append(tuple(line))
    return ("table", (*header, "perplexity/word") if words else tuple(header), body)


def options_line(row: Mapping[str, Any]) -> str:
    """What a comparison method was made with and what was tuned, in one line; empty for a model alone."""
    if not row["options"]:
        return ""
    tuned = row["settings"]
    said = [_said(row["options"])]
    if "parameters" in tuned:
        on = tuned["tuned_on"]
        said.append("not tuned" if on == "nothing" else f"tuned on {on}")
        said += [_said(parameters) for parameters in tuned["parameters"]]
    else:
        said += [_said(tuned)] if tuned else []
    return f"{row['label']}: {'; '.join(said)}."


def _said(values: Mapping[str, Any]) -> str:
    """Names and values, for people."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = f"({_said(value)})"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        found.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(found)


def parts_table(entry: Mapping[str, Any], part: str) -> Table:
    """The same of every part of a set whose rows are all divided in one way (`suite_results.divided`)."""
    rows = entry["rows"]
    scores = rows[0]["parts"][part]
    names = [name for name, score in scores.items() if score["bytes"]]
    body = [("share of bytes, bits/byte below", *(_share(scores, name) for name in names))]
    for row in rows:
        body.append((row["label"], *(f"{row['parts'][part][name]['bits_per_byte']:.4f}" for name in names)))
    return ("table", ("", *names), body + _difference_rows(entry, part, names))


def _difference_rows(entry: Mapping[str, Any], part: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    """For every row its differences from the first of its suite, and of ON those from OFF, in parts of these names."""
    rows = entry["rows"]
    pairs = [(row["reference"], row["label"]) for row in rows if row["reference"] is not None]
    pairs += [(_off_of(rows, row), row["label"]) for row in rows if row["method"] == "on"]
    body = []
    for first, second in dict.fromkeys(pairs):
        cells = [_difference(entry, first, second, part, name) for name in names]
        if any(cells):
            body.append((f"{second} less {first}", *cells))
    return body


def completions_table(entry: Mapping[str, Any]) -> Table:
    """Accuracy and cost of completions, of rows that were asked for the same ones."""
    body = []
    for row in entry["rows"]:
        for alignment, scores in row["completions"].items():
            accuracy, part = scores["accuracy"], f"completions, {alignment}"
            body.append(
                (
                    row["label"],
                    alignment,
                    "" if accuracy is None else f"{100 * accuracy:.1f} %",
                    _difference(entry, row["reference"], row["label"], part, "accuracy"),
                    f"{scores['bits_per_byte']:.4f}",
                    _difference(entry, row["reference"], row["label"], part, "bits per byte"),
                    f"{scores['completions']:,}",
                )
            )
    against = "against the first (95 %)"
    return ("table", ("", "alignment", "accuracy", against, "bits/byte", against, "completions"), body)


def leakage_table(entry: Mapping[str, Any]) -> Table:
    """bpb(alpha) and its differences, of rows with the same r(C)."""
    rows = entry["rows"]
    points = rows[0]["leakage"]
    names = [f"{100 * point['alpha']:g} %" for point in points]
    body = [("share of chunks", *(f"{100 * point['chunks'] / points[-1]['chunks']:.1f} %" for point in points))]
    body += [(row["label"], *(f"{point['bits_per_byte']:.4f}" for point in row["leakage"])) for row in rows]
    return ("table", ("at most", *names), body + _difference_rows(entry, "leakage", names))


def sweep_table(sweep: Mapping[str, Any], x: str, percent: bool) -> Table:
    """The points of a sweep; `x` names what it is over, a share if `percent`."""
    columns = [
        (name, heading)
        for name, heading in (
            ("difference", "against OFF (95 %)"),
            ("growth", "against the first (95 %)"),
            ("neighbours_found", "neighbours found"),
        )
        if name in sweep["points"][0]
    ]
    body = []
    for point in sweep["points"]:
        line = [f"{100 * point['x']:.4g} %" if percent else f"{point['x']:,}", f"{point['bits_per_byte']:.4f}"]
        for name, _ in columns:
            if name == "neighbours_found":
                line.append(f"{point[name]:.2f}")
            else:
                line.append("" if name == "growth" and point is sweep["points"][0] else _interval(point[name]))
        body.append(tuple(line))
    return ("table", (x, "bits/byte", *(heading for _, heading in columns)), body)


def _difference(entry: Mapping[str, Any], first: str | None, second: str, part: str = "all", name: str = "all") -> str:
    for one in entry["differences"]:
        if (one["first"], one["second"], one["part"]) == (first, second, part) and one["name"] == name:
            return _interval(one)
    return ""


def _interval(difference: Mapping[str, Any]) -> str:
    mark = "" if difference["is_certain"] else " ?"
    return f"{difference['estimate']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]{mark}"


def _off_of(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str | None:
    """Label of the same model without retrieval."""
    return next((one["label"] for one in rows if one["model"] == row["model"] and one["method"] == "off"), None)


def _share(scores: Mapping[str, Any], name: str) -> str:
    return f"{100 * scores[name]['bytes'] / sum(score['bytes'] for score in scores.values()):.1f} %"
