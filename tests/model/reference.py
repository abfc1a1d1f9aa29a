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
        x = [self.row("embedding.table", token) for token in tokens]
        if config.positions == "learned":  # places are counted without PAD
            places = [sum(seen != config.pad_id for seen in tokens[: t + 1]) - 1 for t in range(length)]
            x = [row + self.p["positions.table"][max(place, 0)] for row, place in zip(x, places, strict=True)]
        encoded = None
        for layer in range(1, config.num_layers + 1):
            name = f"decoder.layers.{layer}"
            y = [self.norm(f"{name}.attention.norm", row) for row in x]
            seen = [range(max(0, t + 1 - config.window) if config.window else 0, t + 1) for t in range(length)]
            x = [
                x[t]
                + self.attend(f"{name}.attention", y[t], t, [(y[j], j) for j in seen[t] if tokens[j] != config.pad_id])
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
        return np.stack([head @ self.norm("decoder.norm", row) for row in x])

    def row(self, table, token):
        """Of an embedding table; PAD may have none, and nothing sees what stands in its place."""
        beyond = token == self.config.pad_id == len(self.p[table])
        return self.p[table][0 if beyond else token]

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
        table = "encoder_embedding.table" if "encoder_embedding.table" in self.p else "embedding.table"
        x = [self.row(table, token) for token in neighbour]
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
        shared = num_heads // self.p[f"{name}.key"].shape[1]
        decoder = name.startswith("decoder") and name.endswith("attention")
        for n in range(num_heads):
            q = self.head(name, "query", query, n)
            logits = []
            for vector, key_place in keys:
                k = self.head(name, "key", vector, n // shared)
                if f"{name}.relative" in self.p:
                    r = self.sinusoid(place - key_place, len(query)) @ self.p[f"{name}.relative"][:, n]
                    u, v = self.p[f"{name}.content_bias"][n], self.p[f"{name}.position_bias"][n]
                    logit = (q + u) @ k + (q + v) @ r
                elif self.config.positions == "rope" and (decoder or self.config.cross_positions or name[-2:] != "ca"):
                    scaling = self.config.rope_scaling if decoder else None
                    logit = self.rotated(q, place, scaling) @ self.rotated(k, key_place, scaling)
                else:
                    logit = q @ k
                logits.append(logit / np.sqrt(size))
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            values = [self.head(name, "value", vector, n // shared) for vector, _ in keys]
            out += sum(w * value for w, value in zip(weights, values, strict=True)) @ self.p[f"{name}.output"][n]
        return out + self.p.get(f"{name}.output_bias", 0)

    def head(self, name, kind, vector, n):
        """Head n of a query, key or value."""
        projected = vector @ self.p[f"{name}.{kind}"][:, n]
        if f"{name}.{kind}_bias" in self.p:
            projected = projected + self.p[f"{name}.{kind}_bias"][n]
        if f"{name}.{kind}_lora.up" in self.p:
            projected = projected + vector @ self.p[f"{name}.{kind}_lora.down"] @ self.p[f"{name}.{kind}_lora.up"][:, n]
        return self.rms(f"{name}.{kind}_norm", projected) if f"{name}.{kind}_norm.scale" in self.p else projected

    def sinusoid(self, distance, width):
        frequencies = [10_000 ** (-2 * a / width) for a in range(width // 2)]
        return np.array([np.sin(distance * w) for w in frequencies] + [np.cos(distance * w) for w in frequencies])

    def rotated(self, vector, place, scaling=None):
        half, size = len(vector) // 2, len(vector)
        turned = np.zeros(half, complex)
        for a in range(half):
            frequency, length = self.config.rope_theta ** (-2 * a / size), 1.0
            if scaling is not None:
                frequency, length = self.scaled(scaling, frequency, a, size)
            turned[a] = length * (vector[a] + 1j * vector[half + a]) * np.exp(1j * place * frequency)
        return np.concatenate([turned.real, turned.imag])

    def scaled(self, scaling, frequency, pair, size):
        if scaling.kind == "linear":
            return frequency / scaling.factor, 1.0
        if scaling.kind == "llama3":
            wavelength = 2 * np.pi / frequency
            longest = scaling.original_length / scaling.low_frequency_factor
            shortest = scaling.original_length / scaling.high_frequency_factor
            if wavelength < shortest:
                return frequency, 1.0
            if wavelength > longest:
                return frequency / scaling.factor, 1.0
            smooth = scaling.original_length / wavelength - scaling.low_frequency_factor
            smooth /= scaling.high_frequency_factor - scaling.low_frequency_factor
            return (1 - smooth) * frequency / scaling.factor + smooth * frequency, 1.0
        log = lambda rotations: np.log(scaling.original_length / (rotations * 2 * np.pi))  # noqa: E731
        first, last = (
            size * log(rotations) / (2 * np.log(self.config.rope_theta))
            for rotations in (scaling.beta_fast, scaling.beta_slow)
        )
        first, last = max(np.floor(first), 0), min(np.ceil(last), size - 1)
        ramp = min(max((pair - first) / (last - first), 0), 1)
        length = 0.1 * np.log(scaling.factor) + 1
        return frequency / scaling.factor * ramp + frequency * (1 - ramp), length

    def ffw(self, name, row):
        y = self.norm(f"{name}.norm", row)
        hidden = y @ self.p[f"{name}.up"] + self.p.get(f"{name}.up_bias", 0)
        if f"{name}.gate" in self.p:
            gate = y @ self.p[f"{name}.gate"] + self.p.get(f"{name}.gate_bias", 0)
            hidden = gate / (1 + np.exp(-gate)) * hidden
        else:
            hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        return row + hidden @ self.p[f"{name}.down"] + self.p.get(f"{name}.down_bias", 0)

    def norm(self, name, row):
        if f"{name}.bias" not in self.p:
            return self.rms(name, row)
        row = row - np.mean(row)
        return (
            row / np.sqrt(np.mean(row**2) + self.config.norm_epsilon) * self.p[f"{name}.scale"] + self.p[f"{name}.bias"]
        )

    def rms(self, name, row):
        return row / np.sqrt(np.mean(row**2) + self.config.norm_epsilon) * self.p[f"{name}.scale"]
