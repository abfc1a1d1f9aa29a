"""What holds for every script of launch/."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from script_run import ROOT, dry_run, environment, run

SCRIPTS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
SOURCED = {"lib.sh", "tpu_workers.sh"}
STARTED = [name for name in SCRIPTS if name not in SOURCED]


def test_shellcheck_has_nothing_to_say():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    scripts = [f"launch/{name}" for name in SCRIPTS]
    result = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", STARTED)
def test_a_script_stops_at_the_first_failure_and_says_what_it_does(name):
    text = (ROOT / "launch" / name).read_text()
    assert re.search(r"^set -euo pipefail$", text, re.MULTILINE)
    status, stdout, _ = run(name, "--help")
    assert status == 0
    assert f"launch/{name}" in stdout and "#SBATCH --" not in stdout
    # Every flag that it knows is in its help.
    known = re.search(r"flags: (.*)", run(name, "watch", "--no_such_flag")[2] + run(name, "--no_such_flag", "a")[2])
    if known:
        for flag in set(known[1].split()) - {"--n"}:
            assert flag in stdout, f"{flag} is not in the help of {name}"


def test_scripts_can_be_executed():
    assert all((ROOT / "launch" / name).stat().st_mode & 0o111 for name in STARTED if name.endswith(".sh"))


@pytest.mark.parametrize(
    "argument", ["two words", "it's", '$HOME `id` \\ "', "*", "", "--flag=a b", "--flag='", "ä\t", "#", "--", "a=b"]
)
def test_printed_commands_can_be_pasted(argument):
    command, *_ = dry_run("slurm.sbatch", "--dry_run", "--", "python", argument, "last")
    words = command.replace("srun --kill-on-bad-exit=1 python", "printf '%s|'")
    pasted = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True, env=environment())
    assert pasted.stdout == f"{argument}|last|"
