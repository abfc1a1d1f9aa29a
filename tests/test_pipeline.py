"""Pipelines of programs: they run in order, go on where they stopped, and know how long everything took."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from retro_jax.errors import UserError
from retro_jax.files import file_sha256
from retro_jax.pipeline import Pipeline

# Writes its name and flags down; --fail=STATUS, --save=FILE: waits for SIGTERM, then writes the file.
PROGRAM = """
import pathlib, signal, sys
flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in sys.argv[1:])
with open(pathlib.Path(__file__).parent / "calls", "a") as calls:
    print(pathlib.Path(__file__).stem, *sys.argv[1:], file=calls)
if "save" in flags:
    def save(*_):
        pathlib.Path(flags["save"]).write_text("saved")
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    pathlib.Path(flags["save"] + ".ready").touch()
    while True:
        signal.pause()
sys.exit(int(flags.get("fail", 0)))
"""
# A pipeline of its own process, of which the second program waits.
PARENT = """
import os, pathlib, signal, sys
from retro_jax import pipeline
work = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
pipeline._SECONDS_BETWEEN_NOTES = 0.05
one = pipeline.Pipeline(work, work, "make it", os.environ)
one.run("first", "first.py")
one.run("second", "second.py", save=work / "state")
"""


@pytest.fixture
def work(tmp_path):
    for name in ("first", "second", "third"):
        (tmp_path / f"{name}.py").write_text(PROGRAM)
    return tmp_path


def pipeline(work) -> Pipeline:
    return Pipeline(work, work, "make it", os.environ)


def records(work) -> dict[str, dict]:
    return {record["stage"]: record for record in json.loads((work / "stages.json").read_text())}


def wait_until(condition, process) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def start_and_wait_in_the_second(work) -> subprocess.Popen:
    """A pipeline whose second program waits, and has waited long enough for its time to be noted."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(work)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until((work / "state.ready").exists, process)
    wait_until(lambda: records(work).get("second", {}).get("seconds", 0) > 0, process)
    return process


def test_programs_run_in_order_with_their_flags_and_the_first_times_stay(work, capfd):
    found = []
    for _ in range(2):
        one = pipeline(work)
        one.run("b", "second.py", normalize=True, force=False, ks=(1, 2), output=work / "x")
        one.run("a", "first.py", config="experiments/demo.py:tiny")
        found.append(one.stages)
    calls = ["second --normalize --noforce --ks=1,2 --output=", f"first --config={work}/experiments/demo.py:tiny"]
    lines = (work / "calls").read_text().splitlines()
    assert len(lines) == 4 and all(line.startswith(call) for line, call in zip(lines, calls * 2, strict=True))
    assert [name for name, _ in found[0]] == ["b", "a"] and all(taken > 0 for _, taken in found[0])
    assert found[0] == found[1]
    assert "$ python first.py --config=experiments/demo.py:tiny\n" in capfd.readouterr().out


def test_a_failure_says_where_and_how_to_go_on_and_its_time_counts(work):
    one = pipeline(work)
    with pytest.raises(UserError, match=r"stopped at 'first try' \(exit status 3\); `make it` goes on from there"):
        one.run("first try", "first.py", fail=3)
    failed = records(work)["first try"]
    assert failed["seconds"] > 0 and not failed["finished"]
    again = pipeline(work)
    again.run("first try", "first.py")
    finished = records(work)["first try"]
    assert (
        finished["finished"] and finished["seconds"] > failed["seconds"] and again.stages[0][1] == finished["seconds"]
    )


def test_the_time_of_a_program_that_is_killed_with_its_pipeline_is_kept(work):
    process = start_and_wait_in_the_second(work)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed = records(work)
    assert killed["first"]["finished"] and not killed["second"]["finished"]
    again = pipeline(work)
    again.run("second", "second.py")
    assert records(work)["second"]["seconds"] > killed["second"]["seconds"] > 0


@pytest.mark.parametrize(
    ("number", "everybody"), [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)]
)
def test_a_program_may_save_when_its_pipeline_is_stopped(work, number, everybody):
    process = start_and_wait_in_the_second(work)
    if everybody:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and (work / "state").read_text() == "saved"
    assert stderr == "stopped at 'second'; `make it` goes on from there\n"
    assert records(work)["second"]["seconds"] > 0 and not records(work)["second"]["finished"]


def test_what_made_the_results_is_told(work):
    (work / "text").write_text("text")
    one = pipeline(work)
    one.run("first", "first.py", output=work / "x")
    one.run("again", "first.py")
    told = pipeline(work)
    told.run("first", "first.py", output=work / "x")
    provenance = told.provenance(text={"the text": work / "text"}, seeds={"order": 7})
    assert provenance["text"] == {"the text": file_sha256(work / "text")} and provenance["seeds"] == {"order": 7}
    assert provenance["command"] == "make it" and provenance["commits"] == ["unknown"]
    (machine,) = provenance["machines"]
    assert f"{os.cpu_count()} cores" in machine and "GiB" in machine
    assert {"jax", "flax", "numpy"} <= provenance["packages"].keys()
    (stage,) = provenance["stages"]  # not those that an earlier start had alone
    assert stage["command"] == "python first.py --output=x" and stage["seconds"] == one.stages[0][1]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_told_and_whether_the_files_are_its_own(work):
    def git(*arguments):
        subprocess.run(["git", "-C", str(work), "-c", "user.name=a", "-c", "user.email=b", *arguments], check=True)

    git("init", "-q")
    git("add", "first.py")
    git("commit", "-qm", "programs")
    pipeline(work).run("clean", "first.py")
    commit = records(work)["clean"]["commit"]
    assert len(commit) == 40
    with open(work / "first.py", "a") as file:
        file.write("\n")
    pipeline(work).run("changed", "first.py")
    assert records(work)["changed"]["commit"] == f"{commit}-dirty"
    pipeline(work).run("clean", "first.py")
    assert records(work)["clean"]["commit"] == commit
