"""The results of suites: read back, and several as one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_jax.errors import UserError

# By this results.json is known.
RESULTS = {"kind": "suite", "format_version": 1}
Results = Mapping[str, Any]


def load_results(directory: str | os.PathLike) -> Results:
    """What `Suite.run` wrote into a directory.

    Raises:
      UserError: it did not finish, or the file is damaged or of something else.
    """
    path = Path(directory) / "results.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; finish this suite first")
    again = "run the suite again, what it has computed is kept"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())}); {again}") from None
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in RESULTS.items()):
        raise UserError(f"{path}: no results of a suite, or another version's; {again}")
    return found


def side_by_side(results: Mapping[str, Results]) -> dict[str, Any]:
    """Several suites as one, each label with the name of its suite before it.

    Of what describes a set only what all suites say of it is kept.

    Args:
      results: name to what `Suite.run` wrote.

    Raises:
      UserError: two scored different text under one name.
    """

    def named(name: str, entry: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        return {**entry, **{key: f"{name}: {entry[key]}" for key in keys if entry[key] is not None}}

    sets: dict[str, dict[str, Any]] = {}
    for name, one in results.items():
        for entry in one["sets"]:
            known = sets.setdefault(entry["name"], {**entry, "rows": [], "differences": []})
            if (known["bytes"], known["documents"]) != (entry["bytes"], entry["documents"]):
                raise UserError(f"{name} scored another text as {entry['name']!r}; figures of it cannot be compared")
            sets[entry["name"]] = {
                **{key: value for key, value in known.items() if entry.get(key) == value},
                "rows": known["rows"] + [named(name, row, "label", "model", "reference") for row in entry["rows"]],
                "differences": known["differences"]
                + [named(name, row, "first", "second") for row in entry["differences"]],
            }
    return {
        "models": [named(name, model, "name") for name, one in results.items() for model in one["models"]],
        "sets": list(sets.values()),
        "sweeps": [named(name, sweep, "model") for name, one in results.items() for sweep in one["sweeps"]],
        "left_out": [f"{name}: {line}" for name, one in results.items() for line in one["left_out"]],
    }


def divided(entry: Mapping[str, Any], part: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The set once for every way in which its rows divide the text into these parts, with the stem of its plot.

    Suites with other neighbours or another k do so in other ways, and their figures of parts are not of the same text.
    Rows that do not know the parts are left out.
    """
    ways: dict[str, list[Mapping[str, Any]]] = {}
    for row in entry["rows"]:
        if part in row["digests"]:
            ways.setdefault(row["digests"][part], []).append(row)
    found = []
    for number, rows in enumerate(ways.values(), 1):
        labels = {row["label"] for row in rows}
        differences = [one for one in entry["differences"] if {one["first"], one["second"]} <= labels]
        stem = f"{part}-{entry['name']}" + (f"-{number}" if number > 1 else "")
        found.append((stem, {**entry, "rows": rows, "differences": differences}))
    return found
