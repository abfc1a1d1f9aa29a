"""launch/slurm.sbatch starts a step on all nodes and goes back into the queue when the program has saved."""

import re
import signal

import pytest
from script_run import ROOT, dry_run, run, start, wait_until

JOB = {"SLURM_JOB_ID": "17", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}
PROGRAM = ("python", "launch/train.py", "--config=a.py")
SRUN = """#!/bin/bash
echo "srun $*" >>{calls}
echo "devices ${{JAX_LOCAL_DEVICE_IDS-}}" >>{calls}
trap 'exit 143' TERM
while [[ {status} == run ]]; do sleep 0.05; done
exit {status}
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs the script as SLURM does, with an srun that ends as told: (exit status, calls, stderr)."""
    calls = tmp_path / "calls"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "scontrol $*" >>{calls}\n')

    def start_job(srun_status, *flags, **variables):
        (tmp_path / "srun").write_text(SRUN.format(calls=calls, status=srun_status))
        for name in ("srun", "scontrol"):
            (tmp_path / name).chmod(0o755)
        return start("slurm.sbatch", *flags, *PROGRAM, PATH=f"{tmp_path}:/usr/bin:/bin", **{**JOB, **variables})

    def finished(process):
        _, stderr = process.communicate(timeout=30)
        return process.returncode, calls.read_text().splitlines(), stderr

    slurm = type("Slurm", (), {})()
    slurm.start, slurm.finished, slurm.calls = start_job, finished, calls
    return slurm


STEP = "srun --kill-on-bad-exit=1 --cpus-per-task=4 python launch/train.py --config=a.py"


@pytest.mark.parametrize("status", [0, 1, 137])
def test_the_exit_status_of_the_program_is_the_jobs(slurm, status):
    assert slurm.finished(slurm.start(status))[:2] == (status, [STEP, "devices "])


def test_a_program_that_saved_goes_back_into_the_queue(slurm):
    status, calls, stderr = slurm.finished(slurm.start(143))
    assert (status, calls[-1]) == (143, "scontrol requeue 17")
    assert "back into the queue" in stderr


def test_requeuing_is_limited(slurm):
    status, calls, stderr = slurm.finished(slurm.start(143, "--max_requeues=5", SLURM_RESTART_COUNT="5"))
    assert status == 1 and "error: requeued 5 times already" in stderr
    assert not any(call.startswith("scontrol") for call in calls)


def test_a_signal_to_the_shell_alone_reaches_the_program_and_is_waited_for(slurm):
    process = slurm.start("run")
    wait_until(lambda: slurm.calls.exists() and "devices" in slurm.calls.read_text())
    process.send_signal(signal.SIGTERM)
    status, calls, _ = slurm.finished(process)
    assert (status, calls[-1]) == (143, "scontrol requeue 17")


def test_one_process_for_a_node_sees_all_its_gpus(slurm):
    process = slurm.start(0, "--per=node", SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4")
    assert slurm.finished(process)[:2] == (0, [STEP, "devices 0,1,2,3"])


def test_dry_run_prints_the_commands():
    assert dry_run("slurm.sbatch", "--dry_run", *PROGRAM) == [
        "srun --kill-on-bad-exit=1 python launch/train.py --config=a.py",
        "# when it exits with 143, saved after SIGTERM:",
        "scontrol requeue JOB",
    ]
    assert dry_run("slurm.sbatch", "--per=node", "--dry_run", *PROGRAM)[0] == (
        "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7"
    )


def test_slurm_reads_its_directives_before_any_command():
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[1 : 1 + len(directives)] == directives
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in directives)
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@300", "#SBATCH --open-mode=append"} <= set(directives)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), JOB, "no program to run"),
        (("--per=task", "ls"), JOB, "--per is gpu or node, is 'task'"),
        (("ls",), {}, "this is no SLURM job"),
        (("ls",), {**JOB, "SLURM_NTASKS_PER_NODE": "1"}, "1 tasks on a node of 8 GPUs: set --ntasks-per-node=8"),
        (("--per=node", "ls"), JOB, "--per=node needs --ntasks-per-node=1, it is 8"),
        (("--pre=node", "ls"), JOB, "--pre is unknown; flags: --dry_run --max_requeues --per --venv"),
        (("ls",), {**JOB, "SLURM_SUBMIT_DIR": "/"}, "submit from the root of the repository"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, variables, message):
    status, stdout, stderr = run("slurm.sbatch", *arguments, **variables)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ") and message in stderr and len(stderr.splitlines()) == 1
