"""The results of a suite as Markdown, plots and one HTML page."""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retro_jax.evaluation.plots import interval_plot, line_plot
from retro_jax.evaluation.suite_results import Results, divided
from retro_jax.evaluation.suite_tables import (
    completions_table,
    leakage_table,
    options_line,
    parts_table,
    scores_table,
    sweep_table,
)
from retro_jax.files import atomic_write

_PAGE = Path(__file__).with_name("report.html")
_SWEEPS = {
    "k": ("neighbours of each chunk", "Neighbours", True, False),
    "share": ("share of the database's documents that is searched", "Size of the database", True, True),
    "step": ("training step", "Training", False, False),
}
_OVERLAPS = (
    ("overlap", "By overlap with what was read"),
    ("run", "By the run of tokens, ending here, that was read"),
)


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
        found["gain"] = interval_plot(_series(gains), x=_from_reference(gains))
    for entry in results["sets"]:
        for stem, one in divided(entry, "leakage"):
            lines = {
                row["label"]: [(point["alpha"], point["bits_per_byte"]) for point in row["leakage"]]
                for row in one["rows"]
            }
            x = "chunks of which at most this share stands in a neighbour"
            found[stem] = line_plot(lines, x=x, percent_x=True)
        for part, _ in _OVERLAPS:
            for stem, one in divided(entry, part):
                shown = [
                    (difference["name"], difference)
                    for difference in one["differences"]
                    if difference["part"] == part and _is_gain(one, difference)
                ]
                if shown:
                    found[stem] = interval_plot(_series(shown), x=_from_reference(shown))
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
    for number, sweep in enumerate(results["sweeps"], 1):
        x, _, log_x, percent = _SWEEPS[sweep["kind"]]
        for part in ("source", "overlap"):
            gained = _gained(sweep, part)
            if len(gained) > 1:
                y = "bits per byte less OFF"
                found[_sweep_stem(number, sweep, part)] = line_plot(gained, x=x, y=y, log_x=log_x, percent_x=percent)
    return found


def write_report(
    directory: str | os.PathLike, title: str, results: Results, *, facts: Sequence[tuple[str, str]] = ()
) -> Path:
    """Writes results.md, the plots it shows (plots/*.svg), and results.html, one page that needs nothing else.

    Args:
      directory: for the files.
      title: plain text.
      results: of `Suite.run` or `suite_results.side_by_side`.
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
    if results["left_out"]:
        blocks.append(("text", f"Left out: {'; '.join(results['left_out'])}."))
    if "gain" in drawn:
        blocks += [("heading", 2, "Where retrieval helps"), ("plot", "gain")]
    for entry in results["sets"]:
        blocks += _set_blocks(entry, drawn)
    if results["sweeps"]:
        blocks.append(("heading", 2, "Sweeps"))
    for number, sweep in enumerate(results["sweeps"], 1):
        x, heading, _, percent = _SWEEPS[sweep["kind"]]
        blocks.append(("heading", 3, f"{heading}: {sweep['model']} on {sweep['set']}"))
        plot = ("plot", f"{sweep['kind']}-{sweep['set']}")
        if plot not in blocks:  # one shows all models
            blocks.append(plot)
        blocks.append(sweep_table(sweep, x, percent))
        stems = [_sweep_stem(number, sweep, part) for part in ("source", "overlap")]
        blocks += [("plot", stem) for stem in stems if stem in drawn]
    return blocks


def _model_rows(results: Results) -> list[tuple[str, ...]]:
    return [(model["name"], f"{model['parameters']:,}", f"{model['step']:,}") for model in results["models"]]


def _set_blocks(entry: Mapping[str, Any], drawn: set[str]) -> list[Block]:
    name = entry["name"]
    size = [f"{entry[key]:,} {key}" for key in ("documents", "bytes", "tokens") if key in entry]
    text = ", ".join(size)
    leaked = entry.get("mean_leaked_share")
    if leaked is not None:
        text += f"; on average {100 * leaked:.1f} % of a chunk is one run that its nearest neighbours hold too"
    blocks: list[Block] = [("heading", 2, name), ("text", text + "."), scores_table(entry)]
    blocks += [("text", line) for line in map(options_line, entry["rows"]) if line]
    by_source = [one for _, one in divided(entry, "source") if len(one["rows"][0]["parts"]["source"]) > 1]
    if by_source:
        blocks += [("heading", 3, "By source"), *(parts_table(one, "source") for one in by_source)]
    completions = divided(entry, "completions")
    if completions:
        blocks += [("heading", 3, "Completions"), *(completions_table(one) for _, one in completions)]
    for part, heading in (("leakage", "By leakage"), *_OVERLAPS):
        shown = [(stem, one) for stem, one in divided(entry, part) if stem in drawn]
        if shown:
            blocks.append(("heading", 3, heading))
        for stem, one in shown:
            blocks += [("plot", stem), leakage_table(one) if part == "leakage" else parts_table(one, part)]
    if f"size-{name}" in drawn:
        blocks += [("heading", 3, "By size"), ("plot", f"size-{name}")]
    return blocks


def _sweep_stem(number: int, sweep: Mapping[str, Any], part: str) -> str:
    """Stem of the plot of one sweep by parts; `number` tells sweeps of several models apart."""
    return f"{sweep['kind']}-{sweep['set']}-{part}-{number}"


def _gained(sweep: Mapping[str, Any], part: str) -> dict[str, list[tuple[float, float]]]:
    """Name of a part to (x, bits per byte less those of OFF); nothing for sweeps that have no OFF or no such parts."""
    off = sweep.get("off", {}).get("parts", {}).get(part, {})
    return {
        name: [
            (point["x"], point["parts"][part][name]["bits_per_byte"] - score["bits_per_byte"])
            for point in sweep["points"]
        ]
        for name, score in off.items()
        if score["bytes"]
    }


def _is_gain(entry: Mapping[str, Any], difference: Mapping[str, Any]) -> bool:
    """Whether it compares a row with the first of its suite."""
    second = next(row for row in entry["rows"] if row["label"] == difference["second"])
    return second["reference"] == difference["first"]


def _from_reference(named: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Name of the axis of differences from the first row."""
    firsts = {difference["first"] for _, difference in named}
    first = firsts.pop() if len(firsts) == 1 else "the first of its suite"
    return f"difference from {first} in bits per byte; left of zero is better"


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
