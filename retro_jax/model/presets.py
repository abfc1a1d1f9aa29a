"""Named model sizes: those of the paper (Tables 2 and 10), and small ones that train on a CPU."""

import dataclasses
from typing import Any

from retro_jax.config import RetroConfig, did_you_mean
from retro_jax.errors import UserError


def every_third(num_layers: int, first: int = 6) -> tuple[int, ...]:
    """P of the paper: every third layer from the sixth, 1-based.

    The paper's Table 10 prints a start of 9 for the two large sizes, but only 6 gives the counts of its Table 2.
    """
    return tuple(range(first, num_layers + 1, 3))


def _paper(width: int, num_layers: int, num_heads: int, head_size: int) -> RetroConfig:
    return RetroConfig(
        vocab_size=128_000,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        head_size=head_size,
        ffw_width=4 * width,
        cca_layers=every_third(num_layers),
        dtype="bfloat16",
    )


_SIZES = {
    "172m": _paper(896, 12, 16, 64),
    "425m": _paper(1536, 12, 12, 128),
    "1.5b": _paper(2048, 24, 16, 128),
    "7.5b": _paper(4096, 32, 32, 128),
    "tiny": RetroConfig(
        vocab_size=8192,
        width=256,
        num_layers=6,
        num_heads=4,
        head_size=64,
        ffw_width=1024,
        cca_layers=(3, 6),
        encoder_width=256,
        encoder_num_heads=4,
        encoder_head_size=64,
        encoder_ffw_width=1024,
        scan_layers=False,
    ),
    "demo": RetroConfig(
        vocab_size=2048,
        width=64,
        num_layers=3,
        num_heads=4,
        head_size=32,
        ffw_width=256,
        cca_layers=(2, 3),
        encoder_width=64,
        encoder_layers=1,
        encoder_num_heads=4,
        encoder_head_size=32,
        encoder_ffw_width=256,
        share_embeddings=True,
        init_scale=0.125,
        scan_layers=False,
    ),
}
PRESETS = {
    **_SIZES,
    **{f"{name}-baseline": dataclasses.replace(config, cca_layers=()) for name, config in _SIZES.items()},
}


def preset(name: str, **changes: Any) -> RetroConfig:
    """The configuration `name`, with fields replaced by `changes`.

    Names: "172m", "425m", "1.5b", "7.5b" (paper), "tiny", "demo", and each with "-baseline": the same decoder without
    encoder and CCA.

    Raises:
      UserError: unknown name (the nearest is named) or field.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown{did_you_mean(name, PRESETS)}")
    fields = {field.name for field in dataclasses.fields(RetroConfig)}
    for field in changes:
        if field not in fields:
            raise UserError(f"model.{field}: unknown key{did_you_mean(field, fields)}")
    return dataclasses.replace(PRESETS[name], **changes)
