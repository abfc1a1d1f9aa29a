"""The report is one self-contained page that shows what was measured and escapes what was written by others."""

from html.parser import HTMLParser

import pytest

from retro_jax.evaluation.report import render
from retro_jax.evaluation.table import format_table


def result(mode, bpb, groups=()):
    score = {"bits_per_byte": bpb, "nats_per_token": 2.0, "nats": 5.0, "tokens": 3, "bytes": 1234, "documents": 2}
    return {
        "run": f"runs/{mode}",
        "step": 7,
        "mode": mode,
        "k": 2 if mode in ("on", "shuffled") else 0,
        **score,
        "groups": {name: score for name in groups},
    }


RESULTS = [result("baseline", 2.0), result("off", 2.1), result("on", 1.5, ("news", "web")), result("shuffled", 2.2)]


@pytest.fixture(scope="module")
def page():
    neighbour = {
        "chunk": 1,
        "rank": 1,
        "id": 5,
        "distance": 0.25,
        "document": "doc<5>",
        "title": "",
        "neighbour": "<script>alert(1)</script>",
        "continuation": "and on",
    }
    return render(
        title="A & B",
        introduction="intro",
        facts=[("chunks", "1,000")],
        curves={"retro": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}], "baseline": [{"step": 1, "loss": 3.1}]},
        evaluations=[("Held out", "why", RESULTS)],
        samples=[{"retrieval": True, "prompt": "p<q", "continuation": "r&s", "neighbours": [neighbour]}],
        stages=[("tokenizer", 1.25)],
        explorer=("explorer.html", "token by <token>"),
    )


def test_the_page_is_well_formed_and_asks_the_network_for_nothing(page):
    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("script", "link", "iframe", "img"), tag
            for name, value in attributes:
                assert name not in ("src", "onload") and (name != "href" or value == "explorer.html"), value

    Checker().feed(page)
    assert page.startswith("<!doctype html>") and page.count("<svg") == 2


def test_text_of_documents_and_prompts_is_escaped(page):
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "<a href='explorer.html'>token by &lt;token&gt;</a>" in page
    assert "doc&lt;5&gt;" in page and "p&lt;q" in page and "A &amp; B" in page


def test_every_figure_is_shown(page):
    for text in ("2.0000", "1.5000", "-25.0 %", "+5.0 %", "1,234", "1,000", "distance 0.2500", "1.2"):
        assert text in page


def test_the_terminal_table_is_aligned_and_shows_groups():
    lines = format_table(RESULTS).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert sum("  news" in line for line in lines) == 1
    assert lines[2].startswith("runs/baseline")
