"""A run in several processes is the run in one: batches, losses, checkpoints, figures. It outlives a lost process."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from processes import finish, free_port, start, succeeded
from small_run import ROOT, program, run_program

from retro_jax.data.batches import Batches
from retro_jax.data.sequences import SequenceSource
from retro_jax.training.metrics import read_metrics

STEPS, SAVES = 30, 10
TRAIN = "launch/train.py"
STOP_SECONDS = 30  # within which the others of a lost process end
BATCH = 4
WHOLE = ("--config.mesh.data=4", "--config.mesh.fsdp=1")  # another mesh, with fewer collectives for four to wait in

# launch/train.py that writes a line for each example that goes to this process's devices: its number in the order of
# the run, and a digest of its tokens.
RECORDER = f"""
import hashlib, os, runpy
from retro_jax.training import loop

iterate, to_devices = loop.Batches.iterate, loop.to_devices
done = 0

def iterated(batches, first):
    global done
    done = first
    return iterate(batches, first)

def recorded(arrays, rows, batch_size, *rest):
    global done
    with open(os.path.join(os.environ["RECORDS"], str(os.getpid())), "a") as file:
        for row, tokens in zip(rows, arrays["tokens"], strict=True):
            print(done + row, hashlib.sha256(tokens.tobytes()).hexdigest(), file=file)
    done += batch_size
    return to_devices(arrays, rows, batch_size, *rest)

loop.Batches.iterate, loop.to_devices = iterated, recorded
runpy.run_path({str(ROOT / TRAIN)!r}, run_name="__main__")
"""


def flags(small_data, workdir, steps=STEPS, saves=SAVES, recipe=None):
    return [
        f"--config={recipe or small_data.recipe}",
        f"--workdir={workdir}",
        f"--config.steps={steps}",
        f"--config.checkpoint.every_steps={saves}",
    ]


def losses(workdir):
    """Loss by step; each step must stand there once, with the examples that it has to end at."""
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["examples_seen"] for line in lines] == [BATCH * line["step"] for line in lines]
    return [line["loss"] for line in lines]


def wait_for_step(workdir, step, processes):
    """Until the run has written the metrics of a step."""
    deadline = time.monotonic() + 240
    while not any(line["step"] >= step for line in read_metrics(workdir)):
        ended = [process for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, [process.communicate() for process in ended]
        time.sleep(0.02)


def kill(processes, victim):
    """SIGKILL to one; the others must end with one line that names it, and soon."""
    processes[victim].kill()
    killed = time.monotonic()
    ends = finish(processes, timeout=STOP_SECONDS)
    assert time.monotonic() - killed < STOP_SECONDS
    for process, (status, _, stderr) in enumerate(ends):
        if process == victim:
            assert status == -signal.SIGKILL
            continue
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert status == os.EX_TEMPFAIL and len(errors) == 1, stderr
        assert f"error: process {victim} ({socket.gethostname()}) has stopped or cannot be reached" in errors[0]
        assert "Traceback" not in stderr and "Check failure" not in stderr, stderr


@pytest.fixture(scope="module")
def alone(small_data, tmp_path_factory):
    """Workdir of the run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    succeeded([program(TRAIN, *flags(small_data, workdir), devices=4)])
    return workdir


@pytest.fixture(scope="module")
def two(small_data, tmp_path_factory):
    """Workdir of the run in two processes with two devices each, and what they printed, by launch/local.sh."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    command = [str(ROOT / "launch/local.sh"), "-n", "2", "--devices=2", TRAIN, *flags(small_data, workdir)]
    variables = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=400, check=False)
    assert result.returncode == 0, result.stderr
    return workdir, result


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    """The training program that records, with a folder for each number of processes."""
    path = tmp_path_factory.mktemp("recorder") / "train.py"
    path.write_text(RECORDER)
    for count in (1, 2, 4):
        (path.parent / str(count)).mkdir()
    return path


@pytest.fixture(scope="module")
def interrupted(small_data, recorder, tmp_path_factory):
    """Workdir of the run in four processes, on another mesh, whose first one, the coordinator, was killed."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    records = str(recorder.parent / "4")
    processes = start(4, str(recorder), *flags(small_data, workdir), *WHOLE, RECORDS=records)
    wait_for_step(workdir, SAVES + 2, processes)
    kill(processes, 0)
    return workdir


