"""BERT once more, in NumPy float64 straight from the paper's equations and the checkpoint's own names: the oracle."""

import math

import numpy as np

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def hidden_states(tensors: dict[str, np.ndarray], config: dict, ids: list[int]) -> np.ndarray:
    """Last hidden states [T, E] of one unpadded sequence of word pieces."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = q[:, part] @ k[:, part].T / math.sqrt(size)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            mixed[:, part] = (weights / weights.sum(-1, keepdims=True)) @ v[:, part]
        x = norm(x + dense(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        inner = ACTIVATIONS[config["hidden_act"]](dense(x, f"{at}.intermediate.dense"))
        x = norm(x + dense(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


def pooled(tensors: dict[str, np.ndarray], config: dict, ids: list[int]) -> np.ndarray:
    """Mean of the hidden states without the first and the last position, [E]."""
    return hidden_states(tensors, config, ids)[1:-1].mean(0)
