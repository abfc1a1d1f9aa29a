"""Computes RETRO's logits from an export with NumPy alone, equation by equation: to check the export, not to be fast.

    python docs/read_export.py EXPORT --tokens=5,17,9,12
    python docs/read_export.py EXPORT --tokens="$(seq -s, 64)" --neighbours="[[[$(seq -s, 128)]]]"

The first is RETRO[OFF], the second RETRO[ON] with one neighbour of 128 ids for the one complete chunk of 64 tokens.
EXPORT is what `launch/export.py --format=safetensors` writes. The file is taken apart here as its format says; nothing
but NumPy is imported. Equation and section numbers are those of arXiv 2112.04426. Of the decoders that `docs/export.md`
describes this reads the paper's: RMSNorm, Transformer-XL positions, GELU, heads of their own for keys and values. Any
other is refused, and so is a tensor that no equation here reads.
"""

import argparse
import json
import re
import struct
from pathlib import Path

import numpy as np

ATTENTION = r"(norm\.scale|query|key|value|output|relative|content_bias|position_bias)"
READ = re.compile(
    r"(encoder_)?embedding\.table|head|(decoder|encoder)\.norm\.scale|"
    rf"decoder\.layers\.\d+\.(attention|cca)\.{ATTENTION}|"
    rf"encoder\.layers\.\d+\.(attention|ca)\.{ATTENTION}|encoder\.layers\.\d+\.ca\.source_norm\.scale|"
    r"(decoder|encoder)\.layers\.\d+\.ffw\.(norm\.scale|up|down)"
)


def read_safetensors(path):
    """Name to array: 8 bytes of header length, the header in JSON, and the numbers, little-endian."""
    content = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] != "F32":
            raise SystemExit(f"{name} is {entry['dtype']}; an export has F32")
        arrays[name] = np.frombuffer(content[start:end], "<f4").reshape(entry["shape"]).astype(np.float64)
    return arrays


