"""The README.md that goes with an exported model."""

import re
from collections.abc import Iterable

from retro_jax.interop.pretrained import RETRIEVAL, Opened, Pretrained, retrieval_shapes
from retro_jax.model.parameters import count_parameters, layer_shapes

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
{tokens}
logits = pretrained.model(jnp.asarray([tokens]))  # {call}
```

`tokens` are `[B, T]`, logits `[B, T, V]`. Id {pad} is padding, seen by nothing.
{neighbours}
{files}

Trained on what data, evaluated how, meant for what, not meant for what: to be filled in by who publishes it.
"""

_RETRO = """A retrieval-enhanced transformer (RETRO, arXiv 2112.04426): it reads the neighbours of each chunk out of a
retrieval database through chunked cross-attention."""
_NEIGHBOURS = """
Neighbours are token ids `[B, T // M, K, R]`: for each complete chunk of M tokens K neighbours with their continuations.
"""
_ENCODED = """tokenizer = pretrained.tokenizer
tokens = [tokenizer.bos_id, *tokenizer.encode("The retrieval database holds")]"""
_GIVEN = "tokens = [1, 2, 3]  # there is no tokenizer here: ids of the one that the training data was made with"
_OWN_NAMES = """has one tensor a parameter and layer, layers counted from 1:
{names}.
Matrices are `[input, output]`; heads are axes of their own: `query`, `key`, `value` `[width, heads, head size]`,
`output` `[heads, head size, width]`."""


def model_card(source: Opened | Pretrained, name: str, *, huggingface: bool = False) -> str:
    """The text of the card, in Markdown with the header that model hubs read.

    Args:
      source: the model.
      name: its heading.
      huggingface: the decoder lies there as transformers names it, and what a RETRO has beside it in a folder.
    """
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
    if retro:
        rows |= {
            "chunk": f"{config.chunk_length} tokens; a neighbour with its continuation {config.neighbour_length}",
            "cross-attention in layers": ", ".join(map(str, config.cca_layers)),
            "encoder": f"{config.encoder_layers} layers of width {config.encoder_width}",
            "neighbours in training": str(source.neighbours),
        }
    files = f"`model.safetensors` {_OWN_NAMES}".format(names=_spelt(layer_shapes(config)))
    if huggingface:
        files = "`config.json` and `model*.safetensors` are the decoder as the transformers library reads it"
        if retro:
            beside = f"`{RETRIEVAL}/model.safetensors` {_OWN_NAMES}".format(names=_spelt(retrieval_shapes(config)))
            files += f": RETRO[OFF], the model\nwithout retrieval. Beside it {beside}"
        else:
            files += "."
    return _CARD.format(
        name=name,
        tags="retro, retrieval" if retro else "language-model",
        what=_RETRO if retro else "A transformer language model.",
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        tokens=_ENCODED if source.tokenizer else _GIVEN,
        call="RETRO[OFF]; ON: model(tokens, neighbours)" if retro else "of the next token",
        pad=config.pad_id,
        neighbours=_NEIGHBOURS if retro else "",
        files=files,
    )


def _spelt(names: Iterable[str]) -> str:
    """The names of tensors, those of all layers and of one part of a layer as one."""
    kinds = dict.fromkeys(re.sub(r"layers\.\d+\.(\w+)\..*", r"layers.{N}.\1.*", name) for name in names)
    return ", ".join(f"`{kind}`" for kind in kinds)
