"""Tokens without loss: `decode(encode(text)) == text` for every string, and the bytes of each token are known.

Three things make it so. Bytes of characters outside the vocabulary become byte pieces. The text is not normalised, no
space is put before it, none is removed (`vocabularies` sees to it with tokenizers that others trained). And U+2581,
which SentencePiece writes for a space inside its pieces, is spelt as its three byte pieces when it stands in the text
itself. Decoding joins the bytes of the pieces, so bits per byte are exact: `token_bytes` says how many UTF-8 bytes of
the text each token stands for.
"""

import io
import random
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from retro_jax.data.vocabularies import PROBE, SPACE_MARK, lossy, read_vocabulary
from retro_jax.errors import UserError
from retro_jax.files import atomic_write, file_sha256

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
MODEL_TYPES = ("unigram", "bpe")

# Always pieces of their own, whatever the text trained on.
_WHITESPACE_PIECES = ["\n", "\n\n", "\t"]
# The trainer drops a sentence with one of its reserved characters (tab, U+2585) and one longer than its limit.
_SENTENCE_BREAKS = re.compile("[\n\t\0\u2581\u2585]+")
_MAX_SENTENCE_CHARACTERS = 4096
# The search for the best split adds scores up in float32, so a document is given to it in parts of about this size.
_PART_CHARACTERS = 4096
_MAX_PART_CHARACTERS = 65_536
_PARTS_AT_ONCE = 64  # their tokens are Python objects for a while
_LINE_END = re.compile("\n+")


def train_tokenizer(
    texts: Iterable[str],
    path: str | Path,
    *,
    vocab_size: int,
    model_type: str = "unigram",
    character_coverage: float = 0.9995,
    max_sentences: int = 1_000_000,
    seed: int = 0,
) -> "Tokenizer":
    """Trains a SentencePiece model on `texts` and writes it to `path` (whole, or not at all).

    Ids 0 to 3 are PAD, BOS, EOS and unknown (never produced). Newline, double newline and tab are pieces of their own;
    runs of spaces become pieces where the text has them. The same texts and settings give the same model.

    Args:
      texts: documents; read once.
      path: file to write.
      vocab_size: V, number of pieces.
      model_type: "unigram" or "bpe".
      character_coverage: share of the characters that get a piece; the rest is spelt in bytes.
      max_sentences: a uniform sample of so many lines is trained on when there are more.
      seed: of that sample.

    Raises:
      UserError: no text, or a vocabulary too large or too small for it (the message names the possible number).
    """
    if model_type not in MODEL_TYPES:
        raise UserError(f"model_type {model_type!r} is none of {', '.join(MODEL_TYPES)}")
    if not 0 < character_coverage <= 1:
        raise UserError(f"character_coverage {character_coverage} is not above 0 and at most 1")
    sentences = _sample_sentences(texts, max_sentences, seed)
    if not sentences:
        raise UserError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=_WHITESPACE_PIECES,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            max_sentence_length=4 * _MAX_SENTENCE_CHARACTERS,
            num_threads=8,  # fixed, since the sums of several threads depend on how many they are
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return Tokenizer(path)


