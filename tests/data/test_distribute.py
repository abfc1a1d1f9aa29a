import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from number_shards import build_numbers, write_numbers

from retro_jax.data import distribute as distribute_module
from retro_jax.data.distribute import BeamOptions
from retro_jax.data.stage import ShardWriter, Stage, shard_name
from retro_jax.errors import UserError
from retro_jax.progress import Progress

HERE = BeamOptions()
TWO = BeamOptions(workers=2)


def tree(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(directory).rglob("*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "numbers"
    build_numbers(directory, 5)
    return tree(directory)


@pytest.mark.parametrize("options", [HERE, TWO], ids=["here", "two processes"])
def test_pipeline_writes_every_shard_and_nothing_else(tmp_path, whole, options):
    manifest = build_numbers(tmp_path / "out", 5, options)
    assert tree(tmp_path / "out") == whole
    assert len(whole) == 11 and manifest.counts == {"rows": 1000}


def test_several_processes_share_the_units(tmp_path):
    (tmp_path / "log").mkdir()
    build_numbers(tmp_path / "out", 6, TWO, log=str(tmp_path / "log"))
    processes = [path.name.split(".")[1] for path in (tmp_path / "log").iterdir()]
    assert len(processes) == 6 and len(set(processes)) == 2 and str(os.getpid()) not in processes


@pytest.mark.parametrize(("options", "parts"), [(HERE, [50, 150] * 2), (TWO, [200] * 2)], ids=["here", "two processes"])
def test_progress_counts_parts_of_units_and_what_was_there_before(tmp_path, capsys, monkeypatch, options, parts):
    begun, told = [], []

    class Recorded(Progress):
        def __init__(self, description, *, total, unit, initial=0):
            begun.append((initial, total))
            super().__init__(description, total=total, unit=unit, initial=initial)

        def update(self, count):
            told.append(count)
            super().update(count)

    with Stage(tmp_path / "out", "numbers", settings={"count": 4}, inputs={}):
        for i in range(2):
            names = [shard_name(stem, i, 4, ".txt") for stem in ("numbers", "squares")]
            write_numbers(ShardWriter(tmp_path / "out"), {"index": i, "names": names})
    monkeypatch.setattr(distribute_module, "Progress", Recorded)
    build_numbers(tmp_path / "out", 4, options)
    assert begun == [(400, 800)] and told == parts
    assert "numbers: 800/800 rows" in capsys.readouterr().err


def test_a_unit_that_is_done_twice_at_a_time_is_done(tmp_path, whole):
    build_numbers(tmp_path / "out", 5, trouble={1: "twice", 3: "twice"})
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("options", [HERE, TWO], ids=["here", "two processes"])
@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        ("user", UserError, "^unit 1 has bad input$"),
        ("disk", OSError, "No space left on device: '/some/file'"),
        ("defect", RuntimeError, "ZeroDivisionError: a defect"),
        ("other_disk", UserError, "write to a file system that this machine sees"),
    ],
)
def test_trouble_in_a_worker_is_told_and_what_is_finished_stays(tmp_path, whole, options, trouble, error, message):
    with pytest.raises(error, match=message):
        build_numbers(tmp_path / "out", 5, options, trouble={1: trouble})
    assert not list(tmp_path.glob("out/.tmp*"))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("squares*.txt")}
    build_numbers(tmp_path / "out", 5)
    assert tree(tmp_path / "out") == whole
    for name, changed in kept.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == changed


def test_one_failing_unit_is_told_without_a_pipeline_as_well(tmp_path):
    with pytest.raises(UserError, match="unit 0 has bad input"):
        build_numbers(tmp_path / "out", 1, trouble={0: "user"})


@pytest.mark.parametrize("units", [1, 3])
def test_interrupt_in_this_process_is_an_interrupt(tmp_path, units):
    with pytest.raises(KeyboardInterrupt):
        build_numbers(tmp_path / "out", units, trouble={0: "interrupted"})


def test_killed_worker_process_ends_the_run_with_a_message(tmp_path, whole):
    with pytest.raises(UserError, match=r"a worker process was killed .* run the same command again"):
        build_numbers(tmp_path / "out", 5, TWO, trouble={2: "killed"})
    build_numbers(tmp_path / "out", 5)
    assert tree(tmp_path / "out") == whole


