"""A directory has one writer at a time; whoever comes second is told who is first, and a kill frees it."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from retro_jax.data.stage import Stage
from retro_jax.errors import TemporaryError, UserError
from retro_jax.lock import LOCK, DirectoryLock

HOLDER = """
import sys
from retro_jax.lock import DirectoryLock
lock = DirectoryLock(sys.argv[1], "wait")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A process that holds the directory, and for all that its lock says is on another host of the same name."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    (tmp_path / LOCK).write_text(json.dumps({**json.loads((tmp_path / LOCK).read_text()), "boot": "another"}))
    yield holder
    holder.kill()
    holder.communicate()


def test_the_lock_of_another_host_is_waited_for_and_then_the_way_out_is_told(tmp_path, elsewhere, capsys):
    holder = f"process {elsewhere.pid} on {socket.gethostname()} since "
    with pytest.raises(TemporaryError, match=rf"in use by {holder}.*; ask her; if that host is gone, remove ") as told:
        DirectoryLock(tmp_path, "ask her", patience=0.1)
    assert str(told.value).endswith(f"remove {tmp_path / LOCK}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path} is in use by {holder}") and line.endswith("; waiting for it up to 0.1 s")


def test_a_lock_of_another_host_that_ends_meanwhile_is_taken(tmp_path, elsewhere):
    threading.Timer(0.2, elsewhere.kill).start()
    with DirectoryLock(tmp_path, "wait", patience=60):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_whose_file_was_removed_is_given_up_also_by_its_holder(tmp_path, elsewhere):
    (tmp_path / LOCK).unlink()
    with DirectoryLock(tmp_path, "wait") as first:
        (tmp_path / LOCK).unlink()
        with DirectoryLock(tmp_path, "wait"):
            first.release()
            with pytest.raises(UserError, match=f"process {os.getpid()} on"):
                DirectoryLock(tmp_path, "wait")


def test_the_second_is_told_host_process_and_time_and_a_kill_frees_the_directory(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    line = (
        rf"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since \d{{4}}-\d\d-\d\d .*; ask her"
    )
    with pytest.raises(UserError, match=line):
        DirectoryLock(tmp_path, "ask her")
    holder.kill()
    holder.communicate()
    with DirectoryLock(tmp_path, "wait"), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        DirectoryLock(tmp_path, "wait")
    assert not list(tmp_path.iterdir())
    DirectoryLock(tmp_path, "wait").release()


def test_a_file_left_by_a_kill_or_cut_short_does_not_matter(tmp_path):
    (tmp_path / LOCK).write_text('{"host": ')
    with DirectoryLock(tmp_path, "wait"), pytest.raises(UserError, match="is in use by process"):
        DirectoryLock(tmp_path, "wait")


def test_a_stage_is_written_by_one_process_and_free_again_when_it_is_done(tmp_path):
    plan = {"settings": {"a": 1}, "inputs": {}}
    with Stage(tmp_path / "stage", "corpus", **plan) as stage:
        with stage.shard("one") as (path, _):
            path.write_text("1")
        with pytest.raises(UserError, match="is in use by process"):
            Stage(tmp_path / "stage", "corpus", **plan)
        stage.finish({})
    with Stage(tmp_path / "stage", "corpus", **plan) as stage:
        assert stage.complete
    assert {path.name for path in (tmp_path / "stage").iterdir()} == {"one", "manifest.json"}


def test_a_stage_that_failed_is_free_again(tmp_path):
    plan = {"settings": {"a": 1}, "inputs": {}}
    with pytest.raises(ValueError, match="bad input"), Stage(tmp_path / "stage", "corpus", **plan):
        raise ValueError("bad input")
    with Stage(tmp_path / "stage", "corpus", **plan) as stage, stage.shard("one") as (path, _):
        path.write_text("1")
    with pytest.raises(UserError, match="was made with settings"):
        Stage(tmp_path / "stage", "corpus", settings={"a": 2}, inputs={})
    with Stage(tmp_path / "stage", "corpus", **plan) as stage:
        assert stage.has("one")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        Stage(tmp_path / "other", "corpus", **plan)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]
