"""The table of shardings, and the check that a mesh splits what it should."""

import dataclasses

import jax
import pytest

from retro_jax.config import MeshConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.parallel.layout import check_coverage, sharding_table
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.state import named_axes, named_params, plan_model

TINY = RetroConfig.preset("tiny")


def lay(model, **sizes):
    mesh = create_mesh(MeshConfig(**sizes))
    return plan_model(model, mesh), mesh


def test_bytes_on_each_device_add_up_to_the_whole():
    plan, _ = lay(TINY, fsdp=4, tensor=2)
    lines = sharding_table(named_params(plan), named_axes(plan)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "split", "on", "each", "device", "altogether"]
    table = next(line for line in lines if line.startswith("embedding.table"))
    assert "8192x256" in table and "vocab/tensor, embed/fsdp" in table
    assert table.split()[-2:] == [f"{8192 * 256 * 4 // 8:,}", f"{8192 * 256 * 4:,}"]
    here, altogether = (int(number.replace(",", "")) for number in lines[-1].split()[-2:])
    assert altogether == sum(leaf.size * 4 for leaf in jax.tree.leaves(plan.params))
    assert altogether / 8 <= here < altogether / 7


def test_a_mesh_that_splits_everything_passes():
    for sizes in ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 8, "fsdp": 1}):
        plan, mesh = lay(TINY, **sizes)
        check_coverage(named_params(plan), mesh)


def test_a_width_that_does_not_divide_is_an_error_that_lists_what_stays_whole():
    odd = dataclasses.replace(TINY, encoder_width=250)
    plan, mesh = lay(odd, fsdp=8)
    with pytest.raises(UserError, match=r"leaves \d+% of the parameter bytes whole .*encoder_embedding.table"):
        check_coverage(named_params(plan), mesh)
