"""A run killed at any change that its saves make to the file system finds the state and the data of one step."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from killed_saves import state_of

from retro_jax.config import CheckpointConfig
from retro_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]


def check(directory):
    """Steps whose checkpoints are whole, after opening it as the next start does."""
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_of(0)
    )
    with Checkpoints(directory, CheckpointConfig(keep_last=1)) as checkpoints:
        latest = checkpoints.latest_step
        if latest is not None:
            restored = checkpoints.restore(abstract, latest)
            assert restored.data == {"examples_seen": 8 * latest}
            for found, saved in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_of(latest)), strict=True):
                assert np.array_equal(found, saved)
        following = (latest or 0) + 1
        checkpoints.save(following, state_of(following), {"examples_seen": 8 * following})
    assert {path.name for path in directory.iterdir()} == {str(following)}
    return latest


@pytest.mark.parametrize("moments", [16, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint_or_the_one_before(tmp_path, moments):
    script = ROOT / "tests" / "training" / "killed_saves.py"
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(moments)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    count, *chosen = map(int, result.stdout.split())
    assert count > 50 and len(chosen) == min(moments, count)
    latest = [check(tmp_path / str(moment)) for moment in chosen]
    assert latest == sorted(latest, key=lambda step: step or 0)  # a later kill never finds an earlier step
    assert latest[0] is None and latest[-1] == 3 and {1, 2} <= set(latest)
