"""What a person asked the explorer for: all that is needed to show the same again."""

import dataclasses
from typing import Any

from retro_jax.config import from_dict, to_dict
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding

MODES = ("on", "off")


@dataclasses.dataclass(frozen=True)
class Edit:
    """Another neighbour in the place of one that was retrieved.

    Attributes:
      chunk: number of the chunk that retrieved it, from 1.
      rank: its rank, from 1.
      text: read instead of it; None: nothing is.
    """

    chunk: int
    rank: int
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Session:
    """A text, how it came about, and which neighbours were exchanged.

    Attributes:
      prompt: the text to be continued, or only to be looked at.
      max_new_tokens: tokens that were asked for; 0 looks at the prompt alone.
      decoding: how they were chosen.
      on, off: tokens of the continuations with retrieval and without.
      shown: "on" or "off", the continuation that is looked at after the prompt.
      edits: at most one for a chunk and rank.
    """

    prompt: str
    max_new_tokens: int = 128
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    on: tuple[int, ...] = ()
    off: tuple[int, ...] = ()
    shown: str = "on"
    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        if self.shown not in MODES:
            raise UserError(f"session.shown {self.shown!r} is none of {', '.join(MODES)}")
        if self.max_new_tokens < 0:
            raise UserError(f"session.max_new_tokens {self.max_new_tokens} must not be negative")
        if len({(edit.chunk, edit.rank) for edit in self.edits}) < len(self.edits):
            raise UserError("session.edits: two of them are for the same neighbour")

    @classmethod
    def parse(cls, values: Any) -> "Session":
        """Builds it from JSON, strictly.

        Raises:
          UserError: not a session; the message names what is wrong with it.
        """
        if not isinstance(values, dict):
            raise UserError("session: expected an object")
        return from_dict(cls, values, "session")

    def to_json(self) -> dict[str, Any]:
        """What `parse` reads."""
        return to_dict(self)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one session may ask for: tokens of a prompt, new tokens."""

    prompt_tokens: int = 1024
    new_tokens: int = 512
