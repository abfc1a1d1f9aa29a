"""The README.md that goes with an exported model."""

from retro_jax.interop.pretrained import Pretrained
from retro_jax.model.parameters import count_parameters

_CARD = """---
library_name: retro_jax
tags: [{tags}]
---

# {name}

{what}

| | |
| --- | --- |
{table}

Open it:

```python
import jax.numpy as jnp
import retro_jax

pretrained = retro_jax.load_pretrained("PATH")
tokens = pretrained.tokenizer.encode("The retrieval database holds")
logits = pretrained.model(jnp.asarray([tokens]))  # RETRO[OFF]; ON: model(tokens, neighbours)
```

`tokens` are `[B, T]`, neighbours `[B, T // M, K, R]` token ids: for each complete chunk of M tokens K neighbours, each
with its continuation. Id {pad} is padding, seen by nothing.

`model.safetensors` has one tensor a parameter and layer, float32, layers counted from 1:
{names}.
Matrices are `[input, output]`; heads are axes of their own: `query`, `key`, `value` `[width, heads, head size]`,
`output` `[heads, head size, width]`.

Trained on what data, evaluated how, meant for what, not meant for what: to be filled in by who publishes it.
"""

_RETRO = """A retrieval-enhanced transformer (RETRO, arXiv 2112.04426): it reads the neighbours of each chunk out of a
retrieval database through chunked cross-attention."""


def model_card(source: Pretrained, name: str) -> str:
    """The text of the card, in Markdown with the header that model hubs read."""
    config = source.config
    retro = not config.is_baseline
    size = f"width {config.width}, {config.num_heads} heads of {config.head_size}"
    rows = {
        "parameters": f"{count_parameters(config):,}",
        "decoder": f"{config.num_layers} layers of {size}",
        "vocabulary": f"{config.vocab_size:,}",
        "positions": config.positions,
        "context in training": f"{source.context or 'not known'} tokens",
    }
    names = "`embedding.table`, `decoder.layers.{N}.attention.*`, `decoder.layers.{N}.ffw.*`, `decoder.norm.scale`"
    if retro:
        rows |= {
            "chunk": f"{config.chunk_length} tokens; a neighbour with its continuation {config.neighbour_length}",
            "cross-attention in layers": ", ".join(map(str, config.cca_layers)),
            "encoder": f"{config.encoder_layers} layers of width {config.encoder_width}",
            "neighbours in training": str(source.neighbours),
        }
        names += ", `decoder.layers.{N}.cca.*`, `encoder_embedding.table`, `encoder.layers.{N}.attention|ca|ffw.*`"
    return _CARD.format(
        name=name,
        tags="retro, retrieval" if retro else "language-model",
        what=_RETRO if retro else "A transformer language model.",
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        pad=config.pad_id,
        names=names,
    )
