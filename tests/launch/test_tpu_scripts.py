"""launch/tpu_vm.sh and tpu_queued.sh keep a program running on the workers of a TPU, whatever becomes of the machine.

gcloud is a stand-in that records its calls and runs the workers' commands on this machine, each in a home of its own.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from script_run import ROOT, alive, dry_run, run, start, wait_until

WORKERS = 2
MACHINE = ("--name=retro", "--project=p", "--zone=z")
WATCH = ("watch", *MACHINE, "--accelerator=v4-16", "--poll=0")

# A run of the program on a worker: what it does stands in a file named after how often it was started there before.
PROGRAM = """
directory="$1/$WORKER"
mkdir -p "$directory"
run="$(ls "$directory" | wc -l)"
echo "$$" >"$directory/$run"
echo "run $run of worker $WORKER"
trap 'exit 143' TERM
act="$(cat "$1/act-$run-$WORKER" 2>/dev/null || cat "$1/act-$run")"
case "$act" in
  preempted) # the whole machine, once all workers run
    if [[ $WORKER == 0 ]]; then
      until [[ -s $1/1/$run ]]; do sleep 0.02; done
      echo "$2" >"$CLOUD/states.new"
      mv "$CLOUD/states.new" "$CLOUD/states"
    fi
    ;;
  exit*) $act ;;
esac
while true; do sleep 0.05; done
"""


class Cloud:
    """The stand-in's files, and a checkout to launch from."""

    def __init__(self, directory: Path, coming: str):
        self.directory = directory / "cloud"
        self.checkout = directory / "checkout"
        self.runs = directory / "runs"
        self.program = directory / "program.sh"
        binaries = directory / "bin"
        for path in (self.directory, self.checkout, self.runs, binaries):
            path.mkdir()
        (self.directory / "coming").write_text(coming)
        self.program.write_text(PROGRAM)
        shutil.copytree(ROOT / "launch", self.checkout / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
        for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=test"]):
            subprocess.run([*git, *command], cwd=self.checkout, check=True)
        shutil.copy(ROOT / "tests" / "launch" / "fake_gcloud.sh", binaries / "gcloud")
        (binaries / "uv").write_text('#!/bin/sh\necho "$(pwd): uv $*" >>"$CLOUD/installations"\n')
        for path in binaries.iterdir():
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "CLOUD": str(self.directory),
            "WORKERS": str(WORKERS),
            "TMPDIR": str(directory),
        }

    def acts(self, *acts: str, **of_worker: str) -> None:
        """What the first run of the program does, the second, …; run_0_worker_1="exit 1" for one worker alone."""
        for i, act in enumerate(acts):
            (self.runs / f"act-{i}").write_text(act)
        for name, act in of_worker.items():
            _, number, _, worker = name.split("_")
            (self.runs / f"act-{number}-{worker}").write_text(act)

    def started(self, worker: int = 0) -> list[int]:
        """Process ids of the program's runs on a worker."""
        files = (self.runs / str(worker)).glob("*")
        return [int(path.read_text() or 0) for path in sorted(files, key=lambda path: int(path.name))]

    def calls(self) -> list[str]:
        """Every call of gcloud but the questions for states, in short: `tpu-vm ssh start`."""
        found = []
        for call in (self.directory / "calls").read_text().splitlines():
            noun, verb = call.split()[2:4]
            does = re.search(r"worker\.sh (\w+)", call)
            if verb != "list" and not (does and does[1] == "status"):
                found.append(" ".join([noun, verb, *([does[1]] if does else [])]))
        return found

    def command(self, *words: str, program: bool = True) -> tuple[str, ...]:
        return (*words, "--", "bash", str(self.program), str(self.runs), self.lost) if program else words

    lost = "SUSPENDED"


