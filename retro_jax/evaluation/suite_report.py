"""The results of a suite as Markdown, plots and one HTML page; several suites side by side."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retro_jax.data.stage import atomic_write
from retro_jax.errors import UserError
from retro_jax.evaluation.plots import interval_plot, line_plot

_PAGE = Path(__file__).with_name("report.html")
_SWEEPS = {
    "k": ("neighbours of each chunk", "Neighbours", True, False),
    "share": ("share of the database's documents that is searched", "Size of the database", True, True),
    "step": ("training step", "Training", False, False),
}
_DIFFERENCE = "difference from the baseline in bits per byte; left of zero is better"
Results = Mapping[str, Any]


def side_by_side(results: Mapping[str, Results]) -> dict[str, Any]:
    """Several suites as one, each label with the name of its suite before it.

    Args:
      results: name to what `Suite.run` wrote.

    Raises:
      UserError: two scored different text under one name.
    """

    def named(name: str, entry: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        return {**entry, **{key: f"{name}: {entry[key]}" for key in keys}}

    sets: dict[str, dict[str, Any]] = {}
    for name, one in results.items():
        for entry in one["sets"]:
            rows = [named(name, row, "label", "model") for row in entry["rows"]]
            differences = [named(name, row, "first", "second") for row in entry["differences"]]
            if entry["name"] not in sets:
                sets[entry["name"]] = {**entry, "rows": [], "differences": []}
            known = sets[entry["name"]]
            if (known["bytes"], known["documents"]) != (entry["bytes"], entry["documents"]):
                raise UserError(f"{name} scored another text as {entry['name']!r}; figures of it cannot be compared")
            known["rows"] += rows
            known["differences"] += differences
    return {
        "models": [named(name, model, "name") for name, one in results.items() for model in one["models"]],
        "sets": list(sets.values()),
        "sweeps": [named(name, sweep, "model") for name, one in results.items() for sweep in one["sweeps"]],
    }


def plots(results: Results) -> dict[str, str]:
    """All plots that the results have points for: file stem to SVG."""
    found = {}
    gains = [
        (_part_name(entry, difference), difference)
        for entry in results["sets"]
        for difference in entry["differences"]
        if difference["part"] in ("all", "source") and _is_gain(entry, difference)
    ]
    if gains:
        found["gain"] = interval_plot(_series(gains), x=_DIFFERENCE)
    for entry in results["sets"]:
        lines = {
            row["label"]: [(point["alpha"], point["bits_per_byte"]) for point in row["leakage"]]
            for row in entry["rows"]
            if "leakage" in row
        }
        if lines:
            x = "chunks of which at most this share stands in a neighbour"
            found[f"leakage-{entry['name']}"] = line_plot(lines, x=x, percent_x=True)
        for part in ("overlap", "run"):
            shown = [
                (difference["name"], difference)
                for difference in entry["differences"]
                if difference["part"] == part and _is_gain(entry, difference)
            ]
            if shown:
                found[f"{part}-{entry['name']}"] = interval_plot(_series(shown), x=_DIFFERENCE)
        sizes: dict[str, list[tuple[float, float]]] = {}
        parameters = {model["name"]: model["parameters"] for model in results["models"]}
        for row in entry["rows"]:
            if row["method"] in ("baseline", "off", "on"):
                point = (parameters[row["model"]], row["bits_per_byte"])
                sizes.setdefault(row["method"], []).append(point)
        if any(len({size for size, _ in points}) > 1 for points in sizes.values()):
            lines = {name: sorted(points) for name, points in sizes.items()}
            found[f"size-{entry['name']}"] = line_plot(lines, x="parameters", log_x=True)
    for kind, (x, _, log_x, percent) in _SWEEPS.items():
        for name in dict.fromkeys(sweep["set"] for sweep in results["sweeps"] if sweep["kind"] == kind):
            lines = {
                sweep["model"]: [(point["x"], point["bits_per_byte"]) for point in sweep["points"]]
                for sweep in results["sweeps"]
                if (sweep["kind"], sweep["set"]) == (kind, name)
            }
            found[f"{kind}-{name}"] = line_plot(lines, x=x, log_x=log_x, percent_x=percent)
    return found


def write_report(
    directory: str | os.PathLike, title: str, results: Results, *, facts: Sequence[tuple[str, str]] = ()
) -> Path:
    """Writes results.md, the plots it shows (plots/*.svg), and results.html, one page that needs nothing else.

    Args:
      directory: for the files.
      title: plain text.
      results: of `Suite.run` or `side_by_side`.
      facts: (name, value) pairs shown on top.

    Returns:
      path of the page.
    """
    directory = Path(directory)
    drawn = plots(results)
    blocks = _blocks(title, results, facts, set(drawn))
    texts = {
        "results.md": "\n\n".join(map(_markdown_block, blocks)) + "\n",
        "results.html": _PAGE.read_text(encoding="utf-8")
        .replace("$TITLE", html.escape(title))
        .replace("$BODY", "\n".join(_html_block(block, drawn) for block in blocks)),
        **{f"plots/{stem}.svg": plot for stem, plot in drawn.items()},
    }
    for name, text in texts.items():
        with atomic_write(directory / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return directory / "results.html"


# A block is ("heading", level, text), ("text", text), ("plot", stem), or ("table", header, rows).
Block = tuple[Any, ...]


def _blocks(title: str, results: Results, facts: Sequence[tuple[str, str]], drawn: set[str]) -> list[Block]:
    blocks: list[Block] = [("heading", 1, title)]
    if facts:
        blocks.append(("table", ("", ""), [*facts]))
    blocks.append(("table", ("model", "parameters", "step"), _model_rows(results)))
    if "gain" in drawn:
        blocks += [("heading", 2, "Where retrieval helps"), ("plot", "gain")]
    for entry in results["sets"]:
        blocks += _set_blocks(entry, drawn)
    if results["sweeps"]:
        blocks.append(("heading", 2, "Sweeps"))
    for sweep in results["sweeps"]:
        x, heading, _, percent = _SWEEPS[sweep["kind"]]
        blocks.append(("heading", 3, f"{heading}: {sweep['model']} on {sweep['set']}"))
        plot = ("plot", f"{sweep['kind']}-{sweep['set']}")
        if plot not in blocks:  # one shows all models
            blocks.append(plot)
        blocks.append(_sweep_table(sweep, x, percent))
    return blocks


def _model_rows(results: Results) -> list[tuple[str, ...]]:
    return [(model["name"], f"{model['parameters']:,}", f"{model['step']:,}") for model in results["models"]]


def _set_blocks(entry: Mapping[str, Any], drawn: set[str]) -> list[Block]:
    rows, name = entry["rows"], entry["name"]
    size = f"{entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens"
    leaked = entry.get("mean_leaked_share")
    if leaked is not None:
        size += f"; on average {100 * leaked:.1f} % of a chunk is one run that its nearest neighbours hold too"
    blocks: list[Block] = [("heading", 2, name), ("text", size + "."), _scores_table(entry)]
    sources = list(rows[0]["parts"]["source"])
    if len(sources) > 1:
        blocks += [("heading", 3, "By source"), _parts_table(entry, "source", "bits/byte")]
    if any("completions" in row for row in rows):
        blocks += [("heading", 3, "Completions"), _completions_table(entry)]
    if f"leakage-{name}" in drawn:
        blocks += [("heading", 3, "By leakage"), ("plot", f"leakage-{name}"), _leakage_table(rows)]
    for part, heading in (
        ("overlap", "By overlap with what was read"),
        ("run", "By the run of tokens, ending here, that was read"),
    ):
        if f"{part}-{name}" in drawn:
            blocks += [("heading", 3, heading), ("plot", f"{part}-{name}"), _parts_table(entry, part, "bits/byte")]
    if f"size-{name}" in drawn:
        blocks += [("heading", 3, "By size"), ("plot", f"size-{name}")]
    return blocks


def _scores_table(entry: Mapping[str, Any]) -> Block:
    rows = entry["rows"]
    first = rows[0]["label"]
    header = ["", "k", "bits/byte", f"against {first} (95 %)", "against OFF (95 %)", "nats/token"]
    words = any("word_perplexity" in row for row in rows)
    body = []
    for row in rows:
        line = [
            row["label"],
            "" if row["k"] is None else str(row["k"] or "-"),
            f"{row['bits_per_byte']:.4f}",
            _difference(entry, first, row["label"]),
            _difference(entry, _off_of(rows, row), row["label"]),
            f"{row['nats_per_token']:.4f}",
        ]
        body.append((*line, f"{row['word_perplexity']:.2f}") if words else tuple(line))
    return ("table", (*header, "perplexity/word") if words else tuple(header), body)


def _parts_table(entry: Mapping[str, Any], part: str, unit: str) -> Block:
    rows = entry["rows"]
    names = [name for name, score in rows[0]["parts"][part].items() if score["bytes"]]
    sizes = (f"share of bytes, {unit} below", *(_share(rows[0]["parts"][part], name) for name in names))
    body = [sizes]
    for row in rows:
        cells = [f"{row['parts'][part][name]['bits_per_byte']:.4f}" for name in names]
        body.append((row["label"], *cells))
    pairs = [(rows[0]["label"], row["label"]) for row in rows[1:]]
    pairs += [(_off_of(rows, row), row["label"]) for row in rows if row["method"] == "on"]
    for first, second in dict.fromkeys(pairs):
        found = {
            difference["name"]: difference
            for difference in entry["differences"]
            if (difference["first"], difference["second"], difference["part"]) == (first, second, part)
        }
        if found:
            body.append(
                (f"{second} less {first}", *(_interval(found[name]) if name in found else "" for name in names))
            )
    return ("table", ("", *names), body)


def _completions_table(entry: Mapping[str, Any]) -> Block:
    body = []
    for row in entry["rows"]:
        for alignment, scores in row["completions"].items():
            accuracy = scores["accuracy"]
            body.append(
                (
                    row["label"],
                    alignment,
                    "" if accuracy is None else f"{100 * accuracy:.1f} %",
                    f"{scores['bits_per_byte']:.4f}",
                    _difference(
                        entry, entry["rows"][0]["label"], row["label"], f"completions, {alignment}", "accuracy"
                    ),
                    f"{scores['completions']:,}",
                )
            )
    header = ("", "alignment", "accuracy", "bits/byte", "accuracy against the first (95 %)", "completions")
    return ("table", header, body)


def _leakage_table(rows: Sequence[Mapping[str, Any]]) -> Block:
    points = rows[0]["leakage"]
    body = [("share of chunks", *(f"{100 * point['chunks'] / points[-1]['chunks']:.1f} %" for point in points))]
    body += [(row["label"], *(f"{point['bits_per_byte']:.4f}" for point in row["leakage"])) for row in rows]
    return ("table", ("at most", *(f"{100 * point['alpha']:g} %" for point in points)), body)


def _sweep_table(sweep: Mapping[str, Any], x: str, percent: bool) -> Block:
    header: tuple[str, ...] = (x, "bits/byte")
    differences = "difference" in sweep["points"][0]
    found = "neighbours_found" in sweep["points"][0]
    header += (("against OFF (95 %)",) if differences else ()) + (("neighbours found",) if found else ())
    body = []
    for point in sweep["points"]:
        line = [f"{100 * point['x']:.4g} %" if percent else f"{point['x']:,}", f"{point['bits_per_byte']:.4f}"]
        if differences:
            line.append(_interval(point["difference"]))
        if found:
            line.append(f"{point['neighbours_found']:.2f}")
        body.append(tuple(line))
    return ("table", header, body)


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


def _is_gain(entry: Mapping[str, Any], difference: Mapping[str, Any]) -> bool:
    """Whether it compares a method with the first row, both of one suite."""
    first = next(row for row in entry["rows"] if row["label"] == difference["first"])
    return first["method"] == "baseline" or first is entry["rows"][0]


def _part_name(entry: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    return entry["name"] if difference["part"] == "all" else f"{entry['name']}, {difference['name']}"


def _series(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, dict[str, tuple[float, float, float]]]]:
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, entry in named:
        rows.setdefault(name, {})[entry["second"]] = (entry["estimate"], entry["low"], entry["high"])
    return list(rows.items())


def _markdown_block(block: Block) -> str:
    kind = block[0]
    if kind == "heading":
        return f"{'#' * block[1]} {block[2]}"
    if kind == "text":
        return block[1]
    if kind == "plot":
        return f"![{block[1]}](plots/{block[1]}.svg)"
    _, header, body = block
    lines = [header, tuple("---" if column == 0 else "---:" for column in range(len(header))), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html_block(block: Block, drawn: Mapping[str, str]) -> str:
    kind = block[0]
    if kind == "heading":
        return f"<h{block[1]}>{html.escape(block[2])}</h{block[1]}>"
    if kind == "text":
        return f"<p>{html.escape(block[1])}</p>"
    if kind == "plot":
        return f"<figure>{drawn[block[1]]}</figure>"

    def cells(tag: str, line: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if column else ''}>{html.escape(str(cell))}</{tag}>"
            for column, cell in enumerate(line)
        )

    _, header, body = block
    lines = "".join(f"<tr>{cells('td', line)}</tr>" for line in body)
    return f"<div class=scroll><table><thead><tr>{cells('th', header)}</tr></thead><tbody>{lines}</tbody></table></div>"
