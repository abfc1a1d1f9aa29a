"""A BERT of random weights and texts of random words, to measure speed where no checkpoint and no corpus is at hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from retro_jax.errors import UserError
from retro_jax.retrieval.bert import read_json

SHAPES: dict[str, dict[str, int]] = {
    "bert-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    }
}
_WORD_PIECES = 64  # of a made-up text, with [CLS] and [SEP]


def synthetic_texts(checkpoint: Path, count: int) -> list[str]:
    """Texts of whole words of the vocabulary, 64 word pieces each with [CLS] and [SEP]."""
    vocabulary = (checkpoint / "vocab.txt").read_text(encoding="utf-8").split()
    words = [word for word in vocabulary if word.isascii() and word.isalpha() and word.islower()]
    if not words:
        raise UserError(f"{checkpoint / 'vocab.txt'}: has no lower-case word to make texts of; give --corpus")
    rng = np.random.default_rng(0)
    return [" ".join(words[i] for i in row) for row in rng.integers(0, len(words), (count, _WORD_PIECES - 2))]


def random_checkpoint(shape: str, vocabulary_of: Path, directory: Path) -> Path:
    """Writes a BERT of random weights in a shape of `SHAPES`, with the word pieces of another checkpoint."""
    directory.mkdir(parents=True)
    for name in ("vocab.txt", "tokenizer_config.json"):
        if (vocabulary_of / name).is_file():
            shutil.copy(vocabulary_of / name, directory)
    config = {**read_json(vocabulary_of / "config.json"), **SHAPES[shape]}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(_random_weights(config), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _random_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays under the names of Hugging Face's BertModel: normal with deviation 0.02, as BERT begins its training."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    rng = np.random.default_rng(0)

    def dense(name: str, rows: int, columns: int) -> dict[str, np.ndarray]:
        weight = 0.02 * rng.standard_normal((columns, rows), np.float32)
        return {f"{name}.weight": weight, f"{name}.bias": np.zeros(columns, np.float32)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": np.zeros(width, np.float32)}

    weights = norm("embeddings.LayerNorm")
    for name, rows in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        table = 0.02 * rng.standard_normal((config[rows], width), np.float32)
        weights[f"embeddings.{name}_embeddings.weight"] = table
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            weights |= dense(f"{at}.{name}", width, width)
        weights |= dense(f"{at}.intermediate.dense", width, hidden) | dense(f"{at}.output.dense", hidden, width)
        weights |= norm(f"{at}.attention.output.LayerNorm") | norm(f"{at}.output.LayerNorm")
    return weights
