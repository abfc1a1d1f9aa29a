import io
import itertools

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_data import SAMPLE

from retro_jax.data import tokenizer as tokenizer_module
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import MODEL_TYPES, Tokenizer, train_tokenizer
from retro_jax.errors import UserError

DIFFICULT = [
    "",
    " ",
    "   leading and trailing   ",
    "\n",
    "\n\n\n\n",
    "\t\tif x:\r\n\t\t\treturn\r",
    "a\u2581b \u2581\u2581 \u2581",
    "<s></s><unk><pad><0x0A>[SEP] \u2047 ",
    "\x00\x01\x1b\x7f\x85\u2028\u2029",
    "\ufeffBOM, \ufffd, \u2585, \u00a0no-break\u3000wide",
    "e\u0301 \u00e9 \ufb01 \u212b \uff21",
    "日本語のテキスト、中文文本，한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f600 \U0010ffff",
    "مرحبا \u202e abc \u202c",
    "x" * 5000,
    "word " * 3000,
    "\u2581" * 3,
]
NASTY = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\t", "\r", "\u2581", "<s>", "<0xE2>", "\x00", "the", "\U0001f600", "é"]
)
STRINGS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.one_of(NASTY, st.text(max_size=3))).map("".join)
).filter(lambda text: not any("\ud800" <= character <= "\udfff" for character in text))


@pytest.fixture(scope="module", params=MODEL_TYPES)
def either(request, tmp_path_factory) -> Tokenizer:
    texts = [document.text for document in read_documents([SAMPLE])]
    path = tmp_path_factory.mktemp("models") / f"{request.param}.model"
    return train_tokenizer(texts, path, vocab_size=900, model_type=request.param)


@pytest.mark.parametrize("text", DIFFICULT, ids=range(len(DIFFICULT)))
def test_every_difficult_text_comes_back(either, text):
    ids = either.encode(text)
    assert either.decode(ids) == text
    assert either.token_bytes[ids].sum() == len(text.encode())
    assert not set(ids) & {either.pad_id, either.bos_id, either.eos_id, either.unk_id}


@settings(deadline=None, max_examples=300)
@given(text=STRINGS)
def test_every_string_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[np.array(ids, np.int64)].sum() == len(text.encode())
    assert all(3 < token < tokenizer.vocab_size for token in ids)


def test_the_sample_comes_back_and_takes_fewer_tokens_than_bytes(either):
    tokens = size = 0
    for document in read_documents([SAMPLE]):
        ids = either.encode(document.text)
        assert either.decode(ids) == document.text
        tokens += len(ids)
        size += len(document.text.encode())
    assert tokens < size / 1.8


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("ab \n\u00e9"), max_size=200), size=st.integers(1, 20))
def test_parts_join_to_the_text_and_split_no_run_of_newlines(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PART_CHARACTERS", size)
        patch.setattr(tokenizer_module, "_MAX_PART_CHARACTERS", 3 * size)
        parts = tokenizer_module._parts(text)
    assert "".join(parts) == text
    assert all(len(part) <= 3 * size + 1 for part in parts)
    for before, after in itertools.pairwise(parts):
        assert not (before.endswith("\n") and after.startswith("\n") and len(before) < 2 * size)


def test_a_long_text_has_the_tokens_of_its_lines(tokenizer):
    lines = [document.text.replace("\n", " ") + "\n" for document in read_documents([SAMPLE])]
    separate = [token for line in lines for token in tokenizer.encode(line)]
    assert tokenizer.encode("".join(lines)) == separate


def test_newlines_and_tab_are_tokens_and_runs_of_spaces_are_learnt(tmp_path):
    code = [
        "def f(x):\n    if x:\n        return x\n    return f(x - 1)\n" * 30 + f"name{i} = {i}\n" for i in range(50)
    ]
    tokenizer = train_tokenizer(code, tmp_path / "code.model", vocab_size=310)
    for text in ("\n", "\n\n", "\t", "    "):
        assert len(tokenizer.encode(text)) == 1, text


def test_specials_decode_to_nothing_and_broken_characters_to_a_replacement(tokenizer):
    ids = tokenizer.encode("ok \U0001f600")
    assert tokenizer.decode([1, *ids, 2, 0, 0, 3]) == "ok \U0001f600"
    assert tokenizer.decode(ids[:-1]).startswith("ok \ufffd")
    assert tokenizer.decode(np.array([ids, ids], np.uint16)) == "ok \U0001f600" * 2
    assert tokenizer.token_bytes[:4].tolist() == [0, 0, 0, 0]
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a\udcff")


def test_the_same_text_gives_the_same_model(tmp_path):
    texts = [document.text for document in read_documents([SAMPLE])][:8]
    one = train_tokenizer(texts, tmp_path / "one.model", vocab_size=600, max_sentences=200)
    two = train_tokenizer(iter(texts), tmp_path / "two.model", vocab_size=600, max_sentences=200)
    other = train_tokenizer(texts, tmp_path / "other.model", vocab_size=600, max_sentences=200, seed=1)
    assert one.fingerprint == two.fingerprint != other.fingerprint


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_impossible_vocabulary_names_the_possible_one(tmp_path, model_type):
    texts = ["the quick brown fox jumps over the lazy dog"]
    with pytest.raises(UserError, match=r"too large for this text: at most \d+ is possible") as error:
        train_tokenizer(texts, tmp_path / "x.model", vocab_size=5000, model_type=model_type)
    possible = int(str(error.value).split("at most ")[1].split()[0])
    assert (
        train_tokenizer(texts, tmp_path / "x.model", vocab_size=possible, model_type=model_type).vocab_size == possible
    )
    with pytest.raises(UserError, match=r"too small for this text: at least \d+ is needed"):
        train_tokenizer(texts, tmp_path / "y.model", vocab_size=200, model_type=model_type)
    assert not (tmp_path / "y.model").exists()


def test_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer(["", "\n\n"], tmp_path / "x.model", vocab_size=300)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer file"):
        Tokenizer(tmp_path / "missing.model")
    for content in (b"", b"no model at all", bytes(range(256))):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer(tmp_path / "bad.model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos_id": -1}, "no begin or no end of a document"),
        ({"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}, "does not give every text back"),
        (
            {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_fallback": True},
            "does not give every text back",
        ),
    ],
    ids=["no BOS", "no byte pieces", "normalising"],
)
def test_a_tokenizer_that_loses_text_is_refused(tmp_path, options, message):
    model = io.BytesIO()
    texts = [line for document in read_documents([SAMPLE]) for line in document.text.splitlines()]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=900, minloglevel=2, **options
    )
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=message):
        Tokenizer(tmp_path / "lossy.model")