def test_worker_of_a_run_that_is_over_commits_nothing(tmp_path):
    (tmp_path / ".tmp-run-1").touch()
    writer = ShardWriter(tmp_path, run=".tmp-run-1")
    with writer.shard("early.txt") as (path, _):
        path.write_text("written in time")
    with pytest.raises(UserError, match="is over"), writer.shard("late.txt") as (path, _):
        path.write_text("written too late")
        (tmp_path / ".tmp-run-1").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["early.txt", "early.txt.done.json"]


def test_unit_with_one_of_its_shards_is_done_again_from_its_beginning(tmp_path, whole):
    with pytest.raises(UserError):
        build_numbers(tmp_path / "out", 5, trouble={i: "user" for i in range(1, 5)})
    half = [path for path in (tmp_path / "out").glob("numbers-*.txt") if "00000" not in path.name]
    assert half
    for path in half:
        path.write_text("0\n" * 100)  # as another build would have left it
    build_numbers(tmp_path / "out", 5)
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": 0}, "at least 1"),
        ({"workers": 2, "runner": "FlinkRunner"}, "among Beam's own options"),
        *(
            ({"runner": name}, "use --runner=local")
            for name in ("DirectRunner", "direct", "directrunner", "Prism", "apache_beam.runners.direct.DirectRunner")
        ),
    ],
)
def test_options_that_cannot_be_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        BeamOptions(**values)


def test_unknown_runner_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="NoRunner"):
        build_numbers(tmp_path / "out", 2, BeamOptions(runner="NoRunner"))
    assert not (tmp_path / "out").exists()


def test_runner_that_is_not_to_be_reached_is_told_in_one_line(tmp_path):
    flags = (f"--job_endpoint=localhost:{free_port()}", "--job_server_timeout=1", "--environment_type=LOOPBACK")
    with pytest.raises(UserError, match=r"PortableRunner failed \(.*finished shards are kept") as raised:
        build_numbers(tmp_path / "out", 2, BeamOptions(runner="PortableRunner", beam=flags))
    assert "\n" not in str(raised.value)


def test_workers_and_runner_end_with_their_coordinator(tmp_path):
    """SIGKILL of the coordinator leaves no process behind that could go on writing."""
    (tmp_path / "log").mkdir()
    code = (
        "from number_shards import build_numbers; from retro_jax.data.distribute import BeamOptions; "
        f"build_numbers({str(tmp_path / 'out')!r}, 4, BeamOptions(workers=2), "
        f"log={str(tmp_path / 'log')!r}, seconds=60)"
    )
    coordinator = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "log").iterdir())) < 2:
        assert coordinator.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    coordinator.send_signal(signal.SIGKILL)
    coordinator.wait()
    workers = [int(path.name.split(".")[1]) for path in (tmp_path / "log").iterdir()]
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process):
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_portable_job_service_and_worker_pool_write_the_same_bytes(tmp_path, whole):
    """Beam's Python job service and worker pool on loopback: staging, pickling and workers of another process."""
    pool_port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the pool starts `python`
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    port_file = tmp_path / "port"
    log = open(tmp_path / "log", "wb")  # noqa: SIM115  closed below
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *module], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        for module in (
            ["apache_beam.runners.portability.local_job_service_main", f"--port_file={port_file}"],
            ["apache_beam.runners.worker.worker_pool_main", f"--service_port={pool_port}"],
        )
    ]
    try:
        deadline = time.monotonic() + 60
        while not (port_file.exists() and answers(pool_port)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        options = BeamOptions(
            runner="PortableRunner",
            beam=(
                f"--job_endpoint=localhost:{port_file.read_text()}",
                "--environment_type=EXTERNAL",
                f"--environment_config=localhost:{pool_port}",
            ),
        )
        build_numbers(tmp_path / "out", 5, options)
        assert tree(tmp_path / "out") == whole
        with pytest.raises(UserError, match="unit 1 has bad input"):
            build_numbers(tmp_path / "bad", 5, options, trouble={1: "user"})
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
