"""The demo's documents: revisions that differ as said, and sets that do not overlap."""

import json
import random
import runpy

from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import ROOT, SAMPLE, error_line, run_program

revise = runpy.run_path(str(ROOT / "tools" / "make_demo_text.py"), run_name="not_main")["revise"]


@settings(deadline=None, max_examples=200)
@given(lines=st.lists(st.from_regex(r"[a-z ]{0,9}[0-9]{0,3}\n", fullmatch=True), min_size=2, max_size=60))
def test_a_revision_keeps_the_first_half_but_for_numbers_and_loses_a_twentieth(lines):
    revised = revise("".join(lines), random.Random(0)).splitlines(keepends=True)
    assert len(lines) - len(revised) in range(1, max(1, len(lines) // 20) + 1)
    for old, new in zip(lines[: len(lines) // 2], revised, strict=False):
        assert len(old) == len(new)
        assert [c for c in old if not c.isdigit()] == [c for c in new if not c.isdigit()]


def test_evaluation_documents_are_in_the_sets_they_should_be_in(tmp_path):
    flags = [f"--input={SAMPLE}", f"--output={tmp_path}"]
    status, _, stderr = run_program("tools/make_demo_text.py", *flags)
    assert status == 0, stderr
    sets = {
        path.stem: [json.loads(line)["id"] for line in path.read_text().splitlines()]
        for path in tmp_path.glob("*.jsonl")
    }
    names = {stem: {identity.split(",")[0] for identity in ids} for stem, ids in sets.items()}
    assert len(sets["revised"]) == len(sets["new"]) == 5
    assert not names["new"] & (names["database"] | names["train"] | names["revised"])
    assert names["revised"] <= names["database"] and not names["revised"] & names["train"]
    assert all(identity.endswith("revision 2") for identity in sets["revised"])
    assert all(identity.endswith("revision 1") for identity in sets["database"])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    run_program("tools/make_demo_text.py", *flags)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}


def test_too_few_documents_are_refused(tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n')
    line = error_line("tools/make_demo_text.py", f"--input={tmp_path / 'few.jsonl'}", f"--output={tmp_path / 'out'}")
    assert "1 documents are too few to hold out 2 x 5" in line