@pytest.fixture
def queued(tmp_path):
    cloud = Cloud(tmp_path, "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    yield cloud
    _end_all(cloud)


@pytest.fixture
def machine(tmp_path):
    cloud = Cloud(tmp_path, "CREATING\nREADY\n")
    cloud.lost = "PREEMPTED"
    yield cloud
    _end_all(cloud)


def _end_all(cloud):
    for group in cloud.directory.glob("worker-*/retro_run/group"):
        pid = int(group.read_text().split()[0])
        if alive(pid):
            os.killpg(pid, signal.SIGKILL)


def watched(script, cloud, *flags):
    arguments = cloud.command(*WATCH, *flags)
    return run(script, *arguments, cwd=cloud.checkout, **cloud.environment)


SET_UP = ["tpu-vm scp", "tpu-vm ssh install", "tpu-vm ssh start"]


def test_a_queued_resource_is_waited_for_and_asked_for_again_after_a_preemption(queued):
    queued.acts("preempted", "exit 143", "exit 0")
    status, _, stderr = watched("tpu_queued.sh", queued)
    assert status == 0, stderr
    create, delete = "queued-resources create", "queued-resources delete"
    assert queued.calls() == [create, *SET_UP, delete, create, *SET_UP, "tpu-vm ssh start"]
    assert len(queued.started(0)) == len(queued.started(1)) == 3
    told = [line.removeprefix("tpu_queued.sh: ") for line in stderr.splitlines() if "retro is" in line]
    once = ["retro is absent", "retro is waiting", "retro is ready"]
    assert told == [*once, "retro is lost", *once]
    assert "saved after SIGTERM; starting it again" in stderr and "done on all workers" in stderr
    assert not any(alive(pid) for pid in (*queued.started(0), *queued.started(1)))


def test_a_tpu_vm_is_deleted_and_created_again_after_a_preemption(machine):
    machine.acts("preempted", "exit 0")
    (machine.directory / "refusal").write_text('ERROR: There is no more capacity in the zone "z"\n')
    status, _, stderr = watched("tpu_vm.sh", machine)
    assert status == 0, stderr
    create = "tpu-vm create"
    assert machine.calls() == [create, create, *SET_UP, "tpu-vm delete", create, *SET_UP]
    assert "no more capacity" in stderr and "asking again" in stderr


def test_a_mistake_of_the_user_is_not_run_again(queued):
    queued.acts("exit 1")
    status, stdout, stderr = watched("tpu_queued.sh", queued)
    assert status == 1 and "the program ended with 1" in stderr
    assert len(queued.started()) == 1
    assert "run 0 of worker 0" in stdout
    assert queued.calls()[-1] == "tpu-vm ssh logs"


def test_a_worker_that_goes_down_is_a_crash_although_the_others_end_with_1(queued):
    queued.acts("exit 1", "exit 0", run_0_worker_1="exit 137")
    status, _, stderr = watched("tpu_queued.sh", queued)
    assert status == 0, stderr
    assert "crash 1 of at most 3" in stderr and len(queued.started()) == 2


def test_crashes_are_limited(queued):
    queued.acts(*["exit 139"] * 5)
    status, _, stderr = watched("tpu_queued.sh", queued, "--max_crashes=2")
    assert status == 1 and "crash 3 of at most 2" in stderr
    assert len(queued.started()) == 3


def test_a_program_that_runs_on_some_workers_only_is_killed_and_started_again(queued):
    queued.acts("run", "exit 0", run_0_worker_1="exit 0")
    status, _, stderr = watched("tpu_queued.sh", queued, "--lost_after=1")
    assert status == 0, stderr
    assert "on some workers only" in stderr
    assert not alive(queued.started(0)[0])


def test_the_watch_may_be_ended_and_goes_on_with_what_runs(queued):
    queued.acts("run")
    first = start("tpu_queued.sh", *queued.command(*WATCH), cwd=queued.checkout, **queued.environment)
    wait_until(lambda: len(queued.started(0)) == len(queued.started(1)) == 1)
    wait_until(lambda: "start" in queued.calls()[-1])
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert alive(queued.started(0)[0])

    second = start("tpu_queued.sh", *queued.command(*WATCH), cwd=queued.checkout, **queued.environment)
    calls = queued.directory / "calls"
    wait_until(lambda: calls.read_text().count("worker.sh status") > 5)
    status, _, stderr = run("tpu_queued.sh", "stop", *MACHINE, cwd=queued.checkout, **queued.environment)
    assert status == 0, stderr
    _, stderr = second.communicate(timeout=30)
    assert second.returncode == 143 and "stopped; the same command goes on" in stderr
    assert len(queued.started(0)) == 1 and not alive(queued.started(0)[0])


def test_what_an_earlier_command_left_behind_does_not_answer_for_this_one(queued):
    queued.acts("exit 1", "exit 0")
    assert watched("tpu_queued.sh", queued)[0] == 1
    assert watched("tpu_queued.sh", queued)[0] == 0
    assert len(queued.started()) == 2


def test_the_steps_can_be_taken_one_by_one(machine):
    machine.acts("run")

    def take(*words, program=False):
        arguments = machine.command(*words, *MACHINE, program=program)
        status, stdout, stderr = run("tpu_vm.sh", *arguments, cwd=machine.checkout, **machine.environment)
        assert status == 0, stderr
        return stdout.splitlines()

    take("create", "--accelerator=v4-16")
    (machine.directory / "states").write_text("READY\n")
    assert [line.split()[1:] for line in take("status")] == [["idle"]] * WORKERS
    take("setup")
    installations = (machine.directory / "installations").read_text()
    assert installations.count("--constraint=requirements/dev.txt --editable .[tpu]") == WORKERS
    take("run", program=True)
    assert [line.split()[1:] for line in take("status")] == [["running"]] * WORKERS
    assert take("logs", "--worker=1") == ["run 0 of worker 1"]
    take("stop")
    wait_until(lambda: [line.split()[1:] for line in take("status")] == [["stopped", "143"]] * WORKERS)
    take("delete")
    assert not list(machine.directory.glob("worker-*"))


def test_a_refused_request_and_a_failed_one_end_the_watch(queued):
    (queued.directory / "refusal").write_text("ERROR: PERMISSION_DENIED: tpu.nodes.create\n")
    status, _, stderr = watched("tpu_queued.sh", queued)
    assert status == 1 and "PERMISSION_DENIED" in stderr and "error: retro cannot be created" in stderr
    (queued.directory / "states").write_text("FAILED\n")
    status, _, stderr = watched("tpu_queued.sh", queued)
    assert status == 1 and "error: the request retro has failed" in stderr
    (queued.directory / "offline").touch()
    status, _, stderr = watched("tpu_queued.sh", queued)
    assert status == 1 and "error: gcloud cannot tell the state of retro" in stderr


def test_dry_run_prints_every_command_of_a_tpu_vm(tmp_path):
    flags = ("--spot", "--internal_ip", "--create_flags=--network=n --tags=t", "--prepare=sudo mount a /b", "--dry_run")
    program = ("python", "launch/train.py", "--workdir=my runs")
    lines = dry_run("tpu_vm.sh", *WATCH, *flags, "--", *program, TMPDIR="/t")
    place = "--project=p --zone=z"
    ssh = "gcloud compute tpus tpu-vm ssh retro --worker=all --command="
    end = f"--quiet --internal-ip {place}"
    ask = f"gcloud compute tpus tpu-vm list --filter='name~\"(^|/)retro$\"' --format='value(state)' {place}"
    install = "mkdir -p retro_jax && tar -xzf retro_jax.tar.gz -C retro_jax && retro_jax/launch/worker.sh install"
    status = "retro_jax/launch/worker.sh status"
    assert [line for line in lines if not line.startswith("#")] == [
        "gcloud compute tpus tpu-vm create retro --accelerator-type=v4-16 --version=tpu-ubuntu2204-base --network=n"
        f" --tags=t --spot {place}",
        ask,
        f"git -C {ROOT} archive --format=tar.gz --output=/t/retro_jax-retro.tar.gz HEAD",
        f"gcloud compute tpus tpu-vm scp /t/retro_jax-retro.tar.gz retro:retro_jax.tar.gz --worker=all {end}",
        f"{ssh}'sudo mount a /b' {end}",
        f"{ssh}'{install}' {end}",
        f"{ssh}'retro_jax/launch/worker.sh start python launch/train.py --workdir='\\''my runs'\\''' {end}",
        ask,
        f"{ssh}'if [ -x retro_jax/launch/worker.sh ]; then {status}; else echo \"$(hostname) idle\"; fi' {end}",
        f"gcloud compute tpus tpu-vm delete retro --quiet {place}",
    ]


@pytest.mark.parametrize(
    ("accelerator", "image"),
    [
        ("v4-128", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_each_accelerator_has_its_image_and_a_flag_another(accelerator, image):
    words = ("create", *MACHINE, f"--accelerator={accelerator}", "--dry_run")
    create = "gcloud compute tpus queued-resources create retro --node-id=retro"
    end = "--project=p --zone=z"
    assert dry_run("tpu_queued.sh", *words) == [
        f"{create} --accelerator-type={accelerator} --runtime-version={image} {end}"
    ]
    assert dry_run("tpu_queued.sh", *words, "--runtime_version=v9") == [
        f"{create} --accelerator-type={accelerator} --runtime-version=v9 {end}"
    ]


def test_dry_run_prints_the_single_commands():
    end = "--project=p --zone=z"
    ssh = "gcloud compute tpus tpu-vm ssh retro --worker"
    worker = "retro_jax/launch/worker.sh"
    for words, command in {
        ("describe",): f"gcloud compute tpus queued-resources describe retro {end}",
        ("logs", "--worker=all", "--lines=9"): f"{ssh}=all --command='{worker} logs 9' --quiet {end}",
        ("stop",): f"{ssh}=all --command='{worker} stop' --quiet {end}",
        ("delete",): f"gcloud compute tpus queued-resources delete retro --force --quiet {end}",
    }.items():
        assert dry_run("tpu_queued.sh", *words, *MACHINE, "--dry_run") == [command]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_queued.sh"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("watch", "--project=p", "--zone=z"), "--name is missing"),
        (("watch", "--name=retro", "--zone=z"), "--project is missing"),
        (("watch", "--name=retro", "--project=p"), "--zone is missing"),
        (("watch", *MACHINE), "--accelerator is missing"),
        (("watch", *MACHINE, "--accelerator=h100-8"), "--accelerator 'h100-8' is not of"),
        (("watch", *MACHINE, "--accelerator=v4-8"), "no program to run"),
        (("create", *MACHINE, "--accelerator=v4-8", "--dry_run", "ls"), "create runs no program, found 'ls'"),
        (("watch", "--name=Retro_1", "--project=p", "--zone=z"), "--name has small letters"),
        (("status", *MACHINE, "--poll=often"), "--poll must be a whole number"),
        (("status", *MACHINE, "--spot=yes"), "--spot is true or false, is 'yes'"),
        (("status", *MACHINE, "--project"), "--project needs a value"),
        (("status", *MACHINE, "--regoin=a"), "--regoin is unknown; flags: --accelerator"),
        (("start", *MACHINE), "'start' is no command"),
    ],
)
def test_mistakes_are_answered_in_one_line(script, arguments, message):
    dry = () if "--dry_run" in arguments else ("--dry_run",)
    status, stdout, stderr = run(script, *arguments, *dry)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ") and message in stderr and len(stderr.splitlines()) == 1
