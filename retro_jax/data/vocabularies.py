"""Files of tokenizers, read so that nothing of a text is lost: SentencePiece models and JSON of the tokenizers library.

What a tokenizer does to a text beyond cutting it is left out where that is exact for the text as it stands: the space
that Llama's puts before a text, and the composition of characters (NFC) of Qwen's, which changes no text that is
composed already. One that does more loses text, and is refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from retro_jax.errors import UserError

SPACE_MARK = "\u2581"
PROBE = " a  b\n\n\tc\u2581\U0001f600\x00 <s> A\ufb01 e\u0301\u212b\u3000"
# A field of a message that occurs twice is merged: this says once more, and last, normalizer_spec.add_dummy_prefix = 0.
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3 | 0, 0])
# The names that tokenizers give to the begin and the end of a document; the first that is there.
_BOS = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "<bos>")
_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")


class Vocabulary(NamedTuple):
    """A tokenizer's tokens and how a text is cut into them.

    Attributes:
      bytes: of the text that each token stands for; nothing for special tokens.
      encode: some texts to the ids of each.
      pad_id, bos_id, eos_id, unk_id: of the special tokens; unk_id -1 where there is none. A tokenizer without PAD has
        it behind all others, as one more token.
      marks_spaces: a space is U+2581 in a token, so that character must be spelt in bytes where a text has it.
      whole: how many characters must be encoded at once at least, where there are so many, to get the same tokens.
    """

    bytes: list[bytes]
    encode: Callable[[list[str]], list[list[int]]]
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    marks_spaces: bool
    whole: int


def read_vocabulary(path: Path) -> Vocabulary:
    """Of a file of either kind.

    Raises:
      UserError: it is neither, it knows no begin and end of a document, or it loses text.
    """
    content = path.read_bytes()
    return (_read_json if content.lstrip()[:1] == b"{" else _read_model)(path, content)


def lossy(path: Path, reason: str) -> UserError:
    """The refusal of a tokenizer that does not give every text back."""
    return UserError(
        f"{path}: this tokenizer does not give every text back ({reason}); make one with tools/train_tokenizer.py"
    )


def _read_model(path: Path, content: bytes) -> Vocabulary:
    try:
        if not content:
            raise RuntimeError
        processor = sentencepiece.SentencePieceProcessor(model_proto=content + _NO_DUMMY_PREFIX)
    except (RuntimeError, OSError):
        raise UserError(f"{path}: not a SentencePiece model; make one with tools/train_tokenizer.py") from None

    def bytes_of(token: int) -> bytes:
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            return b""
        piece = processor.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(token) else piece.replace(SPACE_MARK, " ").encode()

    count = processor.get_piece_size()
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise UserError(f"{path}: this SentencePiece model has no begin or no end of a document (BOS, EOS)")
    if sum(processor.is_byte(token) for token in range(count)) < 256:
        raise lossy(path, "no byte fallback")
    if processor.normalize("\ufb01  e\u0301") != f"\ufb01{SPACE_MARK}{SPACE_MARK}e\u0301":
        raise lossy(path, "its normaliser changes characters or takes spaces away")
    pieces = [bytes_of(token) for token in range(count)]
    pad = processor.pad_id()
    return Vocabulary(
        pieces if pad >= 0 else [*pieces, b""],
        lambda texts: processor.encode(texts, num_threads=1),
        pad if pad >= 0 else count,
        processor.bos_id(),
        processor.eos_id(),
        processor.unk_id(),
        marks_spaces=True,
        whole=0,
    )


def _read_json(path: Path, content: bytes) -> Vocabulary:
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{path}: reading it needs the tokenizers library: pip install 'retro_jax[interop]'") from None
    try:
        values = json.loads(content)
        byte_level = _without_changes(path, values)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path}: not a tokenizer of the tokenizers library ({' '.join(str(error).split())[:200]})"
        ) from None
    tokenizer.encode_special_tokens = True  # what looks like a special token is text
    names = {token: name for name, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    count = max(names) + 1
    added = {token["id"]: token for token in values.get("added_tokens", [])}
    unknown = values["model"].get("unk_token")
    unk = tokenizer.token_to_id(unknown) if isinstance(unknown, str) else values["model"].get("unk_id")

    def first(known: tuple[str, ...]) -> int | None:
        found = [tokenizer.token_to_id(name) for name in known]
        return next((token for token in found if token is not None), None)

    bos, eos = first(_BOS), first(_EOS)
    if bos is None and eos is None:
        raise UserError(f"{path}: this tokenizer has none of {', '.join(_EOS)}, which end a document")

    def bytes_of(token: int) -> bytes:
        if token not in names or token in (bos, eos) or (token == unk and not byte_level):
            return b""
        if token in added:
            return b"" if added[token]["special"] else added[token]["content"].encode()
        return _byte_level_bytes(names[token]) if byte_level else _fallback_bytes(names[token])

    pieces = [bytes_of(token) for token in range(count)]
    if len({piece for piece in pieces if len(piece) == 1}) < 256:
        raise lossy(path, "not every byte has a token")
    sizes = np.array([len(piece) for piece in pieces])

    def encode(texts: list[str]) -> list[list[int]]:
        found = [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for text, ids in zip(texts, found, strict=True):
            if sizes[ids].sum() != len(text.encode()):
                raise lossy(path, f"of {text[:40]!r} for one")
        return found

    return Vocabulary(
        [*pieces, b""],
        encode,
        count,
        eos if bos is None else bos,
        bos if eos is None else eos,
        -1 if unk is None or byte_level else unk,
        marks_spaces=not byte_level,
        whole=1 << 20,
    )


def _without_changes(path: Path, values: dict[str, Any]) -> bool:
    """Takes out of a tokenizer's JSON what changes a text exactly undoably, and says whether its tokens are of bytes.

    Raises:
      UserError: what is left changes a text, by name.
    """
    values.update(truncation=None, padding=None, post_processor=None)
    for token in values.get("added_tokens", []):
        token.update(lstrip=False, rstrip=False, normalized=False)
    replaces_spaces = False
    for step in _steps(values.get("normalizer"), "normalizers"):
        if step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE_MARK:
            replaces_spaces = True
        elif step["type"] not in ("NFC", "Prepend") or step.get("prepend", SPACE_MARK) != SPACE_MARK:
            raise lossy(path, f"its normaliser {step['type']} changes the text")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    values["normalizer"] = replace if replaces_spaces else None
    byte_level = False
    for step in _steps(values.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "ByteLevel":
            byte_level = True
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step.update(prepend_scheme="never")
            step.pop("add_prefix_space", None)
        elif step.get("behavior") == "Removed" or step["type"] not in ("Split", "Digits", "Punctuation"):
            raise lossy(path, f"its pre-tokenizer {step['type']} takes characters away")
    if not byte_level and not values["model"].get("byte_fallback"):
        raise lossy(path, "neither byte-level nor with byte fallback")
    return byte_level


def _steps(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one there is."""
    if step is None:
        return []
    return step[parts] if step["type"] == "Sequence" else [step]


def _fallback_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def _byte_level_bytes(piece: str) -> bytes:
    """A token with another character stands for itself, as in the tokenizers library; no text is cut into one."""
    known = all(character in _BYTES for character in piece)
    return bytes(_BYTES[character] for character in piece) if known else piece.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: itself where it is a visible one of Latin-1, else the next from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
