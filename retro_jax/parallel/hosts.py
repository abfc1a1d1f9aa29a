"""Several processes that train or evaluate as one: start, end, waiting for each other, and rows of a batch.

Every function works in a single process as well, where there is nobody to wait for. The processes find each other by
`RollCall`, JAX's coordination service carries the small values they agree on, and JAX's collectives everything else.
A process that dies ends the others: at once when the operating system of its host closes its connection, within
`roll_call.SILENCE_SECONDS` when the host itself is gone. They exit with status 75 and one line that names it.
"""

import collections
import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding

from retro_jax.errors import TemporaryError, UserError
from retro_jax.parallel.relay import LOOPBACK, Relay
from retro_jax.parallel.roll_call import SILENCE_SECONDS, Address, RollCall, meet

FLAGS = ("--coordinator", "--num_processes", "--process_id")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_ALONE = "All other processes of the run are there, so the failure is this one's own."
_KEPT_VALUES = 1000
_WEEK_SECONDS = 7 * 24 * 3600.0  # longer than any wait, which the death of the one waited for ends

_roll_call: RollCall | None = None
_relay: Relay | None = None
_uses: collections.Counter[str] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How the processes of a run find each other; what is None is found out from the cluster the program runs on.

    Attributes:
      coordinator: host:port at which process 0 listens.
      num_processes: of the whole run.
      process_id: of this process, from 0.
      timeout_seconds: how long to wait for the other processes at the start.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_seconds: int = 300


def start(cluster: Cluster, environment: Mapping[str, str]) -> None:
    """Joins this process to the others of its run; to be called before anything asks JAX for devices.

    What `cluster` leaves out comes from JAX's own detection (TPU pods, SLURM, Kubernetes with JobSets or indexed Jobs,
    Open MPI). Where nothing is given and nothing detected the run has one process.

    Args:
      cluster: as above.
      environment: the environment variables, in which a cluster that is set up by half is recognised. Where they
        name a proxy, gRPC must have been told not to use it for LOOPBACK.

    Raises:
      UserError: a flag or a variable is missing or wrong.
      TemporaryError: the coordinator is not to be reached, or processes do not come.
    """
    global _roll_call, _relay
    if cluster.num_processes == 1 and cluster.coordinator is None:
        return
    coordinator, num_processes, process_id, local_devices = _place(cluster, environment)
    if num_processes is None or num_processes == 1:
        return
    address = _address(coordinator)
    began = time.monotonic()
    roll_call = meet(address, process_id, num_processes, cluster.timeout_seconds)
    _roll_call = roll_call
    _hold_aborts()
    roll_call.watch(_end_with)
    left = max(1, round(cluster.timeout_seconds - (time.monotonic() - began)))
    jax.config.update("jax_enable_preemption_service", False)  # it takes over SIGTERM; `should_stop` starts it
    jax.config.update("jax_check_proxy_envs", False)  # a proxy is never asked for loopback, see LOOPBACK
    if process_id:
        _relay = Relay(*address, left)
    jax.distributed.initialize(
        _relay.address if _relay else f"{LOOPBACK}:{address.port}",
        num_processes,
        process_id,
        local_device_ids=local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=left,
    )


def leave() -> None:
    """Waits until all processes have come to their orderly end, and parts from them. The last call of a program."""
    global _roll_call, _relay
    if _roll_call is None:
        return
    _roll_call.leave()
    _roll_call = None
    jax.distributed.shutdown()
    if _relay is not None:
        _relay.close()
        _relay = None


def fail(reason: str, *, temporary: bool = False) -> None:
    """Tells the other processes that this one ends because of `reason`; they end as well and name it.

    Their exit status is 75 where it is `temporary`, so that a launcher may start the run again, else 1.
    """
    if _roll_call is not None:
        _roll_call.fail(reason, temporary=temporary)


def is_one_of_several() -> bool:
    """Whether `start` has joined this process to others."""
    return _roll_call is not None


def is_primary() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


