"""docs/running-on-pods.md stays true: what can run here is run, and what needs a cluster is run with --dry_run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import ROOT

PAGE = (ROOT / "docs" / "running-on-pods.md").read_text()

# Only the clouds themselves can tell whether these are right.
FOREIGN = ("gcloud", "kubectl", "docker")


def commands(language):
    """The commands of the blocks in this language, one string each, continued lines joined."""
    text = "".join(re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines()]


def shell(command, cwd=ROOT):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("JAX_NUM")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path, small_data):
    """The programs beside small recipes (a baseline, which compiles faster), with the paths that the page has."""
    for name in ("tools", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "experiments").mkdir()
    recipe = small_data.baseline_recipe.read_text().replace("def get_config():", "def get_config(preset=None):")
    recipe = recipe.replace("steps=40", "steps=4").replace("batch_size=4", "batch_size=8")
    for name in ("tiny", "paper"):
        (tmp_path / "experiments" / f"{name}.py").write_text(recipe)
    (tmp_path / "sequences").symlink_to(small_data.sequences)
    (tmp_path / "train").symlink_to(small_data.database)
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "corpus").symlink_to(small_data.corpus)
    (tmp_path / "valid" / "neighbours").symlink_to(small_data.neighbours)
    return tmp_path


@pytest.mark.slow  # ten programs, each with tests of its own
def test_what_can_run_here_runs(checkout):
    # The TPU compiler takes a minute even for a small model; its own tests run it.
    script = "\n".join(commands("bash")).replace("--topology=v4:4x4x4", "--topology=cpu:2")
    result = shell(script, cwd=checkout)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "memory of a chip" in result.stdout
    assert result.stdout.count("step 4: loss") == 2
    first, second = re.findall(r"step 4: (loss \S+)", result.stdout)
    assert first == second  # the same run, on 4 devices and on 2
    assert re.search(r"^runs/tiny +4 +baseline ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", commands("shell"))
def test_what_needs_a_cluster_is_understood(command):
    words = shlex.split(command)
    if words[0] in FOREIGN:
        return
    if words[0] == "sbatch":
        script = words.index("launch/slurm.sbatch")
        assert all(re.fullmatch(r"--[a-z-]+=\S+", option) for option in words[1:script])
        words = ["bash", words[script], "--dry_run", *words[script + 1 :]]
    else:
        place = words.index("--") if "--" in words else len(words)
        words.insert(place, "--dry_run")
    result = shell(shlex.join(words))
    assert result.returncode == 0, result.stderr
    printed = [line for line in result.stdout.splitlines() if line and not line.startswith("#")]
    assert printed and printed[0].split()[0] in ("gcloud", "kubectl", "srun", "export")
    assert "launch/train.py" not in command or "launch/train.py" in result.stdout


def test_every_script_and_every_flag_of_training_is_on_the_page():
    for path in (ROOT / "launch").iterdir():
        if path.suffix in (".sh", ".sbatch") and path.name not in ("lib.sh", "tpu_workers.sh", "worker.sh"):
            assert f"`launch/{path.name}`" in PAGE
    shared = (ROOT / "retro_jax" / "program.py").read_text()
    shared = shared[shared.index("def define_cluster_flags") : shared.index("def start_cluster")]
    flags = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "launch" / "train.py").read_text() + shared))
    assert {"config", "workdir", "coordinator"} <= flags
    table = PAGE[PAGE.index("Flags of `launch/train.py`") : PAGE.index("## 3.")]
    assert {flag for flag in flags if f"--{flag}" not in table} == set()


def test_hosts_and_chips_of_the_table_are_right():
    rows = re.findall(r"^\| (v\w+):([\dx]+) \| (\S+)-(\d+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 6
    names = {"v4": "v4", "v5p": "v5p", "v5e": "v5litepod", "v6e": "v6e"}
    for kind, shape, type_name, size, chips, hosts in rows:
        count = eval(shape.replace("x", "*"))
        cores = 2 if kind in ("v4", "v5p") else 1
        assert (type_name, int(size), int(chips), int(hosts)) == (names[kind], cores * count, count, count // 4)
