"""Published results are small, whole, apart from the work, and say how they were made and what they do not prove."""

import json

import pytest

from retro_jax.errors import UserError
from retro_jax.publishing import LIMIT_BYTES, check_target, publish

PROVENANCE = {
    "command": "python launch/results.py --data=/here/text",
    "commits": ["c0ffee"],
    "machines": ["a processor, 2 cores, 4 GiB"],
    "python": "3.11.0",
    "packages": {"jax": "0.10.2"},
    "seeds": {"tokenizers": 5},
    "text": {"corpus/train.jsonl": "abc123"},
    "stages": [{"stage": "tokens", "command": "python tools/x.py --input=/here/text/a", "seconds": 61.0}],
}


def write_report(directory, value="0.5"):
    (directory / "plots").mkdir(parents=True)
    (directory / "losses").mkdir()
    (directory / "losses" / "values.npy").write_bytes(b"1")
    (directory / "plots" / "gain.svg").write_text("<svg/>")
    (directory / "results.html").write_text("<p>/here/text</p>")
    (directory / "results.md").write_text(f"# Evaluation\n\n{value}\n\n## Gain\n\n![gain](plots/gain.svg)\n")
    parts = [("all", "all", 9), ("source", "news", 8), ("source", "books", 2), ("overlap", "0", 1)]
    differences = [{"part": part, "name": name, "units": units} for part, name, units in parts] * 2
    (directory / "results.json").write_text(json.dumps({"sets": [{"name": "valid", "differences": differences}]}))


def put(target, work):
    publish(
        target,
        {"text": work / "report", "planted": work / "planted"},
        title="Results",
        introduction={"text": "## Real text\n\nIt was read.", "planted": "## Planted"},
        provenance=PROVENANCE,
        spelling={"/here/text": "FOLDER"},
    )


@pytest.fixture
def work(tmp_path):
    for name in ("report", "planted"):
        write_report(tmp_path / "work" / name)
    return tmp_path / "work"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_page_has_tables_plots_limits_and_how_it_was_made(work, tmp_path):
    (work / "planted" / "results.html").write_text("x" * (LIMIT_BYTES + 1))
    target = tmp_path / "docs" / "results"
    put(target, work)
    assert files(target) == [
        "README.md",
        "planted/plots/gain.svg",
        "planted/results.json",
        "provenance.json",
        "text/plots/gain.svg",
        "text/results.html",
        "text/results.json",
    ]
    page = (target / "README.md").read_text()
    assert page.startswith("# Results\n") and "\n## Real text\n\nIt was read.\n" in page and "\n### Gain\n" in page
    assert "![gain](text/plots/gain.svg)" in page and "![gain](planted/plots/gain.svg)" in page
    assert "valid, books (2)." in page and "news" not in page and "Left out, being larger" in page
    for fact in ("c0ffee", "2 cores", "jax 0.10.2", "tokenizers 5", "abc123", "| tokens | 61 |", "| all | 61 |"):
        assert fact in page
    assert "    python tools/x.py --input=FOLDER/a\n" in page
    assert not any("/here" in path.read_text() for path in target.rglob("*.*") if path.is_file())
    assert json.loads((target / "provenance.json").read_text())["command"] == "python launch/results.py --data=FOLDER"


def test_the_folder_is_replaced_as_a_whole_or_not_at_all(work, tmp_path):
    target = tmp_path / "results"
    put(target, work)
    (work / "report" / "plots" / "gain.svg").rename(work / "report" / "plots" / "other.svg")
    before = {name: (target / name).read_text() for name in files(target)}
    tables = (work / "planted" / "results.md").read_text()
    (work / "planted" / "results.md").unlink()
    with pytest.raises(FileNotFoundError):  # as if it were killed before all was written
        put(target, work)
    assert {name: (target / name).read_text() for name in files(target)} == before
    (work / "planted" / "results.md").write_text(tables)
    put(target, work)
    assert "text/plots/other.svg" in files(target) and "text/plots/gain.svg" not in files(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "work"]


def test_folders_that_hold_something_else_are_refused(work, tmp_path):
    for target in (work, work / "published", tmp_path, work / "report" / ".." / "x"):
        with pytest.raises(UserError, match="would replace what is in"):
            check_target(target, work)
    (tmp_path / "docs").mkdir()
    check_target(tmp_path / "docs", work)
    (tmp_path / "docs" / "page.md").write_text("mine")
    with pytest.raises(UserError, match="holds other files than published results"):
        check_target(tmp_path / "docs", work)
    with pytest.raises(UserError, match="is a file"):
        check_target(tmp_path / "docs" / "page.md", work)
    put(tmp_path / "results", work)
    check_target(tmp_path / "results", work)
