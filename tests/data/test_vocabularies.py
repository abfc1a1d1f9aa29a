"""Tokenizers of other models: every text comes back, the bytes of each token are known, what loses text is refused."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from sample_data import SAMPLE
from test_tokenizer import DIFFICULT
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError

LINES = [line for document in read_documents([SAMPLE]) for line in document.text.splitlines(keepends=True)][:400]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(pre_tokenizer, normalizer=None, specials=("<|endoftext|>",), **options):
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "byte_fallback" not in options else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def gpt_2():
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def qwen():
    steps = [pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer = trained(pre_tokenizers.Sequence(steps), normalizers.NFC(), ["<|endoftext|>", "<|im_end|>"])
    tokenizer.add_tokens([tokenizers.AddedToken("<tool_call>", lstrip=True, rstrip=True)])
    return tokenizer


def llama_3():
    """Words that are tokens are cut no further, also those that no merge makes."""
    step = pre_tokenizers.Split(tokenizers.Regex(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), "isolated")
    steps = [step, pre_tokenizers.ByteLevel(False, use_regex=False)]
    specials = ["<|begin_of_text|>", "<|end_of_text|>"]
    values = json.loads(trained(pre_tokenizers.Sequence(steps), None, specials).to_str())
    values["model"] |= {"ignore_merges": True, "merges": values["model"]["merges"][:200]}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
    values["model"]["ignore_merges"] = False
    without = tokenizers.Tokenizer.from_str(json.dumps(values))
    assert any(len(tokenizer.encode(line)) < len(without.encode(line)) for line in LINES)
    return tokenizer


def llama(normalizer=True):
    """Byte fallback and marked spaces, with a space before the text: by its normaliser, or by its pre-tokenizer."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    steps = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    space = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = trained(space, None, specials, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    if normalizer:
        tokenizer.normalizer, tokenizer.pre_tokenizer = steps, None
    values = json.loads(tokenizer.to_str())
    for token in values["added_tokens"][3:]:
        token["special"] = False
    values["added_tokens"] = values["added_tokens"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def sentencepiece_llama(**options):
    model = io.BytesIO()
    settings = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        minloglevel=2,
        **settings | options,
    )
    return model.getvalue()


KINDS = {
    "gpt-2": gpt_2,
    "qwen": qwen,
    "llama 3": llama_3,
    "llama, older": llama,
    "mistral": lambda: llama(normalizer=False),
}


@pytest.fixture(scope="module", params=[*KINDS, "sentencepiece"])
def kind(request, tmp_path_factory):
    """(name, the library's own, ours)."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    if request.param == "sentencepiece":
        path.write_bytes(sentencepiece_llama())
        native = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        return request.param, lambda text: native.encode(text), Tokenizer(path)
    native = KINDS[request.param]()
    path.write_text(native.to_str())
    return request.param, lambda text: native.encode(text, add_special_tokens=False).ids, Tokenizer(path)


def test_every_text_comes_back_and_its_bytes_are_counted(kind):
    _, _, ours = kind
    for text in [*DIFFICULT, "<|endoftext|> <tool_call> \n</s><unk>", *LINES[:50]]:
        ids = ours.encode(text)
        assert ours.decode_bytes(ids) == text.encode(), text[:40]
        assert ours.token_bytes[ids].sum() == len(text.encode())
        assert not set(ids) & {ours.pad_id, ours.bos_id, ours.eos_id}


def test_tokens_are_those_of_the_library(kind):
    """But for the space that some put before a text, which is not of the text."""
    name, native, ours = kind
    for line in LINES[:100]:
        if name in ("gpt-2", "qwen", "llama 3"):
            assert ours.encode(line) == native(line)
        elif not line.startswith(" "):
            assert ours.encode(" " + line) == native(line)


def test_padding_is_behind_all_tokens_and_the_documents_ends_are_known(kind):
    name, _, ours = kind
    assert ours.pad_id == ours.vocab_size - 1 and ours.token_bytes[ours.pad_id] == 0
    assert ours.token_bytes[[ours.bos_id, ours.eos_id]].sum() == 0
    expected = {"gpt-2": (0, 0), "qwen": (0, 0), "llama 3": (0, 1)}.get(name, (1, 2))
    assert (ours.bos_id, ours.eos_id) == expected
    assert np.array(ours.encode(LINES[0])).max() < ours.vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normaliser Lowercase"),
        ({"normalizer": {"type": "NFKC"}}, "normaliser NFKC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "StripAccents"}]}}, "normaliser StripAccents"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer Whitespace"),
        ({"pre_tokenizer": None}, "neither byte-level nor with byte fallback"),
        ({"added_tokens": []}, "ends? a document"),
    ],
)
def test_what_loses_text_is_refused_by_name(tmp_path, change, message):
    values = json.loads(gpt_2().to_str()) | change
    if not values["added_tokens"]:
        values["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        Tokenizer(tmp_path / "tokenizer.json")


def test_the_end_of_a_document_is_no_text_where_it_is_not_listed_as_special(tmp_path):
    values = json.loads(gpt_2().to_str()) | {"added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert ours.token_bytes[ours.eos_id] == 0 and not ours.is_text(np.array([ours.pad_id, ours.bos_id])).any()
    ids = ours.encode("text<|endoftext|>")
    assert ours.eos_id not in ids and ours.decode(ids) == "text<|endoftext|>" and ours.is_text(np.array(ids)).all()


def test_a_token_of_other_characters_than_those_of_bytes_stands_for_itself(tmp_path):
    values = json.loads(gpt_2().to_str())
    values["model"]["vocab"]["\u65e5 \u672c"] = token = len(values["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    native = tokenizers.Tokenizer.from_str(json.dumps(values))
    native.decoder = decoders.ByteLevel()
    assert ours.decode([token]) == native.decode([token]) == "\u65e5 \u672c"
    assert token not in ours.encode("\u65e5 \u672c") and ours.decode(ours.encode("\u65e5 \u672c")) == "\u65e5 \u672c"


def test_a_model_that_normalises_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_llama(normalization_rule_name="nmt_nfkc"))
    with pytest.raises(UserError, match="normaliser changes characters"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_json_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="not a tokenizer of the tokenizers library"):
        Tokenizer(tmp_path / "tokenizer.json")
