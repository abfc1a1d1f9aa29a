"""Text of tokens as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError


class TextStream:
    """Turns tokens into text, piece by piece; the pieces joined are the text of all tokens.

    Bytes that are no UTF-8 become U+FFFD. A character that is not complete and what may be the beginning of a stop
    string are held back until it is clear what they are.

    Attributes:
      stopped: a stop string has come; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """`stop`: strings that end the text.

        Raises:
          UserError: an empty stop string, or one that is not valid text.
        """
        for string in stop:
            if not string:
                raise UserError("a stop string must not be empty")
            try:
                string.encode()
            except UnicodeEncodeError:
                raise UserError("a stop string is not valid UTF-8") from None
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """The text that has become certain with this token; nothing once it has stopped."""
        return self._take(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        # Of several the one that is complete first, so that it does not matter how the text was cut into tokens.
        ends = [(place + len(string), place) for string in self._stop if (place := self._held.find(string)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)[1]], ""
            return text
        keep = max((_overlap(self._held, string) for string in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` begins with and is longer than."""
    return next(
        (size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])),
        0,
    )


def begins_with(text: str, answer: str) -> bool:
    """Whether a continuation gives this answer: it comes first, white space aside, and no letter or digit goes on."""
    text = text.lstrip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()
