"""RETRO as loops over positions, heads and keys, written from the equations in NumPy; shares no code with the package.

Parameters are read by their per-layer names. Slow on purpose: nothing is batched, shifted, padded or masked.
"""

import numpy as np


def forward(parameters, config, tokens, neighbours=None):
    """Logits [B, T, V] of tokens [B, T] and neighbours [B, L, K, R] or None."""
    model = Reference({name: np.asarray(value, np.float64) for name, value in parameters.items()}, config)
    return np.stack(
        [model.sequence(row, None if neighbours is None else neighbours[b]) for b, row in enumerate(tokens)]
    )


class Reference:
    def __init__(self, parameters, config):
        self.p = parameters
        self.config = config

    def sequence(self, tokens, neighbours):
        """One sequence: tokens [T], neighbours [L][K][R] or None."""
        config, m = self.config, self.config.chunk_length
        if neighbours is not None and config.neighbour_part == "neighbour":
            neighbours = [[neighbour[:m] for neighbour in chunk] for chunk in neighbours]
        if neighbours is not None and config.neighbour_part == "continuation":
            neighbours = [[neighbour[m:] for neighbour in chunk] for chunk in neighbours]
        length = len(tokens)
        x = [self.p["embedding.table"][token] for token in tokens]
        encoded = None
        for layer in range(1, config.num_layers + 1):
            name = f"decoder.layers.{layer}"
            y = [self.rms(f"{name}.attention.norm", row) for row in x]
            x = [
                x[t]
                + self.attend(
                    f"{name}.attention", y[t], t, [(y[j], j) for j in range(t + 1) if tokens[j] != config.pad_id]
                )
                for t in range(length)
            ]
            if neighbours is not None and config.cca_layers and layer == min(config.cca_layers):
                encoded = [
                    [
                        self.encode(neighbour, tokens[u * m : (u + 1) * m], x[u * m : (u + 1) * m])
                        for neighbour in neighbours[u]
                    ]
                    for u in range(length // m)
                ]
            if encoded is not None and layer in config.cca_layers:
                x = [self.cca(f"{name}.cca", x[t], t, neighbours, encoded) for t in range(length)]
            x = [self.ffw(f"{name}.ffw", row) for row in x]
        head = self.p.get("head", self.p["embedding.table"])
        return np.stack([head @ self.rms("decoder.norm", row) for row in x])

    def cca(self, name, row, t, neighbours, encoded):
        """x_t + CA(x_t, E_c) with c = (t + 1) // m - 1; nothing is added in the first m - 1 positions."""
        m = self.config.chunk_length
        chunk, index = (t + 1) // m - 1, (t + 1) % m
        if chunk < 0:
            return row
        # Query i at i + m - 1 and neighbour token s at s: their distance is i - s + m - 1 (equation 6).
        keys = [
            (encoded[chunk][j][s], s)
            for j in range(len(encoded[chunk]))
            for s in range(len(encoded[chunk][j]))
            if neighbours[chunk][j][s] != self.config.pad_id
        ]
        return row + self.attend(name, self.rms(f"{name}.norm", row), index + m - 1, keys)

    def encode(self, neighbour, chunk_tokens, chunk):
        """E of one neighbour [R], conditioned on its chunk's activations [m]."""
        pad = self.config.pad_id
        shared = self.p["embedding.table"]
        x = [self.p.get("encoder_embedding.table", shared)[token] for token in neighbour]
        for layer in range(1, self.config.encoder_layers + 1):
            name = f"encoder.layers.{layer}"
            y = [self.rms(f"{name}.attention.norm", row) for row in x]
            keys = [(y[j], j) for j in range(len(x)) if neighbour[j] != pad]
            x = [row + self.attend(f"{name}.attention", y[s], s, keys) for s, row in enumerate(x)]
            if layer in self.config.encoder_ca_layers:
                keys = [
                    (self.rms(f"{name}.ca.source_norm", chunk[i]), i)
                    for i in range(len(chunk))
                    if chunk_tokens[i] != pad
                ]
                x = [
                    row + self.attend(f"{name}.ca", self.rms(f"{name}.ca.norm", row), s, keys)
                    for s, row in enumerate(x)
                ]
            x = [self.ffw(f"{name}.ffw", row) for row in x]
        return [self.rms("encoder.norm", row) for row in x]

    def attend(self, name, query, place, keys):
        """Multi-head attention of one query at `place` on (vector, place) pairs, projected back; 0 without keys."""
        out = np.zeros(len(query))
        if not keys:
            return out
        num_heads, size = self.p[f"{name}.query"].shape[1:]
        for n in range(num_heads):
            q = query @ self.p[f"{name}.query"][:, n]
            logits = []
            for vector, key_place in keys:
                k = vector @ self.p[f"{name}.key"][:, n]
                if not self.config.cross_positions and name.endswith("ca"):
                    logit = q @ k
                elif self.config.positions == "rope":
                    logit = self.rotated(q, place) @ self.rotated(k, key_place)
                else:
                    r = self.sinusoid(place - key_place, len(query)) @ self.p[f"{name}.relative"][:, n]
                    u, v = self.p[f"{name}.content_bias"][n], self.p[f"{name}.position_bias"][n]
                    logit = (q + u) @ k + (q + v) @ r
                logits.append(logit / np.sqrt(size))
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            values = [vector @ self.p[f"{name}.value"][:, n] for vector, _ in keys]
            out += sum(w * value for w, value in zip(weights, values, strict=True)) @ self.p[f"{name}.output"][n]
        return out

    def sinusoid(self, distance, width):
        frequencies = [10_000 ** (-2 * a / width) for a in range(width // 2)]
        return np.array([np.sin(distance * w) for w in frequencies] + [np.cos(distance * w) for w in frequencies])

    def rotated(self, vector, place):
        half = len(vector) // 2
        turns = np.exp(1j * place * self.config.rope_theta ** (-2 * np.arange(half) / len(vector)))
        turned = (vector[:half] + 1j * vector[half:]) * turns
        return np.concatenate([turned.real, turned.imag])

    def ffw(self, name, row):
        hidden = self.rms(f"{name}.norm", row) @ self.p[f"{name}.up"]
        gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        return row + gelu @ self.p[f"{name}.down"]

    def rms(self, name, row):
        return row / np.sqrt(np.mean(row**2) + self.config.norm_epsilon) * self.p[f"{name}.scale"]
