"""The reader in docs/ gets the model's logits out of an export with NumPy alone."""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from small_models import LLAMA, RETRO, pretrained

from retro_jax.interop.export import export_native

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "read_export.py"
BLOCKED = "import sys, runpy\nfor name in ('jax', 'flax', 'retro_jax', 'safetensors'): sys.modules[name] = None\n"
CONFIGS = {
    "paper": dataclasses.replace(RETRO, tie_embeddings=False),
    "shared, no positions across": dataclasses.replace(
        RETRO, share_embeddings=True, encoder_width=16, cross_positions=False
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_example_computes_the_models_logits(tmp_path, name):
    config = CONFIGS[name]
    source = pretrained(config)
    export_native(source, tmp_path / "model", name="Test")
    reader = runpy.run_path(str(EXAMPLE))["Reader"](tmp_path / "model")
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, config.vocab_size, (1, 14), np.int32)
    near = generator.integers(1, config.vocab_size, (1, 3, 2, config.neighbour_length), np.int32)
    tokens[0, 5] = near[0, 0, 1, 3:] = near[0, 1] = config.pad_id
    model = jax.jit(lambda params, *inputs: nnx.merge(nnx.graphdef(source.model), params)(*inputs))
    for inputs in ((tokens,), (tokens, near)):
        expected = np.asarray(model(source.params, *inputs))[0]
        found = reader.logits(*(array[0] for array in inputs))
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_it_runs_where_neither_jax_nor_this_package_is(tmp_path):
    export_native(pretrained(RETRO), tmp_path / "model", name="Test")
    near = json.dumps(np.arange(1, 17).reshape(1, 2, 8).tolist())
    arguments = [str(EXAMPLE), str(tmp_path / "model"), "--tokens=5,17,9,12", f"--neighbours={near}"]
    code = BLOCKED + f"sys.argv = {arguments!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 5


def test_another_decoder_is_refused(tmp_path):
    export_native(pretrained(LLAMA), tmp_path / "model", name="Test")
    with pytest.raises(SystemExit, match="positions"):
        runpy.run_path(str(EXAMPLE))["Reader"](tmp_path / "model")