@pytest.fixture(scope="module")
def shrunk(small_data, recorder, interrupted, tmp_path_factory):
    """Workdir of the run that went on in two processes, lost one, and went on in one, which takes micro-batches."""
    workdir = shutil.copytree(interrupted, tmp_path_factory.mktemp("shrunk") / "run")
    records = str(recorder.parent / "2")
    processes = start(2, str(recorder), *flags(small_data, workdir), devices=2, RECORDS=records)
    wait_for_step(workdir, 2 * SAVES + 2, processes)
    kill(processes, 1)
    records = str(recorder.parent / "1")
    alone = (*flags(small_data, workdir), "--config.microbatches=2")
    status, stdout, stderr = run_program(str(recorder), *alone, devices=2, RECORDS=records)
    assert status == 0, stderr
    assert f"from step {2 * SAVES} to {STEPS}" in stdout
    return workdir


def test_batches_and_losses_are_those_of_one_process(alone, two):
    expected = losses(alone)
    assert len(expected) == STEPS and expected[-1] < expected[0]
    assert losses(two[0]) == pytest.approx(expected, rel=1e-5)


def test_one_process_writes_and_prints(alone, two):
    workdir, result = two
    assert f"step {STEPS}: loss" in result.stdout and f"training: {STEPS}/{STEPS} steps" in result.stderr
    others = [line.removeprefix("[1] ") for line in result.stderr.splitlines() if line.startswith("[1] ")]
    assert [line for line in others if line.strip() and "peer ranks" not in line] == []  # Gloo's own, from C++
    names = {path.name for path in workdir.iterdir()}
    assert names == {path.name for path in alone.iterdir()}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"20", "30"}


@pytest.fixture(scope="module")
def evaluation(small_data, two, tmp_path_factory):
    """(function from a name to a command that evaluates the run, function from that name to its result)."""
    directory = tmp_path_factory.mktemp("evaluation")

    def command(name):
        return (
            "launch/evaluate.py",
            f"--workdir={two[0]}",
            f"--corpus={small_data.corpus}",
            f"--neighbours={small_data.neighbours}",
            f"--database={small_data.database}",
            f"--output={directory / name}",
            "--modes=on",
            "--batch_size=64",
        )

    return command, lambda name: json.loads((directory / name).read_text())["results"][0]


@pytest.fixture(scope="module")
def evaluated(evaluation):
    """What one process with four devices finds."""
    command, result = evaluation
    _, stdout, _ = succeeded([program(*command("1"), devices=4)])[0]
    assert "bits/byte" in stdout
    return result("1")


def assert_same_figures(ends, found, expected):
    (_, first, _), *others = ends
    assert "bits/byte" in first
    assert all("bits/byte" not in output and "windows" not in output for _, *texts in others for output in texts)
    assert found["nats"] == pytest.approx(expected["nats"], rel=1e-6)
    sums = ("nats", "groups", "bits_per_byte", "nats_per_token")
    assert found | dict.fromkeys(sums) == expected | dict.fromkeys(sums)


def test_evaluation_gives_the_same_figures_in_two_processes(evaluation, evaluated):
    command, result = evaluation
    ends = succeeded(start(2, *command("2"), devices=2))
    assert_same_figures(ends, result("2"), evaluated)


