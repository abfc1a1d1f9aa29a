"""Word pieces are those of the Hugging Face `tokenizers` library, and every known difference stands here.

Known differences, with their reasons:

1. Special tokens written in a text ("[SEP]"). The library turns them into the real special ids by default; a corpus is
   text, so here they are split like any other characters, as the library does with `encode_special_tokens = True`.
2. Characters newer than Unicode 8, and four whose category changed since Unicode 3.2 (`RECATEGORISED`). The two
   libraries carry different versions of the Unicode tables, so a new combining mark is dropped by one and kept by the
   other. No older character differs.
"""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tiny_bert
from tokenizers import BertWordPieceTokenizer
from tokenizers import Tokenizer as HubTokenizer

from retro_jax.errors import UserError
from retro_jax.retrieval.wordpiece import WordPiece

DIFFICULT = Path(__file__).parent / "data" / "difficult_text.json"
RECATEGORISED = {
    "\u166d",  # CANADIAN SYLLABICS CHI SIGN: punctuation, then a symbol
    "\u1734",  # HANUNOO SIGN PAMUDPOD: non-spacing mark, then a spacing one
    "\u1885",  # MONGOLIAN LETTER ALI GALI BALUDA: letter, then a non-spacing mark
    "\u1886",  # MONGOLIAN LETTER ALI GALI THREE BALUDA: the same
}


@pytest.fixture(scope="module")
def wordpiece(embedder_directory) -> WordPiece:
    return WordPiece(embedder_directory)


@pytest.fixture(scope="module")
def library(embedder_directory) -> HubTokenizer:
    tokenizer = HubTokenizer.from_file(str(embedder_directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def differing(wordpiece: WordPiece, library: HubTokenizer, texts: list[str]) -> list[str]:
    expected = library.encode_batch_fast(texts, add_special_tokens=False)
    pairs = zip(texts, wordpiece(texts), expected, strict=True)
    return [text for text, ours, theirs in pairs if ours.tolist() != theirs.ids]


def test_difficult_text_gives_the_same_word_pieces(wordpiece, library):
    cases = json.loads(DIFFICULT.read_text())
    assert len(cases) > 90
    assert differing(wordpiece, library, cases) == []


def test_plain_english_gives_the_same_word_pieces(wordpiece, library, sample_texts):
    lines = [line for text in sample_texts for line in text.split("\n") if line.strip()]
    assert len(lines) > 3000
    assert len(differing(wordpiece, library, lines)) <= 0.001 * len(lines)
    assert differing(wordpiece, library, sample_texts[:10]) == []  # whole documents, with their newlines


def test_every_character_of_the_basic_plane_agrees_but_new_ones(wordpiece, library):
    characters = [chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000]
    differ = {text[2] for text in differing(wordpiece, library, [f"A {c} B" for c in characters])}
    differ |= {text[1] for text in differing(wordpiece, library, [f"a{c}b" for c in characters])}
    assert len(differ) < 150
    old = {c for c in differ if unicodedata.ucd_3_2_0.category(c) != "Cn"}
    assert old <= RECATEGORISED


def test_special_tokens_in_text_are_text(wordpiece, library):
    (ids,) = wordpiece(["[CLS] a [SEP] [MASK] [PAD] [UNK]"])
    assert not set(ids.tolist()) & {wordpiece.cls_id, wordpiece.sep_id, wordpiece.pad_id, wordpiece.unk_id}
    library.encode_special_tokens = False
    try:
        assert wordpiece.sep_id in library.encode("[SEP]", add_special_tokens=False).ids  # difference 1
    finally:
        library.encode_special_tokens = True


@pytest.mark.parametrize(("lowercase", "strip"), [(False, None), (False, True), (True, False), (True, None)])
def test_cased_and_accented_checkpoints_follow_their_settings(embedder_directory, tmp_path, lowercase, strip):
    (tmp_path / "vocab.txt").write_bytes((embedder_directory / "vocab.txt").read_bytes())
    settings = {"do_lower_case": lowercase, "strip_accents": strip, "tokenize_chinese_chars": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    library = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=lowercase, strip_accents=strip)
    library._tokenizer.encode_special_tokens = True
    texts = json.loads(DIFFICULT.read_text())
    differ = [
        text
        for text, ours in zip(texts, WordPiece(tmp_path)(texts), strict=True)
        if ours.tolist() != library.encode(text, add_special_tokens=False).ids
    ]
    assert differ == []


def test_the_locale_of_the_process_changes_nothing(embedder_directory, wordpiece):
    text = "TITANIC ISTANBUL Ìİ J\u0303 Į"
    script = (
        "import sys; from retro_jax.retrieval.wordpiece import WordPiece;"
        f"print(WordPiece(sys.argv[1])([{text!r}])[0].tolist())"
    )
    environment = os.environ | {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "PYTHONUTF8": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script, str(embedder_directory)], env=environment, capture_output=True, text=True
    )
    assert json.loads(result.stdout) == wordpiece([text])[0].tolist(), result.stderr


def test_odd_calls(wordpiece):
    assert wordpiece([]) == []
    assert [len(ids) for ids in wordpiece(["", "\u200b\n", "a"])] == [0, 0, 1]
    (ids,) = wordpiece(["lone \ud800 surrogate"])
    assert ids.tolist() == wordpiece(["lone ? surrogate"])[0].tolist()


def test_bad_vocabularies_are_named(tmp_path):
    with pytest.raises(UserError, match=r"vocab\.txt: no such file"):
        WordPiece(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(UserError, match=r"\[SEP\] is not in the vocabulary"):
        WordPiece(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        WordPiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": "yes"}')
    with pytest.raises(UserError, match="do_lower_case must be true or false"):
        WordPiece(tmp_path)


def test_without_tensorflow_text_the_message_says_what_to_install(tmp_path, monkeypatch):
    tiny_bert.write_tiny_bert(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    with pytest.raises(UserError, match=r"needs TensorFlow Text: pip install 'retro_jax\[data\]'"):
        WordPiece(tmp_path)
