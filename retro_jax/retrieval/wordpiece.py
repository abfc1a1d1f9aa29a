r"""BERT's WordPiece as one TensorFlow graph: text in, word piece ids out.

TensorFlow Text's own BERT tokenizers case-fold with NFKC and keep control characters, which BERT does not (`ß` would
become `ss`, `½` three pieces, a zero-width space would turn its word into [UNK]). So the normaliser here is our own and
follows BERT step by step, and TensorFlow Text does what it is good at, NFD and the linear-time WordPiece:

1. drop U+FFFD and control, format and private-use characters other than tab, newline and return;
2. put spaces around CJK ideographs;
3. uncased checkpoints: NFD, drop non-spacing marks, lower-case each character by itself;
4. split at white space; every punctuation character is a word;
5. greedy longest-match WordPiece; a word of more than 100 characters is [UNK].

Text is only text: a literal "[SEP]" is split like any other characters and never becomes the separator's id.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.bert import read_json

_MAX_CHARACTERS_OF_WORD = 100
# The ranges of Hugging Face's BertNormalizer, which has 2B920 where the original BERT has 2B820.
_CJK = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}\x{2B740}-\x{2B81F}"
    r"\x{2B920}-\x{2CEAF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}]"
)
_DROPPED = r"[^\P{C}\t\n\r]|\x{FFFD}"
_SPACE = r"[\x{00A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}]+"
_LOWERED_BY_HAND = (("Σ", "σ"), ("I", "i"))
_LOWERED_ACCENTED = (("İ", "i\u0307"), ("Ì", "ì"), ("Í", "í"), ("Ĩ", "ĩ"), ("Į", "į"), ("J", "j"))
_PUNCTUATION = r"[!-/:-@\[-`{-~]|\pP"


@dataclasses.dataclass(frozen=True)
class WordPieceSettings:
    """How a checkpoint normalises text, from its tokenizer_config.json."""

    lowercase: bool
    strip_accents: bool
    split_cjk: bool

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "WordPieceSettings":
        """Reads tokenizer_config.json; without one, the checkpoint is taken to be uncased, as BERT's default is."""
        path = Path(directory) / "tokenizer_config.json"
        values = read_json(path) if path.is_file() else {}
        lowercase = values.get("do_lower_case", True)
        strip_accents = values.get("strip_accents")
        split_cjk = values.get("tokenize_chinese_chars", True)
        # null means: as lower-casing does.
        strip_accents = lowercase if strip_accents is None else strip_accents
        for name, value in (("do_lower_case", lowercase), ("strip_accents", strip_accents)):
            if not isinstance(value, bool):
                raise UserError(f"{path}: {name} must be true or false, is {value!r}")
        return cls(lowercase, strip_accents, bool(split_cjk))


class WordPiece:
    """`WordPiece(directory)(texts)` gives the word piece ids of each text, without special tokens.

    Attributes:
      cls_id, sep_id, pad_id, unk_id: ids of the special tokens.
      vocab_size: lines of vocab.txt.
      settings: the normaliser's.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        """Reads vocab.txt and tokenizer_config.json and builds the graph.

        Raises:
          UserError: a file missing or damaged, a special token not in the vocabulary, TensorFlow Text not installed.
        """
        path = Path(directory) / "vocab.txt"
        self.settings = WordPieceSettings.load(directory)
        vocabulary = _read_vocabulary(path)
        index = {token: i for i, token in enumerate(vocabulary)}
        for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]"):
            if token not in index:
                raise UserError(f"{path}: {token} is not in the vocabulary, so this is not a BERT vocabulary")
        self.vocab_size = len(vocabulary)
        self.cls_id, self.sep_id, self.pad_id, self.unk_id = (
            index[token] for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
        )
        self._graph = _build_graph(vocabulary, self.settings)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Word piece ids of each text, int32, possibly of length 0. Lone surrogates are read as "?"."""
        if not texts:
            return []
        ids, row_splits = self._graph(np.array([text.encode("utf-8", "replace") for text in texts], dtype=object))
        return np.split(ids.numpy(), row_splits.numpy()[1:-1])


def _read_vocabulary(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the embedder needs BERT's vocab.txt") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _build_graph(vocabulary: list[str], settings: WordPieceSettings) -> Any:
    """The function string [n] -> (ids int32 [pieces], row splits int64 [n + 1])."""
    try:
        import tensorflow as tf
        import tensorflow_text as tft
    except ImportError as error:
        raise UserError(
            f"the embedder needs TensorFlow Text: pip install 'retro_jax[data]' ({' '.join(str(error).split())[:120]})"
        ) from None
    if tf.config.get_visible_devices("GPU"):
        # TensorFlow only splits strings here; left alone it would take the accelerator's memory from JAX.
        tf.config.set_visible_devices([], "GPU")
    wordpiece = tft.FastWordpieceTokenizer(
        vocab=vocabulary,
        token_out_type=tf.int32,
        # The library counts bytes and BERT characters: the limit in characters is applied in the graph.
        max_bytes_per_word=4 * _MAX_CHARACTERS_OF_WORD,
        no_pretokenization=True,
    )

    def replace(text: tf.Tensor, pattern: str, by: str) -> tf.Tensor:
        return tf.strings.regex_replace(text, pattern, by)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def tokenize(text: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        text = replace(text, _DROPPED, "")
        text = replace(text, _SPACE, " ")
        if settings.split_cjk:
            text = replace(text, _CJK, r" \0 ")
        if settings.strip_accents:
            text = replace(tft.normalize_utf8(text, "NFD"), r"\p{Mn}", "")
        if settings.lowercase:
            # BERT lower-cases character by character. TensorFlow looks at a sigma's neighbours and at the locale of the
            # process (Turkish I, Lithuanian accented i): those characters go first.
            for upper, lower in _LOWERED_BY_HAND if settings.strip_accents else _LOWERED_BY_HAND + _LOWERED_ACCENTED:
                text = replace(text, upper, lower)
            text = tf.strings.lower(text, encoding="utf-8")
        text = replace(text, _PUNCTUATION, r" \0 ")
        words = tf.strings.split(text)  # at ASCII white space; empty words are dropped
        flat = words.flat_values
        flat = tf.where(tf.strings.length(flat, unit="UTF8_CHAR") > _MAX_CHARACTERS_OF_WORD, "[UNK]", flat)
        pieces = wordpiece.tokenize(words.with_flat_values(flat)).merge_dims(1, 2)
        return pieces.values, pieces.row_splits

    return tokenize