@pytest.mark.slow  # in two above
def test_evaluation_gives_the_same_figures_in_four_processes_of_slurm(evaluation, evaluated):
    command, result = evaluation
    slurm = {
        "SLURM_JOB_ID": str(free_slurm_job()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "0",
    }
    ends = succeeded([program(*command("4"), **slurm, SLURM_PROCID=str(process)) for process in range(4)])
    assert_same_figures(ends, result("4"), evaluated)


def free_slurm_job():
    """A job number for which JAX's rule, 61440 + number % 4096, gives a free port."""
    while True:
        job = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 61_440 + job % 4096))
                return job
            except OSError:
                continue


@pytest.mark.slow  # it goes on in two and in one below
def test_a_run_that_lost_its_coordinator_goes_on_in_four_processes(small_data, alone, interrupted, tmp_path):
    workdir = shutil.copytree(interrupted, tmp_path / "run")
    ends = succeeded(start(4, TRAIN, *flags(small_data, workdir), *WHOLE))
    assert f"from step {SAVES} to {STEPS}" in ends[0][1]
    assert losses(workdir) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow  # the loss of a process is in test_roll_call.py too
def test_it_goes_on_in_two_processes_loses_one_and_goes_on_in_one(alone, shrunk):
    assert losses(shrunk) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow  # of the same runs
def test_each_example_is_trained_on_once_by_one_process_whatever_their_number(small_data, recorder, shrunk):
    order = Batches([SequenceSource(small_data.sequences)], batch_size=BATCH, seed=0)
    expected = [
        (example, hashlib.sha256(tokens.tobytes()).hexdigest())
        for example, tokens in enumerate(order.examples(0, STEPS * BATCH)["tokens"])
    ]
    counted = []
    for count, first, last in ((4, 0, SAVES), (2, SAVES, 2 * SAVES), (1, 2 * SAVES, STEPS)):
        files = list((recorder.parent / str(count)).iterdir())
        assert len(files) == count
        for path in files:
            lines = [line.split() for line in path.read_text().splitlines()]
            read = [(int(example), digest) for example, digest in lines]
            assert read[0][0] // BATCH == first
            # Behind the checkpoint that the next start went on from, they did not count.
            counted += [(example, digest) for example, digest in read if example < last * BATCH]
    assert sorted(counted) == expected


@pytest.mark.slow  # one process, killed, is held to the same bits in test_train_program.py
def test_a_run_killed_and_started_again_in_two_processes_has_the_same_bits(small_data, two, tmp_path):
    workdir = tmp_path / "run"
    processes = start(2, TRAIN, *flags(small_data, workdir), devices=2)
    wait_for_step(workdir, SAVES + 2, processes)
    kill(processes, 1)
    assert len(losses(workdir)) < STEPS
    ends = succeeded(start(2, TRAIN, *flags(small_data, workdir), devices=2))
    assert f"from step {SAVES} to {STEPS}" in ends[0][1]
    assert losses(workdir) == losses(two[0])


def test_sigterm_to_one_process_saves_the_same_step_in_all(small_data, tmp_path):
    workdir = tmp_path / "run"
    recipe = small_data.baseline_recipe
    processes = start(2, TRAIN, *flags(small_data, workdir, steps=100_000, saves=100_000, recipe=recipe))
    wait_for_step(workdir, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = finish(processes)
    assert [status for status, _, _ in ends] == [143, 143], ends
    (saved,) = (path.name for path in (workdir / "checkpoints").iterdir())
    assert f"stopped by SIGTERM after step {saved}, saved" in ends[0][2]
    assert len(losses(workdir)) == int(saved)


def test_a_mistake_that_one_process_finds_ends_all(small_data, tmp_path):
    """The workdir is another run's, which process 0 alone looks at."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("not ours")
    ends = finish(start(2, TRAIN, *flags(small_data, tmp_path / "run")), timeout=120)
    assert [status for status, _, _ in ends] == [1, 1]
    mistake = f"{tmp_path / 'run'} is not empty and holds no run; give another --workdir"
    assert f"error: {mistake}\n" in ends[0][2]
    assert f"error: process 0 ({socket.gethostname()}) failed: {mistake}; this process ends as well\n" in ends[1][2]
