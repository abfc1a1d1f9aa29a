"""launch/train.py as a user runs it: resumes exactly, stops cleanly, names mistakes."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from small_run import error_line, program, run_program

from retro_jax.lock import DirectoryLock
from retro_jax.training.metrics import read_metrics


def flags(recipe, workdir, *more):
    return [f"--config={recipe}", f"--workdir={workdir}", *more]


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir)}


def test_a_run_leaves_metrics_config_tokenizer_and_checkpoints(finished_run):
    assert sorted(losses(finished_run)) == list(range(1, 41))
    assert all(np.isfinite(list(losses(finished_run).values())))
    line = read_metrics(finished_run)[-1]
    assert line["examples_seen"] == 160 and line["data_wait_seconds"] >= 0 and line["tokens_per_second"] > 0
    assert json.loads((finished_run / "config.json").read_text())["data"]["length"] == 32
    assert {path.name for path in finished_run.iterdir()} == {
        "checkpoints",
        "config.json",
        "goodput.jsonl",
        "metrics.jsonl",
        "shardings.txt",
        "tensorboard",
        "tokenizer.model",
    }
    assert {path.name for path in (finished_run / "checkpoints").iterdir()} == {"30", "40"}


def test_a_finished_run_started_again_changes_nothing(finished_run, small_data):
    before = (finished_run / "metrics.jsonl").read_text()
    status, _, stderr = run_program("launch/train.py", *flags(small_data.recipe, finished_run))
    assert status == 0, stderr
    assert (finished_run / "metrics.jsonl").read_text() == before


@pytest.mark.slow  # on one device below, on eight in test_loop.py
def test_a_killed_run_on_eight_devices_goes_on_bit_for_bit(small_data, tmp_path):
    more = ["--config.mesh.data=2", "--config.mesh.tensor=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, stderr = run_program("launch/train.py", *flags(small_data.recipe, whole, *more), devices=8)
    assert status == 0, stderr
    process = program("launch/train.py", *flags(small_data.recipe, killed, *more), devices=8)
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / "10").is_dir():  # steps are faster than the save behind them
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    status, stdout, stderr = run_program("launch/train.py", *flags(small_data.recipe, killed, *more), devices=8)
    assert status == 0, stderr
    assert "from step" in stdout and losses(killed) == losses(whole)


SLOW = pytest.mark.slow  # more moments of the same


@pytest.mark.parametrize("kill_after_step", [pytest.param(1, marks=SLOW), 15, pytest.param(25, marks=SLOW)])
def test_a_killed_run_goes_on_bit_for_bit(finished_run, small_data, tmp_path, kill_after_step):
    workdir = tmp_path / "killed"
    process = program("launch/train.py", *flags(small_data.recipe, workdir))
    wait_for_step(process, workdir, kill_after_step)
    process.kill()
    process.communicate()
    assert losses(workdir).keys() != losses(finished_run).keys()
    status, _, stderr = run_program("launch/train.py", *flags(small_data.recipe, workdir))
    assert status == 0, stderr
    assert losses(workdir) == losses(finished_run)


@pytest.mark.parametrize("sight", [pytest.param("10.*tmp*", marks=SLOW), "30.*tmp*/params/d"])
def test_a_run_killed_while_saving_goes_on_bit_for_bit(finished_run, small_data, tmp_path, sight):
    workdir = tmp_path / "saving"
    process = program("launch/train.py", *flags(small_data.recipe, workdir))
    deadline = time.monotonic() + 200
    saved = workdir / "checkpoints" / sight.split(".")[0]
    while not (list((workdir / "checkpoints").glob(sight)) or saved.is_dir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0002)
    process.kill()
    process.communicate()
    status, _, stderr = run_program("launch/train.py", *flags(small_data.recipe, workdir))
    assert status == 0, stderr
    assert losses(workdir) == losses(finished_run)
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_sigterm_saves_first_and_the_same_command_goes_on(finished_run, small_data, tmp_path):
    workdir = tmp_path / "terminated"
    process = program("launch/train.py", *flags(small_data.recipe, workdir))
    wait_for_step(process, workdir, 1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    stopped = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"stopped by SIGTERM after step {stopped}, saved" in stderr
    status, _, stderr = run_program("launch/train.py", *flags(small_data.recipe, workdir))
    assert status == 0, stderr
    assert losses(workdir) == losses(finished_run)


@pytest.mark.slow  # so does the loop in test_loop.py
def test_another_mesh_goes_on_with_equal_losses(finished_run, small_data, tmp_path):
    workdir = tmp_path / "elastic"
    shutil.copytree(finished_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")
    status, stdout, stderr = run_program(
        "launch/train.py", *flags(small_data.recipe, workdir, "--config.mesh.tensor=2"), devices=8
    )
    assert status == 0, stderr
    assert "from step 30" in stdout
    for step, loss in losses(finished_run).items():
        assert losses(workdir)[step] == pytest.approx(loss, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_step_checkpoint_and_batch(small_data, tmp_path):
    line = error_line(
        "launch/train.py",
        *flags(
            small_data.recipe,
            tmp_path / "nan",
            "--config.optimizer.peak_learning_rate=1e30",
            "--config.optimizer.warmup_steps=6",
            "--config.optimizer.clip_norm=0.0",
            "--config.checkpoint.every_steps=1",
        ),
    )
    assert "loss nan" in line or "loss inf" in line
    assert "last good checkpoint: step" in line and "examples" in line and f"records {small_data.sequences}:" in line
    good = int(line.split("last good checkpoint: step ")[1].split(";")[0])
    assert (tmp_path / "nan" / "checkpoints" / str(good)).is_dir()
    assert good == int(line.split("error: step ")[1].split(":")[0]) - 1


def test_mistakes_are_named_in_one_line(finished_run, small_data, tmp_path):
    def mistake(*more, workdir=tmp_path / "new", recipe=small_data.recipe):
        return error_line("launch/train.py", *flags(recipe, workdir, *more))

    assert "widht" in (line := mistake("--config.model.widht=8")) and "width" in line
    assert "Did you mean: workdir" in mistake("--wrkdir=x")
    assert "abc" in mistake("--config.steps=abc")
    assert "nowhere.py" in mistake(recipe=tmp_path / "nowhere.py")
    assert "no such directory" in mistake(f"--config.data.sequences={tmp_path / 'nowhere'}")
    assert "model.vocab_size is 100" in mistake("--config.model.vocab_size=100")
    for window in ("3", "0:5"):
        assert f"--profile={window}: expected FIRST:COUNT" in mistake(f"--profile={window}")
    assert "batch_size 3 is not a multiple" in error_line(
        "launch/train.py", *flags(small_data.recipe, tmp_path / "new", "--config.batch_size=3"), devices=2
    )
    assert "belongs to a run with optimizer.peak_learning_rate = 0.01 (now 0.5)" in mistake(
        "--config.optimizer.peak_learning_rate=0.5", workdir=finished_run
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    assert "is not empty and holds no run" in mistake(workdir=tmp_path / "other")
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_one_line_in_training_and_evaluation(finished_run, small_data, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    for path in (workdir / "checkpoints" / "40" / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:-100])
    status, _, line = run_program("launch/train.py", *flags(small_data.recipe, workdir))
    assert status == 1 and line.count("\n") == 1, line
    assert f"error: {workdir / 'checkpoints' / '40'}: damaged checkpoint (" in line
    assert line.endswith("; --resume_from=30 takes the one before it\n")
    evaluate = [f"--workdir={workdir}", f"--corpus={small_data.corpus}", "--modes=off"]
    line = error_line("launch/evaluate.py", *evaluate)
    assert "40: damaged checkpoint (" in line and line.endswith("; --step=30 takes the one before it")
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["ffw_width"] = 48
    (workdir / "config.json").write_text(json.dumps(config))
    line = error_line("launch/evaluate.py", *evaluate, "--step=30")
    assert "30: checkpoint of another configuration; it has params." in line and "48]" in line and "32]" in line


def test_a_workdir_in_use_is_named_before_anything_is_changed(finished_run, small_data, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    with DirectoryLock(workdir, "wait"):
        line = error_line("launch/train.py", *flags(small_data.recipe, workdir, "--config.log_every=7"))
    assert f"{workdir} is in use by process {os.getpid()} on " in line and "another --workdir" in line
    assert json.loads((workdir / "config.json").read_text())["log_every"] == 1


@pytest.mark.slow  # three runs
def test_a_corrupt_compilation_cache_never_breaks_a_run(small_data, tmp_path):
    def run(name):
        more = ["--config.steps=3", f"--compilation_cache={tmp_path / 'cache'}"]
        status, _, stderr = run_program("launch/train.py", *flags(small_data.baseline_recipe, tmp_path / name, *more))
        assert status == 0 and "Traceback" not in stderr, stderr
        return losses(tmp_path / name)

    whole = run("whole")
    files = [path for path in (tmp_path / "cache").iterdir() if path.name.endswith("-cache")]
    assert files
    for number, path in enumerate(files):
        content = path.read_bytes()
        path.write_bytes([b"", content[: len(content) // 2], b"no program"][number % 3])
    assert run("corrupt") == whole
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where a directory was expected")
    assert run("no directory") == whole


def test_a_corrupt_record_is_named(small_data, tmp_path):
    shutil.copytree(small_data.sequences, tmp_path / "sequences")
    (shard,) = (tmp_path / "sequences").glob("*.tfrecord")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    line = error_line(
        "launch/train.py",
        *flags(small_data.recipe, tmp_path / "run", f"--config.data.sequences={tmp_path / 'sequences'}"),
    )
    assert shard.name in line


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 200
    while max(losses(workdir), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
