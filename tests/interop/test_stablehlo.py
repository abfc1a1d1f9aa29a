"""Exported programs run without this package and give the model's logits."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from small_models import GPT_2, LLAMA, RETRO, pretrained
from small_run import error_line

from retro_jax.errors import UserError
from retro_jax.interop import stablehlo
from retro_jax.interop.stablehlo import PLATFORMS, export_stablehlo

# Everything a user without the package needs: whole sequences, and token after token.
READER = """
import json, sys
import numpy as np
sys.modules["retro_jax"] = sys.modules["flax"] = None
import jax
from jax import export
from safetensors.numpy import load_file

directory, out = sys.argv[1:]
about = json.load(open(f"{directory}/programs.json"))
load = lambda name: export.deserialize(bytearray(open(f"{directory}/{name}.stablehlo", "rb").read())).call
parameters = load_file(f"{directory}/model.safetensors")
given = np.load(f"{out}/inputs.npz")
tokens, neighbours = given["tokens"], given["neighbours"]
chunk = about["slots"] // neighbours.shape[1]
on = "forward" in about["programs"]
whole = load("forward")(parameters, tokens, neighbours) if on else load("forward_off")(parameters, tokens)

def zeros(text):
    kind, shape = text.rstrip("]").split("[")
    return np.zeros([len(tokens) if size == "b" else int(size) for size in shape.split(", ") if size], kind)

prepared = load("prepare")(parameters)
state = jax.tree.map(zeros, about["programs"]["step"]["arguments"][1])
step, step_end = jax.jit(load("step")), jax.jit(load("step_end" if on else "step_end_off"))
steps = []
for slot in range(about["slots"]):
    if (slot + 1) % chunk:
        logits, state = step(prepared, state, tokens[:, slot], np.int32(slot))
    else:
        near = (neighbours[:, slot // chunk],) if on else ()
        logits, state = step_end(prepared, state, tokens[:, slot], np.int32(slot), *near)
    steps.append(logits)
np.savez(f"{out}/outputs.npz", whole=whole, steps=np.stack(steps, 1))
"""


SMALLEST = dataclasses.replace(LLAMA, num_layers=1, cca_layers=(1,), scan_layers=False)
BASELINE = dataclasses.replace(SMALLEST, cca_layers=())
PAPER = dataclasses.replace(RETRO, cca_layers=(2,))


@pytest.mark.parametrize(
    ("config", "platforms"),
    [
        pytest.param(BASELINE, ("cpu",), id="baseline"),
        pytest.param(dataclasses.replace(BASELINE, dtype="bfloat16"), PLATFORMS, id="bfloat16"),
        pytest.param(SMALLEST, ("cpu",), id="one layer"),
        pytest.param(PAPER, PLATFORMS, id="paper", marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(PAPER, dtype="bfloat16"), ("cpu",), id="bfloat16 paper", marks=pytest.mark.slow
        ),
    ],
)
def test_programs_reloaded_without_the_package_give_the_models_logits(tmp_path, config, platforms):
    source = pretrained(config)
    export_stablehlo(source, tmp_path / "model", name="Test", platforms=platforms)
    about = json.loads((tmp_path / "model" / "programs.json").read_text())
    names = {"forward_off", "prepare", "step", "step_end_off"}
    assert set(about["programs"]) == names | (set() if config.is_baseline else {"forward", "step_end"})
    assert about["programs"]["forward_off"]["results"] == "float32[b, 12, 290]"
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, config.vocab_size, (2, 12), np.int32)
    near = generator.integers(1, config.vocab_size, (2, 3, 2, config.neighbour_length), np.int32)
    np.savez(tmp_path / "inputs.npz", tokens=tokens, neighbours=near)
    command = [sys.executable, "-c", READER, str(tmp_path / "model"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    graphdef = nnx.graphdef(source.model)
    inputs = (tokens,) if config.is_baseline else (tokens, near)
    expected = jax.jit(lambda params: nnx.merge(graphdef, params)(*inputs))(source.params)
    outputs = np.load(tmp_path / "outputs.npz")
    rounding = 8e-3 if config.dtype == "bfloat16" else 1e-5
    for name, tolerance in (("whole", rounding), ("steps", 10 * rounding)):
        np.testing.assert_allclose(outputs[name], expected, atol=tolerance * np.abs(expected).max(), err_msg=name)


def other_logits(result):
    """Of a program's result, off by a thousandth: logits alone, or with the state."""
    return (result[0] * 1.001, result[1]) if isinstance(result, tuple) else result * 1.001


def refused(tmp_path, program):
    source = pretrained(dataclasses.replace(RETRO, num_layers=1, cca_layers=()), context=131_072)
    with pytest.raises(UserError, match=rf"{program} reloaded gives logits \S+ off the model's; nothing was exported"):
        export_stablehlo(source, tmp_path / "model", name="T", length=8, platforms=("cpu",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["forward_off", "step", "step_end_off"])
def test_a_program_that_gives_other_logits_is_not_exported(tmp_path, monkeypatch, program):
    deserialize = stablehlo.export.deserialize

    def reloaded(content):
        found = deserialize(content)
        if bytes(content) != next(tmp_path.rglob(f"{program}.stablehlo")).read_bytes():
            return found
        return SimpleNamespace(call=lambda *arguments: other_logits(found.call(*arguments)))

    monkeypatch.setattr(stablehlo.export, "deserialize", reloaded)
    refused(tmp_path, program)


def test_steps_that_are_not_the_whole_sequence_are_not_exported(tmp_path, monkeypatch):
    programs = stablehlo._programs

    def with_another_step(*arguments):
        found = programs(*arguments)
        step, inputs = found["step"]
        return found | {"step": (lambda *given: other_logits(step(*given)), inputs)}

    monkeypatch.setattr(stablehlo, "_programs", with_another_step)
    refused(tmp_path, "step")


@pytest.mark.parametrize(
    ("config", "context", "length", "message"),
    [
        (BASELINE, 131_072, None, "context is 131,072 tokens; give --length"),
        (BASELINE, 0, None, "context is not known; give --length"),
        (BASELINE, 3, None, "context is 3 tokens; give --length"),
        (BASELINE, 131_072, 10, "--length=10 is not a multiple of the chunk of 4 tokens"),
        (GPT_2, 16, 20, "--length=20 is not a multiple of the chunk of 4 tokens up to 16"),
    ],
)
def test_a_length_that_must_be_given_or_cannot_be_is_said(tmp_path, config, context, length, message):
    with pytest.raises(UserError, match=message):
        export_stablehlo(pretrained(config, context=context), tmp_path / "model", name="Test", length=length)
    assert not list(tmp_path.iterdir())


def test_a_length_goes_with_programs_alone(tmp_path):
    flags = [f"--checkpoint={tmp_path}", f"--output={tmp_path / 'out'}", "--format=hf", "--length=64"]
    assert "--length goes with --format=stablehlo" in error_line("launch/export.py", *flags)
