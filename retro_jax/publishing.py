"""Results as a folder that can stand in a repository: small files, and a page of them that shows where it is opened.

README.md          the page: what was run, tables, plots, what cannot be claimed, how it was made
provenance.json    what `Pipeline.provenance` says
REPORT/            results.json, results.html and plots/ of each report

The folder is replaced as a whole, so it holds nothing else; words about the results belong elsewhere.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_jax.errors import UserError
from retro_jax.evaluation.bootstrap import FEWEST_UNITS
from retro_jax.files import TEMPORARY, write_json

LIMIT_BYTES = 4_000_000
PROVENANCE = "provenance.json"
_FILES = ("results.json", "results.html", "plots/*.svg")
_TABLES = "results.md"


def check_target(target: Path, work: Path) -> None:
    """Raises UserError unless a folder may be replaced by what is published of the directory `work`."""
    new, made = target.resolve(), work.resolve()
    if new == made or made in new.parents or new in made.parents:
        raise UserError(f"--publish={target}: publishing would replace what is in {work}; give a folder apart from it")
    if target.is_dir() and any(target.iterdir()) and not (target / PROVENANCE).is_file():
        raise UserError(f"--publish={target}: it holds other files than published results; give another folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"--publish={target} is a file; name a folder")


def publish(
    target: Path,
    reports: Mapping[str, Path],
    *,
    title: str,
    introduction: Mapping[str, str],
    provenance: Mapping[str, Any],
    spelling: Mapping[str, str],
) -> None:
    """Writes the folder beside its place, then puts it there.

    Args:
      target: the folder, one that `check_target` allows.
      reports: name to the directory of a report (results.md, results.json, ...), each a chapter of the page.
      title: of the page, Markdown.
      introduction: name of a report to the Markdown that its chapter begins with, a heading of level 2 and text.
      provenance: of the pipeline.
      spelling: words to what is published in their place, such as paths of this machine.
    """

    def spelt(text: str) -> str:
        for own, public in spelling.items():
            text = text.replace(own, public)
        return text

    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f"{TEMPORARY}*-{target.name}"):
        shutil.rmtree(leftover)
    new, old = (target.with_name(f"{TEMPORARY}{part}-{target.name}") for part in (os.getpid(), "old"))
    provenance = json.loads(spelt(json.dumps(provenance, ensure_ascii=False)))
    too_large = []
    for name, report in reports.items():
        for path in sorted(path for pattern in _FILES for path in report.glob(pattern)):
            published = new / name / path.relative_to(report)
            if path.stat().st_size > LIMIT_BYTES:
                too_large.append(str(published.relative_to(new)))
                continue
            published.parent.mkdir(parents=True, exist_ok=True)
            published.write_text(spelt(path.read_text(encoding="utf-8")), encoding="utf-8")
    chapters = {name: spelt(_chapter(name, report, introduction[name])) for name, report in reports.items()}
    write_json(new / PROVENANCE, provenance)
    (new / "README.md").write_text(_page(title, chapters, provenance, too_large), encoding="utf-8")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def without_interval(results: Mapping[str, Any]) -> list[str]:
    """Sources of sets of which there are too few independent documents for a claim: "set, source (documents)"."""
    found = {}
    for entry in results["sets"]:
        for difference in entry["differences"]:
            if difference["part"] == "source" and difference["units"] < FEWEST_UNITS:
                found[f"{entry['name']}, {difference['name']} ({difference['units']})"] = None
    return list(found)


def _chapter(name: str, report: Path, introduction: str) -> str:
    """The tables of a report, a level down, with the plots where they will be, and the limits of what they say."""
    tables = (report / _TABLES).read_text(encoding="utf-8").partition("\n")[2].strip()
    tables = re.sub(r"^#", "##", tables, flags=re.MULTILINE).replace("](plots/", f"]({name}/plots/")
    parts = [introduction, f"Tables and plots on one page: [{name}/results.html]({name}/results.html)."]
    few = without_interval(json.loads((report / "results.json").read_text(encoding="utf-8")))
    if few:
        parts.append(
            f"Nothing can be claimed of a part with fewer than {FEWEST_UNITS} independent documents (those of one "
            f"group count as one), however large the difference: {'; '.join(few)}."
        )
    return "\n\n".join([*parts, tables])


def _page(title: str, chapters: Mapping[str, str], provenance: Mapping[str, Any], too_large: list[str]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in provenance["packages"].items())
    facts = {
        "commit": ", ".join(provenance["commits"]),
        "machine": "; ".join(provenance["machines"]),
        "versions": f"Python {provenance['python']}, {packages}",
        "seeds": ", ".join(f"{name} {seed}" for name, seed in provenance["seeds"].items()),
    }
    stages = [(stage["stage"], f"{stage['seconds']:,.0f}") for stage in provenance["stages"]]
    stages.append(("all", f"{sum(stage['seconds'] for stage in provenance['stages']):,.0f}"))
    parts = [
        f"# {title}",
        f"    {provenance['command']}",
        *chapters.values(),
        "## How it was made",
        _table(("", ""), list(facts.items())),
        "Text that was used:",
        _table(("file", "SHA-256"), list(provenance["text"].items())),
        "Time of each stage, until it was finished:",
        _table(("stage", "seconds"), stages),
        "The commands, in order:",
        "\n".join(f"    {stage['command']}" for stage in provenance["stages"]),
    ]
    if too_large:
        parts.append(f"Left out, being larger than {LIMIT_BYTES:,} bytes: {', '.join(too_large)}.")
    return "\n\n".join(parts) + "\n"


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