class Tokenizer:
    """A tokenizer read from a file: a SentencePiece model, or the JSON of the tokenizers library.

    Attributes:
      path: the file.
      vocab_size: V, PAD included.
      pad_id, bos_id, eos_id, unk_id: of special tokens, which `encode` does not produce: 0, 1, 2, 3 in a model of
        `train_tokenizer`. Where a tokenizer has no PAD it is the last id, V - 1; unk_id is -1 where there is none.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the file.

        Raises:
          UserError: no such file, not a tokenizer, or one that loses text (normalises, has no byte pieces).
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such tokenizer file; make one with tools/train_tokenizer.py")
        vocabulary = read_vocabulary(self.path)
        self._bytes, self._encode = vocabulary.bytes, vocabulary.encode
        self._marks_spaces, self._whole = vocabulary.marks_spaces, vocabulary.whole
        self.vocab_size = len(self._bytes)
        self.pad_id, self.bos_id = vocabulary.pad_id, vocabulary.bos_id
        self.eos_id, self.unk_id = vocabulary.eos_id, vocabulary.unk_id
        self._space_mark_ids: list[int] = []
        if self._marks_spaces:
            single = {piece: token for token, piece in reversed(list(enumerate(self._bytes))) if len(piece) == 1}
            self._space_mark_ids = [single[bytes([byte])] for byte in SPACE_MARK.encode()]
        if self.decode(self.encode(PROBE)) != PROBE:
            raise lossy(self.path, "it needs byte fallback, identity normalisation and no dummy prefix")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the file's SHA-256."""
        return file_sha256(self.path)[:16]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [V], read-only: UTF-8 bytes of the text that each token stands for; 0 for special tokens."""
        lengths = np.array([len(piece) for piece in self._bytes], np.int32)
        lengths.setflags(write=False)
        return lengths

    def is_text(self, tokens: np.ndarray) -> np.ndarray:
        """bool, of the shape of `tokens`: which of them are text: not PAD, and not the begin or end of a document."""
        return (tokens != self.pad_id) & (tokens != self.bos_id) & (tokens != self.eos_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS; text that looks like a special token is text.

        Args:
          text: any string without lone surrogates.

        Raises:
          UserError: a lone surrogate, which is no character (Python makes them of bytes that are not UTF-8).
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Like `encode`, as int32 [tokens]; a long text needs four bytes a token besides its own."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError("the text holds a lone surrogate, or bytes that are not UTF-8") from None
        ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        for position, plain in enumerate(text.split(SPACE_MARK) if self._marks_spaces else [text]):
            if position:
                ids.append(np.array(self._space_mark_ids, np.int32))
            parts = [plain] if len(plain) < self._whole else _parts(plain)
            for start in range(0, len(parts), _PARTS_AT_ONCE):
                encoded = self._encode(parts[start : start + _PARTS_AT_ONCE])
                ids += [np.array(part, np.int32) for part in encoded]
        return np.concatenate(ids)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of the tokens, joined; special tokens give nothing."""
        return b"".join([self._bytes[token] for token in np.asarray(ids, np.int64).reshape(-1).tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the tokens; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _parts(text: str) -> list[str]:
    """Cuts a text into parts of about _PART_CHARACTERS, behind a run of newlines: no piece reaches over one."""
    parts = []
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        line_end = _LINE_END.search(text, start + _PART_CHARACTERS - 1, start + _MAX_PART_CHARACTERS)
        if line_end:
            stop = line_end.end()
        else:
            limit = start + _MAX_PART_CHARACTERS
            if limit >= len(text):
                break
            stop = max(text.rfind(" ", start + 1, limit), start + _PART_CHARACTERS)
        parts.append(text[start:stop])
        start = stop
    parts.append(text[start:])
    return parts


def _sample_sentences(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """A uniform sample of at most `count` lines (reservoir sampling), each short enough for the trainer."""
    chooser = random.Random(seed)
    sample: list[str] = []
    seen = 0
    for text in texts:
        for line in _SENTENCE_BREAKS.split(text):
            for start in range(0, len(line), _MAX_SENTENCE_CHARACTERS):
                sentence = line[start : start + _MAX_SENTENCE_CHARACTERS]
                if len(sample) < count:
                    sample.append(sentence)
                elif (place := chooser.randrange(seen + 1)) < count:
                    sample[place] = sentence
                seen += 1
    return sample


def _training_error(message: str, vocab_size: int) -> UserError:
    if found := re.search(r"value <= (\d+)", message):
        return UserError(
            f"a vocabulary of {vocab_size} is too large for this text: at most {found[1]} is possible; "
            "lower vocab_size or give more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"a vocabulary of {vocab_size} is too small for this text: at least {found[1]} is needed; "
            "raise vocab_size or lower character_coverage"
        )
    return UserError(f"SentencePiece could not train a vocabulary of {vocab_size}: {' '.join(message.split())}")
