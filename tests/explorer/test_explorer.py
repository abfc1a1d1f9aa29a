"""What a view says is what scorer, tokenizer and neighbours say."""

import dataclasses
import json
import math

import numpy as np
import pytest
from small_run import MODEL, K, M

from retro_jax.data.tokenizer import BOS_ID
from retro_jax.errors import UserError
from retro_jax.explorer.matching import common_runs
from retro_jax.explorer.page import render
from retro_jax.explorer.session import Edit, Session
from retro_jax.inference.decoding import Decoding

TEXT = "The capital of a country is a city, said the 日本 reader. It has many kings and some ministers."


@pytest.fixture(scope="module")
def view(explorer):
    return explorer.view(Session(TEXT, 0))


def bits(view, mode, part):
    nats = sum(token[mode] for token in view["tokens"][part["first"] : part["end"]])
    return nats / (part["bytes"] * math.log(2))


def test_tokens_and_chunks_are_the_text(view, explorer):
    assert "".join(token["text"] for token in view["tokens"]) == TEXT
    assert view["prompt_tokens"] == len(view["tokens"])
    chunks = view["chunks"]
    # The start token is the first of the first chunk.
    assert chunks[0]["end"] == M - 1 and chunks[1]["end"] == 2 * M - 1
    assert [chunk["first"] for chunk in chunks[1:]] == [chunk["end"] for chunk in chunks[:-1]]
    assert chunks[-1]["end"] == len(view["tokens"])
    assert view["total"]["bytes"] == len(TEXT.encode()) == sum(chunk["bytes"] for chunk in chunks)


def test_losses_are_the_scorers_and_bits_per_byte_count_every_byte(view, explorer, library):
    tokens = library._tokenizer.encode(TEXT)
    off = -explorer._scorer.score(tokens, retrieve=False).log_probabilities
    np.testing.assert_allclose([token["off"] for token in view["tokens"]], off, atol=1e-5)
    for chunk in view["chunks"]:
        for mode in ("off", "on"):
            assert chunk["bits_per_byte"][mode] == pytest.approx(bits(view, mode, chunk), abs=1e-4)
    total = {"first": 0, "end": len(tokens), "bytes": len(TEXT.encode())}
    assert view["total"]["bits_per_byte"]["on"] == pytest.approx(bits(view, "on", total), abs=1e-4)
    gains = np.abs([token["off"] - token["on"] for token in view["tokens"]])
    assert gains[: M - 1].max() < 1e-4 < gains[M - 1 :].min()  # the first chunk reads no neighbours


def test_a_chunk_shows_the_neighbours_that_the_one_before_it_retrieved(view, library):
    text = [BOS_ID, *library._tokenizer.encode(TEXT)]
    assert view["chunks"][0]["reads"] is None
    for number, chunk in enumerate(view["chunks"][1:], start=1):
        assert chunk["reads"]["chunk"] == number
        found = library.retrieve(np.asarray([text[(number - 1) * M : number * M]]), K)
        own = text[number * M : (number + 1) * M]
        for slot, tokens in zip(chunk["reads"]["neighbours"], found.tokens[0], strict=True):
            shown = [*slot["neighbour"], *slot["continuation"]]
            kept = [token for token in tokens.tolist() if token != BOS_ID]
            assert "".join(part["text"] for part in shown) == library._tokenizer.decode(kept)
            runs = [run for run, token in zip(common_runs(tokens, [own]), tokens, strict=True) if token != BOS_ID]
            assert [part["run"] for part in shown] == runs
            assert slot["document"] == f"doc-{slot['id']}" and slot["distance"] == slot["rank"] - 0.75
        runs = [token["run"] for token in view["tokens"][chunk["first"] : chunk["end"]]]
        assert runs == common_runs(own, found.tokens[0].tolist())


def test_a_dropped_neighbour_and_a_typed_one_rescore_what_follows_and_say_what_it_was(view, explorer, library):
    asked = library.chunks
    edits = (Edit(2, 1), Edit(3, 2, "a text of one's own, which is longer than the sixteen tokens that are read"))
    edited = explorer.view(Session(TEXT, 0, edits=edits))
    assert library.chunks == asked  # nothing was retrieved again
    change = [abs(a["on"] - b["on"]) for a, b in zip(view["tokens"], edited["tokens"], strict=True)]
    assert max(change[: 2 * M - 1]) == 0 < min(change[2 * M - 1 : 4 * M - 1])
    assert [a["off"] for a in view["tokens"]] == [b["off"] for b in edited["tokens"]]
    for before, after in zip(view["chunks"], edited["chunks"], strict=True):
        assert after["bits_per_byte"]["as_retrieved"] == before["bits_per_byte"]["on"]
    dropped = edited["chunks"][2]["reads"]["neighbours"][0]
    assert dropped["state"] == "dropped" and {part["run"] for part in dropped["continuation"]} == {0}
    typed = edited["chunks"][3]["reads"]["neighbours"][1]
    assert typed["state"] == "typed" and typed["cut"] > 0 and typed["distance"] is None
    words = "".join(part["text"] for part in typed["neighbour"] + typed["continuation"])
    assert typed["typed"].startswith(words) and len(typed["neighbour"] + typed["continuation"]) == 2 * M


