"""A BERT checkpoint of random weights, small enough to make in a test, in the files of the Hugging Face format."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
VOCABULARY = [*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *"0123456789.,;:!?'-()", "the", "of", "and", "##ing"]
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 96,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the names of Hugging Face's BertModel; dense weights are [out, in] as torch keeps them."""
    rng = np.random.default_rng(seed)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{at}.{name}.weight": (width, width), f"{at}.{name}.bias": (width,)}
        shapes |= {f"{at}.intermediate.dense.weight": (hidden, width), f"{at}.intermediate.dense.bias": (hidden,)}
        shapes |= {f"{at}.output.dense.weight": (width, hidden), f"{at}.output.dense.bias": (width,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
    shapes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    values = {name: 0.3 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in values:
        if name.endswith("LayerNorm.weight"):
            values[name] += 1
    return values | {"embeddings.position_ids": np.arange(config["max_position_embeddings"])[None]}


def write_tiny_bert(directory: Path, *, seed: int = 0, prefix: str = "", dtype=np.float32, **changes) -> Path:
    """Writes a checkpoint directory; `changes` go into config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    values = {
        prefix + name: value.astype(dtype) if value.dtype == np.float32 else value
        for name, value in tensors(config, seed).items()
    }
    save_file(values, directory / "model.safetensors")
    return directory
