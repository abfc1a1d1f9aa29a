"""A trained model and a source of neighbours, made to show what retrieval did to a text."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from retro_jax.config import SPECIAL_TOKENS
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.explorer.matching import common_runs
from retro_jax.explorer.session import MODES, Limits, Session
from retro_jax.inference.neighbours import Given, Neighbours, RetrievedChunk, Retriever, Source, Wanted
from retro_jax.inference.sampling import Request, Sampler
from retro_jax.inference.scoring import Scorer
from retro_jax.inference.text import TextStream
from retro_jax.training.trained import TrainedRun

FORMAT = 1  # of a view
_BURST = 8  # tokens of a continuation that come at once: other requests have their turn in between
_REMEMBERED = 4096  # chunks


class Library(Retriever, Protocol):
    """A retriever that knows where its chunks are from: a database that is followed, or the client of a service."""

    def refresh(self) -> bool:
        """Answers from what the database is now; gives whether that is another version than before."""

    def documents(self, ids: np.ndarray) -> list[tuple[str, str]]:
        """(id, title) of the document of each chunk id [n]; empty strings for -1."""


class Explorer:
    """Continues texts with retrieval and without, and shows what each chunk read and what that changed.

    Not thread-safe: one call, or one step of a generation, at a time.

    Attributes:
      limits: of a session.
    """

    def __init__(
        self,
        run: TrainedRun,
        library: Library,
        *,
        name: str,
        neighbours: int,
        max_context: int,
        on_retrieval_failure: str = "error",
        limits: Limits | None = None,
    ) -> None:
        """Sets the model and the source of neighbours.

        Args:
          run: a trained RETRO.
          library: source of neighbours.
          name: of the library, to be shown.
          neighbours: K, for each chunk.
          max_context: tokens the model sees at most.
          on_retrieval_failure: "error", or "off": a chunk whose retrieval fails goes on without neighbours.
          limits: of a session.

        Raises:
          UserError: the run is a baseline, which reads no neighbours.
        """
        config = run.config.model
        if config.is_baseline:
            raise UserError(f"{run.workdir} is a baseline without retrieval; explore a RETRO")
        self.limits = limits or Limits()
        self._run = run
        self._config = config
        self._tokenizer = run.tokenizer
        self._special = {getattr(run.tokenizer, name) for name in SPECIAL_TOKENS}
        self._library = library
        self._remembered = _Remembered(library)
        self._name = name
        self._k = neighbours
        self._max_context = max_context
        self._on_failure = on_retrieval_failure
        common = {"neighbours": neighbours, "max_context": max_context, "mesh": run.mesh}
        model = (config, run.plan, run.params)
        self._scorer = Scorer(*model, retriever=None, **common)  # every chunk's neighbours are given
        self._sampler = Sampler(
            *model,
            vocab_size=run.tokenizer.vocab_size,
            retriever=self._remembered,
            on_retrieval_failure=on_retrieval_failure,
            **common,
        )

    def describe(self) -> dict[str, Any]:
        """What is explored, JSON-serialisable."""
        return {
            "workdir": str(self._run.workdir),
            "step": self._run.step,
            "database": self._name,
            "neighbours": self._k,
            "chunk_length": self._config.chunk_length,
            "neighbour_length": self._config.neighbour_length,
            "max_context": self._max_context,
        }

    def generate(self, session: Session) -> Iterator[dict[str, Any]]:
        """Continues the prompt with retrieval and without, both at once, and then looks at it.

        Continuations and edits that the session has are forgotten.

        Yields:
          {"mode": "on" or "off", "text", "tokens"} as they come, a few tokens at a time; in the end {"view": …}.

        Raises:
          UserError: what is asked for is above the limits; what the retriever raises.
        """
        self._follow()
        prompt = self._encode_prompt(session)
        if session.max_new_tokens > self.limits.new_tokens:
            raise UserError(
                f"{session.max_new_tokens} new tokens are asked for; at most {self.limits.new_tokens} are made"
            )
        tokens: dict[str, list[int]] = {mode: [] for mode in MODES}
        streams = {mode: TextStream(self._tokenizer) for mode in MODES}
        sources = {}
        if session.max_new_tokens:
            for mode in MODES:
                sources[mode] = self._sampler.generate_batch(
                    [Request(prompt)],
                    max_new_tokens=session.max_new_tokens,
                    decoding=session.decoding,
                    retrieve=mode == "on",
                    burst=_BURST,
                )
        while sources:
            for mode, source in list(sources.items()):
                piece, fresh = "", []
                for _ in range(_BURST):
                    if (found := next(source, None)) is None:
                        del sources[mode]
                        piece += streams[mode].close()
                        break
                    fresh.append(found[1].token)
                    piece += streams[mode].push(found[1].token)
                tokens[mode] += fresh
                yield {"mode": mode, "text": piece, "tokens": fresh}
        yield {
            "view": self.view(dataclasses.replace(session, on=tuple(tokens["on"]), off=tuple(tokens["off"]), edits=()))
        }

    def view(self, session: Session) -> dict[str, Any]:
        """What there is to see of a session, JSON-serialisable.

        Returns:
          "format", "run", "session", "texts" (of each continuation), "prompt_tokens",
          "tokens": of the text shown, each {"text", "off", "on" (losses in nats), "run" (see `common_runs`)},
          "chunks": each {"number", "first", "end" (its tokens), "bytes", "bits_per_byte", "reads"}; it reads the
            neighbours that the chunk before it retrieved, {"chunk": that one's number, "failure", "neighbours"},
          "total": {"bytes", "bits_per_byte"}. Bits per byte are {"off", "on", "as_retrieved"}: ON is as edited.

        Raises:
          UserError: what is asked for is above the limits or does not exist; what the retriever raises.
        """
        self._follow()
        prompt = self._encode_prompt(session)
        self._check_tokens(session)
        text = [self._tokenizer.bos_id, *prompt, *getattr(session, session.shown)]
        if len(text) == 1:
            raise UserError("there is nothing to look at: write a prompt, or ask for new tokens")
        retrieved = self._retrieve(text)
        slots = [self._slots(chunk, session) for chunk in retrieved]
        self._check_edits(session, len(retrieved))
        losses = {"off": self._losses(text, None), "as_retrieved": self._losses(text, _given(retrieved))}
        losses["on"] = losses["as_retrieved"]
        if session.edits:
            losses["on"] = self._losses(text, {chunk: [slot.read for slot in each] for chunk, each in enumerate(slots)})
        length = self._config.chunk_length
        runs, chunks = [0] * len(text), []
        for first in range(0, len(text), length):
            place = slice(first, min(first + length, len(text)))
            number, reads = first // length + 1, None
            if number > 1:
                found, mine = retrieved[number - 2], slots[number - 2]
                runs[place] = common_runs(text[place], [slot.read for slot in mine])
                neighbours = [self._describe_slot(slot, text[place]) for slot in mine]
                reads = {"chunk": number - 1, "failure": found.failure, "neighbours": neighbours}
            span = {"first": max(place.start - 1, 0), "end": place.stop - 1}
            chunks.append({"number": number, **span, **self._costs(text, losses, place), "reads": reads})
        self._name_documents(chunks)
        decoded = _pieces(self._tokenizer, text[1:])
        return {
            "format": FORMAT,
            "run": self.describe(),
            "session": session.to_json(),
            "texts": {mode: self._tokenizer.decode(getattr(session, mode)) for mode in MODES},
            "prompt_tokens": len(prompt),
            "tokens": [
                {"text": piece, "off": _rounded(off), "on": _rounded(on), "run": run}
                for piece, off, on, run in zip(decoded, losses["off"][1:], losses["on"][1:], runs[1:], strict=True)
            ],
            "chunks": chunks,
            "total": self._costs(text, losses, slice(0, len(text))),
        }

    def _follow(self) -> None:
        try:
            changed = self._library.refresh()
        except (UserError, OSError):
            if self._on_failure == "error":
                raise
            changed = True  # it answers no more, and the chunks will say so
        if changed:
            self._remembered.forget()

    def _encode_prompt(self, session: Session) -> list[int]:
        prompt, most = self._tokenizer.encode(session.prompt), self.limits.prompt_tokens
        if len(prompt) > most:
            raise UserError(f"the prompt has {len(prompt)} tokens; at most {most} are taken, shorten it")
        return prompt

    def _check_tokens(self, session: Session) -> None:
        size, most = self._tokenizer.vocab_size, self.limits.new_tokens
        for mode in MODES:
            tokens = getattr(session, mode)
            if len(tokens) > most:
                raise UserError(f"session.{mode} has {len(tokens)} tokens, at most {most} are taken")
            for token in tokens:
                if not 0 <= token < size or token in self._special:
                    raise UserError(f"session.{mode} holds token id {token}, which no text has: of another model?")

    def _check_edits(self, session: Session, chunks: int) -> None:
        for edit in session.edits:
            if not (1 <= edit.chunk <= chunks and 1 <= edit.rank <= self._k):
                raise UserError(
                    f"session.edits: there is no neighbour {edit.rank} of chunk {edit.chunk}; complete chunks are "
                    f"{chunks}, neighbours of each {self._k}"
                )

    def _retrieve(self, text: Sequence[int]) -> list[RetrievedChunk]:
        length = self._config.chunk_length
        chunks = np.asarray(text[: len(text) // length * length], np.int32).reshape(-1, length)
        source = Source(self._config, self._remembered, self._k, self._on_failure)
        return source.find([Wanted(number, (number + 1) * length, chunk) for number, chunk in enumerate(chunks)])

    def _losses(self, text: Sequence[int], given: Given | None) -> np.ndarray:
        """Nats of each token [T], 0 of the start token; None is OFF."""
        scored = self._scorer.score(text[1:], retrieve=given is not None, given=given)
        return np.concatenate([np.zeros(1), -scored.log_probabilities.astype(np.float64)])

    def _slots(self, chunk: RetrievedChunk, session: Session) -> list["_Slot"]:
        edits = {edit.rank: edit for edit in session.edits if edit.chunk == chunk.chunk + 1}
        slots = []
        for rank, (number, distance, tokens) in enumerate(
            zip(chunk.ids, chunk.distances, chunk.tokens, strict=True), 1
        ):
            found = tokens[tokens != self._config.pad_id].tolist()
            slot = _Slot(rank, "retrieved" if found else "none", int(number), float(distance), found)
            if edit := edits.get(rank):
                if edit.text is None:
                    slot = dataclasses.replace(slot, state="dropped")
                else:
                    own = self._tokenizer.encode(edit.text)
                    kept = own[: self._config.neighbour_length]
                    slot = _Slot(rank, "typed", -1, math.inf, kept, edit.text, len(own) - len(kept))
            slots.append(slot)
        return slots

    def _describe_slot(self, slot: "_Slot", reader: Sequence[int]) -> dict[str, Any]:
        """A place for a neighbour; its two parts are lists of {"text", "run"}, run with the chunk that reads it."""
        runs = common_runs(slot.tokens, [reader] if slot.state != "dropped" else [])
        parts: dict[str, list[dict[str, Any]]] = {"neighbour": [], "continuation": []}
        for place, (token, piece, run) in enumerate(
            zip(slot.tokens, _pieces(self._tokenizer, slot.tokens), runs, strict=True)
        ):
            if token not in self._special:
                part = "neighbour" if place < self._config.chunk_length else "continuation"
                parts[part].append({"text": piece, "run": run})
        return {
            "rank": slot.rank,
            "state": slot.state,
            "id": slot.id,
            "distance": slot.distance if math.isfinite(slot.distance) else None,
            "typed": slot.text,
            "cut": slot.cut,
            **parts,
        }

    def _name_documents(self, chunks: list[dict[str, Any]]) -> None:
        """Adds document and title to all neighbours, asked for at once."""
        slots = [slot for chunk in chunks if chunk["reads"] for slot in chunk["reads"]["neighbours"]]
        ids = np.asarray([slot["id"] for slot in slots], np.int64)
        names = self._library.documents(ids) if (ids >= 0).any() else [("", "")] * len(slots)
        for slot, (document, title) in zip(slots, names, strict=True):
            slot["document"], slot["title"] = document, title

    def _costs(self, text: Sequence[int], losses: dict[str, np.ndarray], place: slice) -> dict[str, Any]:
        """Bytes of some tokens, and what one costs: nats / (bytes x ln 2), None of no byte."""
        size = int(self._tokenizer.token_bytes[text[place]].sum())
        costs = {
            mode: _rounded(values[place].sum() / (size * math.log(2))) if size else None
            for mode, values in losses.items()
        }
        return {"bytes": size, "bits_per_byte": costs}


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The place of one neighbour of a chunk.

    Attributes:
      rank: from 1.
      state: "retrieved", "dropped", "typed", or "none" when fewer were found.
      id, distance: of the database's chunk; -1 and inf for none.
      tokens: without padding.
      text: what was typed.
      cut: tokens of it that are too many for the model.
    """

    rank: int
    state: str
    id: int
    distance: float
    tokens: list[int]
    text: str | None = None
    cut: int = 0

    @property
    def read(self) -> list[int]:
        """Tokens that the model reads in this place."""
        return [] if self.state == "dropped" else self.tokens


class _Remembered:
    """A retriever that need not be asked for the same chunk again."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._known: collections.OrderedDict[tuple[int, bytes], tuple] = collections.OrderedDict()

    def forget(self) -> None:
        self._known.clear()

    def retrieve(self, chunk_tokens: np.ndarray, k: int) -> Neighbours:
        keys = [(k, chunk.tobytes()) for chunk in np.asarray(chunk_tokens, np.int32)]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        if new:
            answer = self._retriever.retrieve(chunk_tokens[list(new.values())], k)
            for key, *values in zip(new, answer.ids, answer.distances, answer.tokens, strict=True):
                self._known[key] = tuple(values)
        for key in keys:
            self._known.move_to_end(key)
        found = _Found(*(np.stack(values) for values in zip(*(self._known[key] for key in keys), strict=True)))
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return found


@dataclasses.dataclass(frozen=True)
class _Found:
    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


def _given(retrieved: Sequence[RetrievedChunk]) -> Given:
    return {chunk.chunk: chunk.tokens for chunk in retrieved}


def _pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token completes; joined they are the text of all."""
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    if pieces:
        pieces[-1] += stream.close()
    return pieces


def _rounded(value: float) -> float:
    return round(float(value), 5)