def test_generating_gives_both_continuations_as_they_come_and_a_seed_repeats_them(explorer, library):
    session = Session("Some words to begin with, and more of them", 20, Decoding(seed=8))
    *parts, last = explorer.generate(session)
    view = last["view"]
    for mode in ("on", "off"):
        mine = [part for part in parts if part["mode"] == mode]
        tokens = [token for part in mine for token in part["tokens"]]
        assert len(tokens) == 20 and tokens == view["session"][mode] and len(mine) >= 3
        assert "".join(part["text"] for part in mine) == view["texts"][mode] == library._tokenizer.decode(tokens)
    assert view["texts"]["on"] != view["texts"]["off"]
    assert "".join(token["text"] for token in view["tokens"]) == session.prompt + view["texts"]["on"]
    *_, again = explorer.generate(session)
    assert again == last
    # What the page keeps of it is enough to show it again, and so is the other continuation.
    kept = json.loads(json.dumps(view["session"]))
    assert explorer.view(Session.parse(kept)) == view
    other = explorer.view(Session.parse(kept | {"shown": "off"}))
    assert other["tokens"][-1]["text"] != view["tokens"][-1]["text"]


def test_a_chunk_whose_retrieval_fails_goes_on_without_neighbours_and_says_why(make_explorer, library):
    fresh = {mode: make_explorer(on_retrieval_failure=mode) for mode in ("off", "error")}
    library.broken = True
    try:
        view = fresh["off"].view(Session(TEXT, 0))
        with pytest.raises(ConnectionError):
            fresh["error"].view(Session(TEXT, 0))
    finally:
        library.broken = False
    reads = view["chunks"][1]["reads"]
    assert reads["failure"] == "the service is gone" and {slot["state"] for slot in reads["neighbours"]} == {"none"}
    assert all(token["on"] == pytest.approx(token["off"], abs=1e-4) for token in view["tokens"])


def test_a_database_that_has_changed_is_asked_again(view, explorer, library):
    asked, library.changed = library.chunks, True
    try:
        assert explorer.view(Session(TEXT, 0)) == view
    finally:
        library.changed = False
    assert library.chunks > asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "word " * 400}, "the prompt has .* tokens; at most 200"),
        ({"on": tuple(range(4, 69))}, "session.on has 65 tokens, at most 64"),
        ({"on": (2,)}, "session.on holds token id 2, which no text has"),
        ({"off": (MODEL.vocab_size,)}, f"session.off holds token id {MODEL.vocab_size}, which no text has"),
        ({"edits": (Edit(99, 1),)}, "no neighbour 1 of chunk 99"),
        ({"edits": (Edit(1, K + 1),)}, "no neighbour 3 of chunk 1"),
        ({"edits": (Edit(1, 1, "\ud800"),)}, "lone surrogate"),
        ({"prompt": "", "max_new_tokens": 0}, "nothing to look at"),
    ],
)
def test_what_is_above_the_limits_or_not_there_is_refused(explorer, changes, message):
    with pytest.raises(UserError, match=message):
        explorer.view(dataclasses.replace(Session(TEXT, 0), **changes))


def test_no_more_is_generated_than_the_limit(explorer):
    with pytest.raises(UserError, match="65 new tokens are asked for; at most 64"):
        next(explorer.generate(Session(TEXT, 65)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "session: expected an object"),
        ({}, "session.prompt: missing"),
        ({"prompt": 1}, "session.prompt: expected str"),
        ({"prompt": "", "promt": ""}, "did you mean 'prompt'"),
        ({"prompt": "", "decoding": {"temperature": -1}}, "temperature -1.0 must be"),
        ({"prompt": "", "shown": "both"}, "none of on, off"),
        ({"prompt": "", "max_new_tokens": -1}, "must not be negative"),
        ({"prompt": "", "on": ["a"]}, r"session.on\[0\]: expected int"),
        ({"prompt": "", "edits": [{"chunk": 1, "rank": 1}] * 2}, "for the same neighbour"),
    ],
)
def test_a_session_is_parsed_strictly(values, message):
    with pytest.raises(UserError, match=message):
        Session.parse(values)


def test_the_page_in_one_file_asks_for_nothing_and_its_text_is_data(view):
    page = render(view)
    assert "src=" not in page.replace("src=x", "") and '<link rel="stylesheet"' not in page
    assert "http://" not in page and "https://" not in page
    start = page.index('id="view">') + len('id="view">')
    data = page[start : page.index("</script>", start)]
    assert "<" not in data and json.loads(data) == view