def barrier(name: str, timeout_seconds: float = _WEEK_SECONDS) -> None:
    """Returns when all processes have called this as often with this name.

    One that is lost ends the wait, and this process, whatever the time.

    Raises:
      TemporaryError: some did not within the time; they are named with their hosts.
    """
    if _roll_call is None:
        return
    client = distributed.global_state.client
    key = _next_key("barrier", name)
    client.key_value_set(f"{key}/{jax.process_index()}", "")
    try:
        client.wait_at_barrier(key, round(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = {int(found.rsplit("/", 1)[1]) for found, _ in client.key_value_dir_get(f"{key}/")}
        missing = [_roll_call.name(process) for process in range(jax.process_count()) if process not in came]
        if not missing:
            raise UserError(f"{name}: waiting for the other processes failed ({_one_line(error)})") from error
        raise TemporaryError(f"{name}: {', '.join(missing)} did not come within {timeout_seconds:g} s") from None


def agree(value: int, name: str) -> int:
    """Process 0's value, on all processes; they all call this equally often with this name.

    Process 0 waits for nobody: see `barrier`.
    """
    if _roll_call is None:
        return value
    client = distributed.global_state.client
    key = _next_key("agree", name)
    if not is_primary():
        return int(client.blocking_key_value_get(key, round(_WEEK_SECONDS * 1000)))
    client.key_value_set(key, str(int(value)))
    # The service keeps every key; the steps of a run hold the processes closer together than this many calls.
    if (old := _uses[f"agree/{name}"] - _KEPT_VALUES) > 0:
        client.key_value_delete(_key("agree", name, old))
    return value


def should_stop(requested: bool) -> bool:
    """Whether to save and stop now: the same answer on every process.

    To be called equally often by all processes, where they are at most a call apart: after every step, say, until it
    is True. It is, at one and the same call everywhere and a little later, once any of them got SIGTERM or was
    `requested` to stop; in one process, as soon as it was.

    From the first call on, SIGTERM goes to JAX's preemption service when there are several processes: a handler that
    was set before this sees none any more.
    """
    if _roll_call is None:
        return requested
    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()
    if requested and not _uses["stop requested"]:
        _uses["stop requested"] += 1
        os.kill(os.getpid(), signal.SIGTERM)  # seen by the handler that was there before; now for the service
    _uses["should stop"] += 1
    return multihost_utils.reached_preemption_sync_point(_uses["should stop"])


def batch_rows(sharding: Sharding, batch_size: int) -> tuple[int, ...]:
    """Rows of the global batch that this process's devices hold, ascending.

    Args:
      sharding: of the batch, whose first axis is split; processes that hold the same rows get the same.
      batch_size: B.
    """
    rows: set[int] = set()
    for (index,) in _rows_only(sharding).addressable_devices_indices_map((batch_size,)).values():
        rows.update(range(*index.indices(batch_size)))
    return tuple(sorted(rows))


def to_global(
    arrays: Mapping[str, np.ndarray], rows: Sequence[int], batch_size: int, sharding: Sharding
) -> dict[str, jax.Array]:
    """Arrays of the whole batch, [B, ...], from the rows of them that this process has read.

    Args:
      arrays: name to [len(rows), ...].
      rows: as `batch_rows` gives them.
      batch_size: B.
      sharding: of the result.
    """
    position = np.full(batch_size, -1)
    position[list(rows)] = np.arange(len(rows))

    def whole(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            own = position[index[0]]
            assert (own >= 0).all(), "a device of this process needs rows that it has not read"
            return array[own][:, *index[1:]]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

    return {name: whole(array) for name, array in arrays.items()}


@contextlib.contextmanager
def named_failure() -> Iterator[None]:
    """Names the process whose death made a collective fail in this one: the process ends with that line and status 75.

    A failure of this process's own is raised as it is.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if _roll_call is not None and _ALONE not in getattr(error, "__notes__", []):
            time.sleep(SILENCE_SECONDS + 2)  # when another process is gone, the watch ends this one before that
            error.add_note(_ALONE)
        raise


def _place(
    cluster: Cluster, environment: Mapping[str, str]
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Coordinator, number of processes, index of this one and its devices (None: all); no number for one process."""
    coordinator = cluster.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    given = dict(zip(FLAGS, (coordinator, cluster.num_processes, cluster.process_id), strict=True))
    missing = [flag for flag, value in given.items() if value is None]
    chosen = environment.get("JAX_LOCAL_DEVICE_IDS")  # goes before the one GPU that JAX gives to a SLURM task
    local_devices = [int(number) for number in chosen.split(",")] if chosen else None
    if missing:
        kind = _detect(environment)
        if kind is None and len(missing) == len(FLAGS):
            return None, None, None, None
        if kind is None:
            name = "JAX_COORDINATOR_ADDRESS" if coordinator and not cluster.coordinator else "--coordinator"
            there = [name if flag == "--coordinator" else flag for flag in FLAGS if flag not in missing]
            raise UserError(
                f"{' and '.join(missing)} missing: {' and '.join(there)} given, and no TPU pod, SLURM or Kubernetes "
                "job is recognised here that would tell the rest"
            )
        try:
            *values, local_devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                *given.values(), local_devices, kind.name, cluster.timeout_seconds
            )
        except KeyError as error:
            raise UserError(f"the environment variable {error.args[0]} is missing ({kind.__name__})") from None
        except (RuntimeError, ValueError, ImportError, OSError) as error:
            # JAX waits for the name of process 0's host to be known, and gives up in these two ways.
            unknown = isinstance(error.__cause__, socket.gaierror) or "recognize coordinator" in str(error)
            raise (TemporaryError if unknown else UserError)(
                f"{kind.__name__} does not tell how the processes find each other ({_one_line(error)}); "
                f"give {', '.join(FLAGS)}"
            ) from error
        given = dict(zip(FLAGS, values, strict=True))
    coordinator, num_processes, process_id = given.values()
    if num_processes < 1:
        raise UserError(f"--num_processes must be at least 1, is {num_processes}")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id}; with --num_processes={num_processes} it is 0 to {num_processes - 1}"
        )
    return coordinator, num_processes, process_id, local_devices


