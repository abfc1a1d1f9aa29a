"""The reader in docs/ gets the model's logits out of an export with NumPy alone."""

import dataclasses
import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from small_models import GPT_2, LLAMA, RETRO, pretrained

from retro_jax.interop.export import export_native
from retro_jax.model import layer_shapes

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLE = DOCS / "read_export.py"
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
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
    graphdef = nnx.graphdef(source.model)
    model = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens, near), compiler_options=QUICK)
    expected = np.asarray(model(source.params))[0]
    np.testing.assert_allclose(reader.logits(tokens[0], near[0]), expected, atol=1e-4 * np.abs(expected).max())
    off = reader.logits(tokens[0])
    np.testing.assert_array_equal(
        off[: config.chunk_length - 1], reader.logits(tokens[0], near[0])[: config.chunk_length - 1]
    )
    assert np.abs(off - expected).max() > 0.1, "neighbours must matter for the comparison to mean anything"


def test_it_runs_where_neither_jax_nor_this_package_is(tmp_path):
    export_native(pretrained(RETRO), tmp_path / "model", name="Test")
    near = json.dumps(np.arange(1, 17).reshape(1, 2, 8).tolist())
    arguments = [str(EXAMPLE), str(tmp_path / "model"), "--tokens=5,17,9,12", f"--neighbours={near}"]
    code = BLOCKED + f"sys.argv = {arguments!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 5


@pytest.mark.parametrize(("tokens", "chunks"), [(3, 1), (8, 1), (9, 3)])
def test_neighbours_of_another_number_of_chunks_are_refused(tmp_path, tokens, chunks):
    export_native(pretrained(RETRO), tmp_path / "model", name="Test")
    reader = runpy.run_path(str(EXAMPLE))["Reader"](tmp_path / "model")
    near = np.ones((chunks, 2, 8), np.int32)
    expected = f"{tokens} tokens are {tokens // 4} complete chunks of 4, and neighbours are given for {chunks}"
    with pytest.raises(SystemExit, match=expected):
        reader.logits(np.arange(1, tokens + 1), near)


@pytest.mark.parametrize(
    "other",
    [
        {"positions": "rope", "head_size": 4},
        {"lora_rank": 2},
        {"attention_biases": "qkv"},
        {"ffw_biases": True},
        {"qk_norm": True},
        {"neighbour_part": "neighbour"},
    ],
)
def test_another_decoder_is_refused(tmp_path, other):
    export_native(pretrained(dataclasses.replace(RETRO, **other)), tmp_path / "model", name="Test")
    with pytest.raises(SystemExit, match=f"reads {next(iter(other))}"):
        runpy.run_path(str(EXAMPLE))["Reader"](tmp_path / "model")


def test_a_tensor_that_no_equation_reads_is_refused(tmp_path):
    export_native(pretrained(dataclasses.replace(RETRO, qk_norm=True)), tmp_path / "model", name="Test")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"model": values["model"] | {"qk_norm": False}}))
    with pytest.raises(SystemExit, match=r"reads no tensor decoder\.layers\.\d\.attention\.(query|key)_norm\.scale"):
        runpy.run_path(str(EXAMPLE))["Reader"](tmp_path / "model")


def test_the_page_has_the_name_of_every_tensor_and_no_other():
    page = (DOCS / "export.md").read_text()
    table = page[page.index("| name | shape |") :].split("\n\n")[0]
    found = re.findall(r"`([^`]+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:]))
    listed = {name for pattern in found for name in spelt_out(pattern)}
    own = {"lora_rank": 2, "ffw_biases": True, "attention_biases": "all"}
    forms = [RETRO, GPT_2, LLAMA, dataclasses.replace(LLAMA, qk_norm=True, **own), dataclasses.replace(GPT_2, **own)]
    names = {re.sub(r"layers\.\d+", "layers.{n}", name) for form in forms for name in layer_shapes(form)}
    assert names == listed


def spelt_out(pattern):
    """Names of which `{a,b}` stands for one or the other."""
    parts = [part.split(",") for part in re.split(r"\{([^{}]*,[^{}]*)\}", pattern)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]
