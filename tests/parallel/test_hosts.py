"""Start-up that says what is missing, and rows of a batch by the sharding; real processes are in tests/launch."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.errors import TemporaryError, UserError
from retro_jax.parallel import hosts
from retro_jax.parallel.hosts import Cluster

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "nowhere[003-006].invalid",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables, also for JAX's own detection, and gives them."""

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return variables

    return put


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster("a:1"), "--num_processes and --process_id missing: --coordinator given, and no TPU pod, SLURM or"),
        (Cluster("a:1", 2), "--process_id missing: --coordinator and --num_processes given"),
        (Cluster(num_processes=2), "--coordinator and --process_id missing: --num_processes given"),
        (Cluster(num_processes=2, process_id=1), "--coordinator missing: --num_processes and --process_id given"),
        (Cluster("a:1", 2, 2), "--process_id is 2; with --num_processes=2 it is 0 to 1"),
        (Cluster("a:1", 0, 0), "--num_processes must be at least 1, is 0"),
        (Cluster("a", 2, 0), "--coordinator is HOST:PORT, as in 10.0.0.1:8476, not 'a'"),
        (Cluster("a:b", 2, 0), "--coordinator is HOST:PORT, as in 10.0.0.1:8476, not 'a:b'"),
        (Cluster("a:70000", 2, 0), "--coordinator is HOST:PORT, as in 10.0.0.1:8476, not 'a:70000'"),
        (Cluster("127.0.0.1:1", 2, 1, 1), "the coordinator, process 0, cannot be reached at 127.0.0.1:1 within 1 s"),
    ],
)
def test_a_flag_that_is_missing_or_wrong_is_named(cluster, message):
    with pytest.raises(UserError, match=re.escape(message)):
        hosts.start(cluster, {})


def test_a_coordinator_from_the_environment_needs_the_rest(environment):
    variables = environment(JAX_COORDINATOR_ADDRESS="10.0.0.1:8476")
    with pytest.raises(UserError, match="--num_processes and --process_id missing: JAX_COORDINATOR_ADDRESS given"):
        hosts.start(Cluster(), variables)


def test_slurm_tells_where_process_0_is(environment):
    message = re.escape("process 2: the coordinator, process 0, cannot be reached at nowhere003:61517 within 1 s")
    with pytest.raises(TemporaryError, match=message):
        hosts.start(Cluster(timeout_seconds=1), environment(**SLURM))


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_PROCID"])
def test_a_slurm_job_without_srun_is_no_run_of_one_process(environment, missing):
    variables = environment(**{name: value for name, value in SLURM.items() if name != missing})
    with pytest.raises(UserError, match=f"SLURM_NTASKS is 4, but {missing} missing: start the program with srun"):
        hosts.start(Cluster(), variables)
    hosts.start(Cluster(num_processes=1), variables)  # asked for
    assert not hosts.is_one_of_several()


def test_flags_go_before_what_the_cluster_tells(environment):
    message = "process 1: the coordinator, process 0, cannot be reached at 127.0.0.1:1 within 1 s"
    with pytest.raises(UserError, match=re.escape(message)):
        hosts.start(Cluster("127.0.0.1:1", 2, 1, 1), environment(**SLURM))


def test_a_pod_of_a_job_without_the_kubernetes_package_is_no_run_of_one_process(environment):
    variables = environment(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="3")
    with pytest.raises(UserError, match=r"JOB_COMPLETION_INDEX is set.*the package `kubernetes` is missing"):
        hosts.start(Cluster(), variables)


def test_a_tpu_worker_without_its_number_is_named(environment):
    variables = environment(TPU_WORKER_HOSTNAMES="a,b")
    with pytest.raises(UserError, match=r"several TPU workers \(a,b\), but TPU_WORKER_ID is missing"):
        hosts.start(Cluster(), variables)


def test_a_host_whose_name_is_not_known_yet_may_come_later(monkeypatch, environment):
    variables = environment(**SLURM)

    def fails(*_):
        raise RuntimeError("Failed to recognize coordinator address t1v-0")  # JAX's, on a TPU pod

    monkeypatch.setattr(hosts.clusters.ClusterEnv, "auto_detect_unset_distributed_params", fails)
    with pytest.raises(TemporaryError, match=r"does not tell how .* \(Failed to recognize coordinator address t1v-0\)"):
        hosts.start(Cluster(), variables)


@pytest.mark.parametrize("variables", [{}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {"SLURM_NTASKS": "1"}])
def test_without_a_cluster_there_is_one_process(environment, variables):
    hosts.start(Cluster(), environment(**variables))
    assert not hosts.is_one_of_several() and hosts.is_primary() and jax.process_count() == 1
    hosts.barrier("alone", 0.1)
    assert hosts.agree(7, "alone") == 7
    assert [hosts.should_stop(requested) for requested in (False, True)] == [False, True]
    with pytest.raises(ValueError, match="own"), hosts.named_failure():
        raise ValueError("its own")
    hosts.leave()


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_every_device_gets_its_rows(sizes):
    mesh = jax.make_mesh(sizes, ("rows", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("rows"))
    rows = hosts.batch_rows(sharding, 16)
    assert rows == tuple(range(16))
    batch = {"tokens": np.arange(16 * 3).reshape(16, 3), "neighbours": np.arange(16 * 8).reshape(16, 2, 2, 2)}
    for name, array in hosts.to_global(batch, rows, 16, sharding).items():
        assert array.sharding == sharding and np.array_equal(array, batch[name])


def test_a_process_reads_the_rows_of_its_devices_alone():
    """Devices of this process that are a part of the mesh, as seen from one host of several."""
    devices = np.array(jax.devices()).reshape(4, 2)

    class Part:
        """The sharding as a process sees it to which only the given devices belong."""

        def __init__(self, own):
            self.own = own

        def addressable_devices_indices_map(self, shape):
            whole = NamedSharding(jax.sharding.Mesh(devices, ("rows", "model")), P("rows"))
            return {d: i for d, i in whole.devices_indices_map(shape).items() if d in self.own}

    assert hosts.batch_rows(Part(devices[1]), 8) == (2, 3)
    assert hosts.batch_rows(Part(devices[[0, 3]].ravel()), 8) == (0, 1, 6, 7)
    assert hosts.batch_rows(Part(devices[:, 1]), 8) == tuple(range(8))  # the model axis spans processes