def _detect(environment: Mapping[str, str]) -> type[clusters.ClusterEnv] | None:
    """The kind of cluster that JAX finds itself on, or None."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1:
        missing = [name for name in _SLURM if name not in environment]
        if missing:
            raise UserError(
                f"SLURM_NTASKS is {environment['SLURM_NTASKS']}, but {', '.join(missing)} missing: start the program "
                f"with srun, or give {', '.join(FLAGS)} (--num_processes=1 for one process)"
            )
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in workers and "TPU_WORKER_ID" not in environment:
        raise UserError(f"the environment names several TPU workers ({workers[:80]}), but TPU_WORKER_ID is missing")
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    if "JOB_COMPLETION_INDEX" not in environment:  # a pod by itself, or one whose manifest gives the flags
        kinds = [kind for kind in kinds if kind is not clusters.K8sCluster]
    elif not workers and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "JOB_COMPLETION_INDEX is set, so this is one of a Kubernetes Job's pods, but the package `kubernetes` is "
            f"missing, with which JAX finds the others: install it, or give {', '.join(FLAGS)} "
            "(--num_processes=1 for one process)"
        )
    return next((kind for kind in kinds if kind.is_env_present()), None)


def _address(coordinator: str) -> Address:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator is HOST:PORT, as in 10.0.0.1:8476, not {coordinator!r}")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


def _end_with(reason: str, temporary: bool) -> NoReturn:
    """Ends this process from the watch's thread: the main one may wait for ever in a collective."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {reason}; this process ends as well", file=sys.stderr, flush=True)
    os._exit((TemporaryError if temporary else UserError).exit_status)


def _hold_aborts() -> None:
    """Lets the watch say which process is gone before an abort in C++ ends this one.

    The collectives that a lost process leaves behind can fail in a thread of gloo's, which aborts. Nothing of Python
    may run in a signal handler there, but sleep() may: it takes the number of the signal, 6, for seconds. When it
    returns, the abort goes on.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _rows_only(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))


def _next_key(kind: str, name: str) -> str:
    _uses[f"{kind}/{name}"] += 1
    return _key(kind, name, _uses[f"{kind}/{name}"])


def _key(kind: str, name: str, number: int) -> str:
    return f"retro_jax/{kind}/{name}/{number}"


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:300]
