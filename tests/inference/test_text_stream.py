"""Text comes in whole characters, stops before a stop string, and loses nothing."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.inference.text import TextStream, begins_with


class Bytes:
    """A tokenizer whose tokens are bytes."""

    @staticmethod
    def decode_bytes(ids):
        return bytes(np.asarray(ids, np.uint8).tolist())


@given(data=st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
@example("añ日😀".encode())
def test_the_pieces_joined_are_the_text_and_each_is_whole(data):
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in data] + [stream.close()]
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


@given(text=st.text("abñ", max_size=14), stop=st.lists(st.text("abñ", min_size=1, max_size=4), max_size=3))
@example("abab", ["bb", "aba"])
def test_the_text_ends_before_the_stop_string_that_is_complete_first(text, stop):
    stream, told = TextStream(Bytes(), stop), ""
    for byte in text.encode():
        told += stream.push(byte)
        assert not any(string in told for string in stop)
        if stream.stopped:
            break
    told += stream.close()
    complete = [end for end in range(len(text) + 1) if any(text[:end].endswith(string) for string in stop)]
    assert stream.stopped == bool(complete)
    if complete:
        longest = max(len(string) for string in stop if text[: complete[0]].endswith(string))
        assert told == text[: complete[0] - longest]
    else:
        assert told == text


def test_what_cannot_belong_to_a_stop_string_is_told_at_once():
    stream = TextStream(Bytes(), ["\n\n"])
    assert [stream.push(byte) for byte in b"ab\nc\n\nd"] == ["a", "b", "", "\nc", "", "", ""]
    assert stream.stopped and stream.close() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="empty"):
        TextStream(Bytes(), [""])


@pytest.mark.parametrize(
    ("text", "right"),
    [(" Oslo.", True), ("\nOslo", True), ("Oslo, as", True), ("Oslos", False), ("Oslo7", False), (" in Oslo", False)],
)
def test_an_answer_comes_first_and_whole(text, right):
    assert begins_with(text, "Oslo") == right
