"""Which changes are tried when a step does not fit; what compiling says is tested with tools/plan_topology.py."""

import pytest

from retro_jax.config import DataConfig, RetroConfig, TrainConfig
from retro_jax.training.forecast import Forecast, Memory, remedies

GIB = 2**30


def forecast_of(mesh, *, parameters, peak, limit=32 * GIB):
    sizes = dict(zip(("data", "fsdp", "tensor", "context"), mesh, strict=True))
    memory = Memory(limit, peak)
    return Forecast("v4:2x4x4", 32, sizes, {}, parameters, 0.0, (1.0, 1.0), 1.0, 1.0, memory, None, {})


def tried(forecast, preset="425m", remat="query,key,value,mixed", **changes):
    config = TrainConfig(RetroConfig.preset(preset, remat=remat), DataConfig(length=2048), batch_size=256, **changes)
    return [flags.split() for flags, _ in remedies(config, forecast)]


def test_a_state_that_is_too_large_is_split_further():
    changes = tried(forecast_of((8, 4, 1, 1), parameters=10 * GIB, peak=50 * GIB))
    assert changes[0] == ["--config.mesh.data=2", "--config.mesh.fsdp=16"]  # 30 GiB of state, 18 too many


def test_activations_that_are_too_large_are_computed_in_parts():
    changes = tried(forecast_of((1, 16, 1, 1), parameters=GIB, peak=100 * GIB))
    assert changes[0] == ["--config.microbatches=4"]
    assert changes[1:] == [
        ["--config.model.remat=block"],
        ["--config.model.remat=block", "--config.microbatches=2"],
        ["--config.model.remat=block", "--config.microbatches=4"],
    ]


def test_a_need_that_the_compiler_does_not_name_gets_the_most():
    changes = tried(forecast_of((8, 4, 1, 1), parameters=GIB, peak=None))
    assert changes[:2] == [["--config.mesh.data=1", "--config.mesh.fsdp=32"], ["--config.microbatches=8"]]


@pytest.mark.parametrize("preset", ["172m", "7.5b"])
def test_meshes_that_do_not_divide_the_widths_are_not_proposed(preset):
    changes = tried(forecast_of((2, 128, 1, 1), parameters=10 * GIB, peak=50 * GIB), preset)
    assert not any("mesh" in flag for flags in changes for flag in flags)  # 896 is no multiple of 256
