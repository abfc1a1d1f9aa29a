"""launch/local.sh starts processes that know each other, and leaves none behind whatever happens."""

import json
import os
import signal
import sys
import time

import pytest
from script_run import alive, dry_run, run, start, wait_until

# Writes what it was given, and then does what its name says.
PROGRAM = """
import fcntl, json, os, pathlib, signal, subprocess, sys, time

directory, act = pathlib.Path(sys.argv[1]), sys.argv[2]
flags = dict(argument[2:].split("=", 1) for argument in sys.argv[3:])
index = int(flags["process_id"])
child = subprocess.Popen(["sleep", "300"]).pid if act == "wait" else None
if act == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if act == "save":
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
print("hello from", index, flush=True)
variables = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
report = {"pid": os.getpid(), "child": child, "flags": flags, "variables": variables}
(directory / f"{index}.new").write_text(json.dumps(report))
(directory / f"{index}.new").rename(directory / f"{index}.json")
lock = open(directory / "lock", "w")
if act == "lost" and index == 1:
    fcntl.flock(lock, fcntl.LOCK_EX)
    (directory / "locked").touch()
while not all((directory / f"{i}.json").exists() for i in range(int(flags["num_processes"]))):
    time.sleep(0.02)
if act == "lost":
    while not (directory / "locked").exists():
        time.sleep(0.02)
    if index == 1:
        time.sleep(0.5)  # the other waits for its end by now
        os.kill(os.getpid(), signal.SIGKILL)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os._exit(75)
if index == 1 and act in ("wait", "stubborn"):
    sys.exit(3)
if act != "end":
    time.sleep(300)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    yield path
    for report in tmp_path.glob("?.json"):  # what the script was wrong to leave behind
        for pid in filter(None, (json.loads(report.read_text())[name] for name in ("pid", "child"))):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def reports(directory, count):
    return [json.loads((directory / f"{i}.json").read_text()) for i in range(count)]


def test_every_process_gets_its_number_the_same_coordinator_and_its_devices(tmp_path, program):
    status, stdout, stderr = run("local.sh", "-n", 3, "--devices=2", program, tmp_path, "end")
    assert status == 0, stderr
    found = reports(tmp_path, 3)
    assert [report["flags"]["process_id"] for report in found] == ["0", "1", "2"]
    assert {report["flags"]["num_processes"] for report in found} == {"3"}
    (coordinator,) = {report["flags"]["coordinator"] for report in found}
    host, port = coordinator.split(":")
    assert host == "127.0.0.1" and 15_000 <= int(port) < 30_000
    assert all(report["variables"] == {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"} for report in found)
    assert stdout == "hello from 0\n"
    assert sorted(stderr.splitlines()) == ["[1] hello from 1", "[2] hello from 2"]


def test_the_other_processes_write_to_files_on_request(tmp_path, program):
    logs = tmp_path / "logs"
    status, stdout, stderr = run("local.sh", "-n", "2", "--logs", logs, "--", sys.executable, program, tmp_path, "end")
    assert (status, stdout, stderr) == (0, "hello from 0\n", "")
    assert [path.name for path in logs.iterdir()] == ["process-1.log"]
    assert (logs / "process-1.log").read_text() == "hello from 1\n"


def test_when_one_process_fails_the_others_end_with_all_they_started(tmp_path, program):
    started = time.monotonic()
    status, _, stderr = run("local.sh", "-n", 3, program, tmp_path, "wait")
    assert status == 3 and "process 1 exited with 3" in stderr
    assert time.monotonic() - started < 10
    for report in reports(tmp_path, 3):
        wait_until(lambda report=report: not alive(report["pid"]) and not alive(report["child"]), seconds=5)


def test_the_status_is_that_of_the_process_that_was_lost_not_of_one_that_tells_so(tmp_path, program):
    status, _, stderr = run("local.sh", "-n", 2, program, tmp_path, "lost")
    assert status == 137 and "process 1 exited with 137; ending the others" in stderr


def test_a_process_that_ignores_sigterm_is_killed(tmp_path, program):
    status, _, stderr = run("local.sh", "-n", 2, "--grace=1", program, tmp_path, "stubborn")
    assert status == 3 and "killing 1 processes" in stderr
    assert not any(alive(report["pid"]) for report in reports(tmp_path, 2))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_all_may_save(tmp_path, program, sent):
    process = start("local.sh", "-n", 2, program, tmp_path, "save")
    wait_until(lambda: (tmp_path / "0.json").exists() and (tmp_path / "1.json").exists())
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 143, stderr
    assert stdout == "hello from 0\nsaved\n" and "[1] saved" in stderr
    assert not any(alive(report["pid"]) for report in reports(tmp_path, 2))


def test_dry_run_prints_the_commands_and_starts_nothing(tmp_path, program):
    program = ("python", "launch/train.py", "--config=experiments/tiny.py", "--workdir=my runs")
    lines = dry_run("local.sh", "-n", 2, "--devices=4", "--port=1234", "--dry_run", *program)
    common = "env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python launch/train.py --config=experiments/tiny.py"
    common += " --workdir='my runs' --coordinator=127.0.0.1:1234 --num_processes=2"
    assert lines == [f"{common} --process_id=0 &", f"{common} --process_id=1 &", "wait"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "-n is missing"),
        (("-n", "two", "ls"), "at least 1, is 'two'"),
        (("-n", "0", "ls"), "at least 1, is '0'"),
        (("-n", "2"), "no program to run"),
        (("-n", "2", "no-such-program"), "no-such-program: no such program"),
        (("-n", "2", "--device=4", "ls"), "--device is unknown; flags: --devices"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, message):
    status, stdout, stderr = run("local.sh", *arguments)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ") and message in stderr and len(stderr.splitlines()) == 1
