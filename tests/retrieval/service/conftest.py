"""A cluster of two shards with two replicas each and a front, over a made-up database."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from processes_of_service import Server, front, running, standin, wait_ready
from standin import World

from retro_jax.retrieval.service.client import RetrievalClient


@dataclasses.dataclass
class Cluster:
    """shards[s][r] is replica r of shard s."""

    directory: Path
    world: World
    shards: list[list[Server]]
    front: Server

    def delay(self, server: Server, seconds: float) -> None:
        """Every search of this server takes so long from now on; 0 is as quick as it can."""
        file = self.directory / f"delay-{server.port}"
        file.write_text(str(seconds)) if seconds else file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def start_cluster(tmp_path_factory):
    """`with start_cluster(replicas=2, ...) as cluster`; flags for the front, options for the shard servers."""
    import contextlib

    @contextlib.contextmanager
    def start(*, replicas: int = 2, flags: tuple[str, ...] = (), world: World = World(), **options: object):  # noqa: B008
        directory = tmp_path_factory.mktemp("world")
        world.write(directory)
        shards = [
            [standin(directory, str(shard), **options) for _ in range(replicas)] for shard in range(world.num_shards)
        ]
        backends = [server for group in shards for server in group]
        with running(*backends):
            asking = front(*backends, flags=flags)
            with running(asking):
                wait_ready(*backends, asking)
                yield Cluster(directory, world, shards, asking)

    return start


@pytest.fixture(scope="module")
def cluster(start_cluster):
    """For tests that leave all servers as they were."""
    with start_cluster() as started:
        yield started


@pytest.fixture
def client(cluster):
    with RetrievalClient(cluster.front.address) as connected:
        yield connected


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(20, World().dimension)).astype(np.float32)
