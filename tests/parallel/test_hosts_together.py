"""What several processes do together, without a model: agree, wait for each other, share rows."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from processes import finish, free_port
from small_run import ROOT

PROGRAM = """
import ctypes, json, threading, time
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from retro_jax import program
from retro_jax.parallel import hosts

program.define_cluster_flags()

def main():
    program.start_cluster()
    process = jax.process_index()
    found = {"primary": hosts.is_primary()}
    by_process = np.array(jax.devices()).reshape(2, 2)
    for name, devices in (("apart", by_process), ("shared", by_process.T)):
        sharding = NamedSharding(Mesh(devices, ("rows", "model"), axis_types=(AxisType.Auto,) * 2), P("rows"))
        rows = hosts.batch_rows(sharding, 6)
        batch = 10 * np.array(rows)[:, None] + np.arange(3)
        array = hosts.to_global({"tokens": batch}, rows, 6, sharding)["tokens"]
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, P()))(array)
        found[name] = [rows, np.asarray(whole).tolist()]
    found["agreed"] = [hosts.agree(value + process, name) for value, name in ((100, "a"), (200, "b"), (300, "a"))]
    found["stopped"] = 1
    while not hosts.should_stop(process == 1 and found["stopped"] >= 5):
        time.sleep(0.01)
        found["stopped"] += 1
    hosts.barrier("both")
    if process == 1:
        time.sleep(1.5)
    found["came"] = time.time()
    hosts.barrier("both")
    found["passed"] = time.time()
    print(json.dumps(found), flush=True)
    if process == 0:
        hosts.barrier("late", 0.5)
    # Gloo may abort when a process is lost; the line must come all the same.
    threading.Thread(target=ctypes.CDLL(None).abort).start()
    array.sum().block_until_ready()  # process 0 does not come

program.run(main)
"""

TALKATIVE = """
import jax
from retro_jax import program
from retro_jax.parallel import hosts

program.define_cluster_flags()

def main():
    program.start_cluster()
    while jax.process_index() == 0:
        print("y" * 100, flush=True)
    hosts.barrier("never")

program.run(main)
"""


def start(script):
    """Two processes with two devices each."""
    place = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *place, f"--process_id={process}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", "http_proxy": "http://127.0.0.1:9"},  # nobody is there
        )
        for process in range(2)
    ]


@pytest.fixture(scope="module")
def ends():
    """Exit status, findings and stderr of the two; the second comes late at the end."""
    return [
        (status, next(json.loads(line) for line in stdout.splitlines() if line.startswith("{")), stderr)
        for status, stdout, stderr in finish(start(PROGRAM), timeout=120)
    ]


def test_one_process_is_the_first(ends):
    assert [found["primary"] for _, found, _ in ends] == [True, False]


def test_each_process_reads_the_rows_of_its_devices(ends):
    assert [found["apart"][0] for _, found, _ in ends] == [[0, 1, 2], [3, 4, 5]]
    assert [found["shared"][0] for _, found, _ in ends] == [list(range(6))] * 2
    for _, found, _ in ends:
        for name in ("apart", "shared"):
            assert found[name][1] == [[10 * row, 10 * row + 1, 10 * row + 2] for row in range(6)]


def test_the_first_process_decides(ends):
    assert [found["agreed"] for _, found, _ in ends] == [[100, 200, 300]] * 2


def test_a_request_of_one_process_stops_all_after_the_same_step(ends):
    first, second = (found["stopped"] for _, found, _ in ends)
    assert first == second > 5


def test_none_passes_a_barrier_before_all_have_come(ends):
    came, passed = ([found[name] for _, found, _ in ends] for name in ("came", "passed"))
    assert min(passed) >= max(came) > min(came) + 1


def test_who_does_not_come_is_named_and_all_end(ends):
    host = socket.gethostname()
    late = f"late: process 1 ({host}) did not come within 0.5 s"
    assert ends[0][0] == ends[1][0] == os.EX_TEMPFAIL
    assert f"error: {late}\n" in ends[0][2]
    assert f"error: process 0 ({host}) failed: {late}; this process ends as well\n" in ends[1][2]


def test_a_reader_that_goes_away_ends_all():
    first, second = start(TALKATIVE)
    assert first.stdout.readline() == "y" * 100 + "\n"
    first.stdout.close()
    try:
        assert first.wait(timeout=60) == 128 + signal.SIGPIPE
        _, stderr = second.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()
    assert first.stderr.read() == ""
    assert second.returncode == 1
    reason = f"process 0 ({socket.gethostname()}) failed: nobody reads its output any more"
    assert stderr.endswith(f"error: {reason}; this process ends as well\n")
