"""How the parameters of a model lie on a mesh: a table to read, and a check that the mesh splits what it should."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from retro_jax.errors import UserError

# Share of parameter bytes that may lie whole on every device of a mesh that splits parameters.
TOLERANCE = 0.02


def sharding_table(params: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, tuple[str | None, ...]]) -> str:
    """One line a parameter: name, shape, how its dimensions are split, bytes on each device and altogether.

    Args:
      params: name to array or abstract array with a NamedSharding.
      axes: name to logical names.
    """
    rows = [("parameter", "shape", "split", "on each device", "altogether")]
    here = everywhere = 0
    for name, leaf in params.items():
        parts = zip(axes[name], leaf.sharding.spec, strict=False)  # a spec may be shorter than the shape
        split = ", ".join(f"{axis}/{part}" for axis, part in parts if part and leaf.sharding.mesh.shape[part] > 1)
        own, whole = _bytes_on_each_device(leaf), leaf.size * leaf.dtype.itemsize
        here, everywhere = here + own, everywhere + whole
        rows.append((name, "x".join(map(str, leaf.shape)), split or "whole", f"{own:,}", f"{whole:,}"))
    rows.append(("all", "", "", f"{here:,}", f"{everywhere:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        text = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(text + numbers))
    return "\n".join(lines)


def check_coverage(params: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> None:
    """Refuses a mesh that was meant to split the parameters and leaves many of them whole.

    Args:
      params: name to array or abstract array with a NamedSharding.
      mesh: the devices. One without fsdp and tensor splits no parameter, on purpose, and passes.

    Raises:
      UserError: more than `TOLERANCE` of the bytes lie whole on every device; the largest are listed.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    sizes = {name: leaf.size * leaf.dtype.itemsize for name, leaf in params.items()}
    whole = {name: sizes[name] for name, leaf in params.items() if _bytes_on_each_device(leaf) == sizes[name]}
    share = sum(whole.values()) / sum(sizes.values())
    if share > TOLERANCE:
        largest = sorted(whole, key=whole.__getitem__, reverse=True)
        listed = ", ".join(f"{name} {tuple(params[name].shape)}" for name in largest[:8])
        more = f" and {len(largest) - 8} more" if len(largest) > 8 else ""
        raise UserError(
            f"mesh {dict(mesh.shape)} leaves {share:.0%} of the parameter bytes whole on every device: {listed}{more}; "
            f"choose mesh.fsdp and mesh.tensor that divide the model's widths and heads, or use mesh.data"
        )


def _bytes_on_each_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
