"""The end of a server: what is still under way in it does not call it ready again."""

import os
import signal
import threading
import types

from processes_of_service import health

from retro_jax.retrieval.service import server
from retro_jax.retrieval.service.front import FrontSource
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.replicas import Patience
from retro_jax.retrieval.service.security import ClientSecurity
from retro_jax.retrieval.service.server import ServerOptions, serve
from retro_jax.retrieval.service.wire import Limits


def test_a_poll_that_ends_during_the_drain_does_not_call_the_server_ready(monkeypatch):
    asked, answered = threading.Event(), threading.Event()
    said = []

    class SlowPoll(FrontSource):
        """Ready after its first poll; SIGTERM comes in the second, which ends only in the drain."""

        ready, polls = True, 0

        def poll(self) -> None:
            self.polls += 1
            if self.polls == 2:
                said.append(health(address["service"]))
                asked.set()
                os.kill(os.getpid(), signal.SIGTERM)
                assert answered.wait(60)

    def drain_delay(_: float) -> None:
        assert asked.is_set()
        said.append(health(address["service"]))
        (keeper,) = (thread for thread in threading.enumerate() if thread.name == "keeper")
        answered.set()
        keeper.join(60)
        said.extend(health(address["service"], name) for name in ("readiness", "", "liveness"))

    address = {}
    monkeypatch.setattr(server, "time", types.SimpleNamespace(sleep=drain_delay))
    serve(
        lambda log, metrics: SlowPoll(
            ["127.0.0.1:1"],
            security=ClientSecurity(),
            patience=Patience(),
            limits=Limits(),
            log=log,
            metrics=metrics,
        ),
        ServerOptions(port=0),
        log=Log(open("/dev/null", "w")),  # noqa: SIM115
        started=lambda port: address.update(service=f"127.0.0.1:{port}"),
    )
    assert said == ["SERVING", "NOT_SERVING", "NOT_SERVING", "NOT_SERVING", "SERVING"]