class Reader:
    """The model: parameters `p` by name, settings `c` out of config.json."""

    def __init__(self, directory):
        directory = Path(directory)
        self.c = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model"]
        self.p = read_safetensors(directory / "model.safetensors")
        expected = {"positions": "transformer_xl", "norm": "rms", "ffw": "gelu", "num_kv_heads": 0, "window": 0}
        expected |= {"attention_biases": "none", "ffw_biases": False, "qk_norm": False, "lora_rank": 0}
        expected |= {"neighbour_part": "both"}
        for name, value in expected.items():
            if self.c[name] != value:
                raise SystemExit(f"this example reads {name} {value!r}, the export has {self.c[name]!r}")
        for name in self.p:
            if not READ.fullmatch(name):
                raise SystemExit(f"this example reads no tensor {name}, the export has one")

    def logits(self, tokens, neighbours=None):
        """Algorithm 1.

        Args:
          tokens: [T] ids; the padding id is seen by nothing.
          neighbours: [T // M, K, R] ids, for each complete chunk; None is RETRO[OFF]. Any other number of chunks ends
            the program.

        Returns:
          [T, V], of the token that follows each.
        """
        c, p = self.c, self.p
        tokens, m = np.asarray(tokens), c["chunk_length"]
        if neighbours is not None and len(neighbours) != len(tokens) // m:
            raise SystemExit(
                f"{len(tokens)} tokens are {len(tokens) // m} complete chunks of {m}, and neighbours are given for "
                f"{len(neighbours)}; give those of each complete chunk"
            )
        real = tokens != c["pad_id"]
        x, encoded = p["embedding.table"][tokens], None
        for layer in range(1, c["num_layers"] + 1):
            name = f"decoder.layers.{layer}"
            causal = np.tril(np.ones((len(x), len(x)), bool)) & real
            y = self.norm(f"{name}.attention.norm", x)
            x = x + self.attention(f"{name}.attention", y, y, distances(len(x), len(x)), causal)
            if neighbours is not None and layer in c["cca_layers"]:
                if encoded is None:  # once, at layer min(P), after its self-attention
                    encoded = [
                        [self.encode(near, x[u * m : (u + 1) * m], real[u * m : (u + 1) * m]) for near in chunk]
                        for u, chunk in enumerate(neighbours)
                    ]
                x = x + self.chunked_cross_attention(f"{name}.cca", x, neighbours, encoded)
            x = x + self.feed_forward(f"{name}.ffw", x)
        return self.norm("decoder.norm", x) @ p.get("head", p["embedding.table"]).T

    def encode(self, neighbour, chunk, chunk_real):
        """ENCODER: a neighbour [R] read with the activations [M, D] of the chunk that retrieved it in view."""
        c, neighbour = self.c, np.asarray(neighbour)
        real = neighbour != c["pad_id"]
        x = self.p.get("encoder_embedding.table", self.p["embedding.table"])[neighbour]
        for layer in range(1, c["encoder_layers"] + 1):
            name = f"encoder.layers.{layer}"
            y = self.norm(f"{name}.attention.norm", x)
            x = x + self.attention(f"{name}.attention", y, y, distances(len(x), len(x)), real)
            if layer in c["encoder_ca_layers"]:  # equation 7: token s of the neighbour, j of the chunk are s - j apart
                y, source = self.norm(f"{name}.ca.norm", x), self.norm(f"{name}.ca.source_norm", chunk)
                x = x + self.attention(f"{name}.ca", y, source, distances(len(x), len(chunk)), chunk_real)
            x = x + self.feed_forward(f"{name}.ffw", x)
        return self.norm("encoder.norm", x)

    def chunked_cross_attention(self, name, x, neighbours, encoded):
        """CCA, equation 3: position t attends to the neighbours of chunk (t + 1) // M - 1, the last complete one."""
        m, added = self.c["chunk_length"], np.zeros_like(x)
        for t in range(m - 1, len(x)):
            chunk, index = (t + 1) // m - 1, (t + 1) % m
            keys = np.concatenate(encoded[chunk])  # of all K neighbours, under one softmax
            real = np.concatenate([np.asarray(near) != self.c["pad_id"] for near in neighbours[chunk]])
            # Equation 6: index i of the attending chunk and token s of a neighbour are i - s + M - 1 apart.
            apart = np.concatenate([index - np.arange(len(near)) + m - 1 for near in encoded[chunk]])[None]
            added[t] = self.attention(name, self.norm(f"{name}.norm", x[t : t + 1]), keys, apart, real)[0]
        return added

    def attention(self, name, x, source, apart, seen):
        """Multi-head attention with relative positions (section 2.5, appendix B.1.2).

        Args:
          x: [I, D] queries, normalised.
          source: [J, C] what they attend to.
          apart: [I, J] distances.
          seen: bool, broadcastable to [I, J]; a query that sees nothing gets 0.
        """
        p, c = self.p, self.c
        scale = 1 / np.sqrt(c["encoder_head_size"] if name.startswith("encoder") else c["head_size"])
        query, key, value = (
            np.einsum("id,dnh->nih", array, p[f"{name}.{kind}"])
            for array, kind in ((x, "query"), (source, "key"), (source, "value"))
        )
        if f"{name}.relative" in p:
            relative = np.einsum("ijd,dnh->nijh", sinusoids(apart, x.shape[1]), p[f"{name}.relative"])
            content, position = (p[f"{name}.{kind}"][:, None] for kind in ("content_bias", "position_bias"))
            logits = np.einsum("nih,njh->nij", query + content, key)
            logits += np.einsum("nih,nijh->nij", query + position, relative)
        else:
            logits = np.einsum("nih,njh->nij", query, key)
        seen = np.broadcast_to(seen, logits.shape)
        logits = np.where(seen, logits * scale, -np.inf)
        weights = np.exp(logits - np.where(seen.any(-1, keepdims=True), logits.max(-1, keepdims=True), 0))
        total = weights.sum(-1, keepdims=True)
        weights = weights / np.where(total > 0, total, 1)
        return np.einsum("nij,njh,nhd->id", weights, value, p[f"{name}.output"], optimize=True)

    def feed_forward(self, name, x):
        """FFW with GPT-2's form of GELU."""
        hidden = self.norm(f"{name}.norm", x) @ self.p[f"{name}.up"]
        gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        return gelu @ self.p[f"{name}.down"]

    def norm(self, name, x):
        """RMSNorm."""
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.c["norm_epsilon"]) * self.p[f"{name}.scale"]


def distances(queries, keys):
    """[I, J], query i minus key j."""
    return np.arange(queries)[:, None] - np.arange(keys)


def sinusoids(apart, width):
    """[I, J, D]: sines and cosines of the distances, frequencies 10000^(-2a/D)."""
    angles = apart[..., None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--tokens", required=True, help="ids, separated by commas")
    parser.add_argument("--neighbours", help="JSON, [chunks][neighbours][ids]")
    arguments = parser.parse_args()
    neighbours = json.loads(arguments.neighbours) if arguments.neighbours else None
    logits = Reader(arguments.directory).logits([int(token) for token in arguments.tokens.split(",")], neighbours)
    probabilities = np.exp(logits[-1] - logits[-1].max())
    probabilities /= probabilities.sum()
    for token in np.argsort(-probabilities)[:5]:
        print(f"next token {token}: probability {probabilities[token]:.6f}")


if __name__ == "__main__":
    main()
