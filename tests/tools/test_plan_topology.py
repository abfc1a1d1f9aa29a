"""tools/plan_topology.py: what a training step costs on devices that are not there."""

import dataclasses
import importlib.util
import json
import re

import pytest
from small_run import MODEL, RECIPE, error_line, run_program

LENGTH = "--length=32"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe without data: planning reads none."""
    path = tmp_path_factory.mktemp("recipes") / "retro.py"
    text = RECIPE.format(model=dataclasses.asdict(MODEL), sequences="")
    path.write_text(text.replace("sequences=('',)", "sequences=()").replace("batch_size=4", "batch_size=16"))
    return f"--config={path}"


def plan(*flags, status=0):
    actual, stdout, stderr = run_program("tools/plan_topology.py", *flags)
    assert actual == status, stderr
    return stdout, stderr


@pytest.fixture(scope="module")
def planned(recipe, tmp_path_factory):
    """Table, progress lines and JSON of a plan for eight virtual CPU devices."""
    output = tmp_path_factory.mktemp("plans") / "plan.json"
    stdout, stderr = plan(recipe, "--topology=cpu:8", LENGTH, f"--output={output}")
    return stdout, stderr, json.loads(output.read_text())


def test_a_plan_tells_memory_flops_and_traffic(planned):
    stdout, stderr, result = planned
    assert "cpu:8, 8 chips, mesh data 1, fsdp 8, tensor 1, context 1" in stdout
    assert re.search(r"compiling for cpu:8", stderr)
    memory, costs = result["memory"], result["costs"]
    assert result["fits"] and memory["limit"] is None
    assert memory["peak"] >= memory["arguments"] + memory["temporaries"] > 0
    assert memory["aliased"] > 0.9 * memory["outputs"]  # the state is donated
    assert result["hardware_flops_closed_form"] >= 0.9 * result["model_flops"][0]
    assert result["model_flops"][0] < result["model_flops"][1] < costs["hardware_flops"]
    assert costs["interconnect"]["all-gather"]["executions"] > 0  # of weights split over fsdp
    assert costs["interconnect"]["all-gather"]["bytes"] > 0
    assert costs["loops_of_unknown_length"] == []
    assert result["parameters_replicated"] < 0.1 and result["compile_seconds"] > 0
    assert result["settings"]["length"] == 32 and result["versions"]["jax"]


def test_a_step_that_does_not_fit_exits_with_1_and_the_change_that_does(recipe, planned, tmp_path):
    peak = planned[2]["memory"]["peak"] / 2**30
    output = tmp_path / "plan.json"
    mesh = ("--config.mesh.data=8", "--config.mesh.fsdp=1")  # every device holds all parameters
    stdout, stderr = plan(
        recipe, "--topology=cpu:8", LENGTH, *mesh, f"--hbm_gib={1.2 * peak}", f"--output={output}", status=1
    )
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith("it fits with --config.mesh.data=4 --config.mesh.fsdp=2")
    assert "DOES NOT FIT" in stdout and ": fits" in stdout
    result = json.loads(output.read_text())
    assert not result["fits"]
    assert result["remedy"]["flags"] == ["--config.mesh.data=4", "--config.mesh.fsdp=2"]
    assert result["remedy"]["plan"]["fits"]


def test_when_nothing_tried_fits_it_says_so(recipe):
    line = error_line(
        "tools/plan_topology.py", recipe, "--topology=cpu:8", LENGTH, "--hbm_gib=0.000001", "--candidates=0"
    )
    assert "none of the 0 changes tried fits: take more chips or a smaller batch_size" in line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v9:2x2"], "topology 'v9:2x2' is unknown; known: v4:8x8x8"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "does not multiply to the 8 devices"),
        (["--topology=cpu:8", "--config.batch_size=12"], "batch_size 12 is not a multiple"),
        (["--topology=cpu:8", "--config.batch_sise=12"], "batch_sise"),
        (["--topolgy=cpu:8"], "topolgy"),
        (["--topology=cpu:8", "--hbm_gib=-1"], "hbm_gib"),
    ],
)
def test_mistakes_are_named_in_one_line(recipe, flags, message):
    assert message in error_line("tools/plan_topology.py", recipe, LENGTH, *flags)


def test_a_missing_recipe_is_one_line():
    assert "nothing.py" in error_line("tools/plan_topology.py", "--config=nothing.py", "--topology=cpu:8")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_tpu_compiler_plans_a_small_model_without_a_tpu(recipe, tmp_path):
    output = tmp_path / "plan.json"
    small = ("--config.model.num_layers=1", "--config.model.cca_layers=(1,)", "--config.model.dtype=bfloat16")
    stdout, _ = plan(recipe, "--topology=v5e:2x2", "--quick", LENGTH, *small, f"--output={output}")
    result = json.loads(output.read_text())
    costs = result["costs"]
    assert "of 15.75 GiB: fits" in stdout and result["chips"] == 4 and result["versions"]["libtpu"]
    assert result["memory"]["limit"] == 15.75 * 2**30
    assert costs["loops_of_unknown_length"] == []
    assert costs["hardware_flops"] >= 0.9 * result["model_flops"][0]
    fast, slow = costs["step_seconds"]
    assert 0 < fast <= slow == pytest.approx(costs["busy_seconds"] + costs["interconnect_seconds"])
    assert costs["mfu"][0] == pytest.approx(result["model_flops"][0] / (4 * 197e12 * fast))
