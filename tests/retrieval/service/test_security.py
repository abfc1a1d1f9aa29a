"""TLS, mutual TLS and tokens let in whom they should; what is unsafe, expired or taken is refused in one line."""

import datetime
import re
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from processes_of_service import health, program, running, standin
from small_run import error_line
from standin import World

from retro_jax.errors import UserError
from retro_jax.retrieval.service.access import Service
from retro_jax.retrieval.service.client import RetrievalClient, RetrievalError
from retro_jax.retrieval.service.replicas import Patience
from retro_jax.retrieval.service.security import ClientSecurity, Identity, ServerSecurity, is_loopback, read_tokens

ONCE = Patience(attempts=1)
QUERIES = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """PEM files: two authorities, identities of each, one that has expired."""
    directory = tmp_path_factory.mktemp("keys")
    long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    for name in ("ours", "theirs"):
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(directory / f"{name}.ca"))
        issued = {f"{name}": authority.issue_cert("127.0.0.1", "localhost")}
        if name == "ours":
            issued["expired"] = authority.issue_cert("127.0.0.1", not_before=long_ago, not_after=long_ago)
        for identity, certificate in issued.items():
            certificate.private_key_pem.write_to_path(str(directory / f"{identity}.key"))
            for blob in certificate.cert_chain_pems:
                blob.write_to_path(str(directory / f"{identity}.pem"), append=True)
    (directory / "tokens").write_text("old-secret\nnew-secret\n")
    (directory / "backend-token").write_text("new-secret\n")
    return directory


def identity(keys: Path, name: str) -> Identity:
    return Identity(keys / f"{name}.pem", keys / f"{name}.key")


@pytest.fixture(scope="module")
def served(keys, tmp_path_factory):
    """A shard server with mutual TLS and tokens, and a front with TLS before it."""
    directory = tmp_path_factory.mktemp("world")
    World(num_shards=1).write(directory)
    shard = standin(directory, "0", secure=keys)
    with running(shard):
        flags = [f"--backend_ca={keys / 'ours.ca'}", f"--backend_token_file={keys / 'backend-token'}"]
        tls = [f"--tls_certificate={keys / 'ours.pem'}", f"--tls_key={keys / 'ours.key'}"]
        asking = program(f"--backends={shard.address}", "--health_port=0", *flags, *tls)
        with running(asking):
            asking.event("answers")
            yield asking, shard


def search(server, **security):
    with RetrievalClient(server.address, security=ClientSecurity(**security), patience=ONCE, seconds=5) as client:
        return client.search(QUERIES, 2)[0]


def test_who_has_certificate_and_token_is_answered(served, keys):
    expected = World(num_shards=1).search(QUERIES, 2)[0]
    front, shard = served
    np.testing.assert_array_equal(search(front, ca=keys / "ours.ca"), expected)
    for token in ("old-secret", "new-secret"):
        found = search(shard, ca=keys / "ours.ca", identity=identity(keys, "ours"), token=token)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("security", "code"),
    [
        (lambda keys: {}, grpc.StatusCode.UNAVAILABLE),  # plaintext
        (lambda keys: {"ca": keys / "ours.ca", "token": "new-secret"}, grpc.StatusCode.UNAVAILABLE),
        (
            lambda keys: {"ca": keys / "ours.ca", "identity": identity(keys, "theirs"), "token": "new-secret"},
            grpc.StatusCode.UNAVAILABLE,
        ),
        (
            lambda keys: {"ca": keys / "theirs.ca", "identity": identity(keys, "ours"), "token": "new-secret"},
            grpc.StatusCode.UNAVAILABLE,
        ),
        (
            lambda keys: {"ca": keys / "ours.ca", "identity": identity(keys, "ours"), "token": "new-secre"},
            grpc.StatusCode.UNAUTHENTICATED,
        ),
        (lambda keys: {"ca": keys / "ours.ca", "identity": identity(keys, "ours")}, grpc.StatusCode.UNAUTHENTICATED),
    ],
)
def test_everybody_else_is_not(served, keys, security, code):
    with pytest.raises(RetrievalError) as refused:
        search(served[1], **security(keys))
    assert refused.value.code is code and len(str(refused.value).splitlines()) == 1


def test_an_expired_certificate_is_named(served, keys):
    with pytest.raises(UserError, match=r"expired.pem: expired at 2020-01-01"):
        search(served[1], ca=keys / "ours.ca", identity=identity(keys, "expired"), token="new-secret")
    flags = [f"--tls_certificate={keys / 'expired.pem'}", f"--tls_key={keys / 'expired.key'}"]
    line = error_line("launch/serve_retrieval.py", "--backends=127.0.0.1:1", "--port=0", *flags)
    assert line == f"error: {keys / 'expired.pem'}: expired at 2020-01-01 00:00 UTC"


def test_unsafe_and_unusable_settings_are_refused(keys, tmp_path):
    def mistake(*flags: str) -> str:
        return error_line("launch/serve_retrieval.py", "--backends=127.0.0.1:1", "--port=0", *flags)

    assert "will not listen at 0.0.0.0 without TLS" in mistake("--host=0.0.0.0")
    assert "client certificates need TLS" in mistake(f"--tls_client_ca={keys / 'ours.ca'}")
    pair = (f"--tls_certificate={keys / 'ours.pem'}", f"--tls_key={keys / 'theirs.key'}")
    assert "is not the key of" in mistake(*pair)
    with pytest.raises(UserError, match="not a certificate in PEM"):
        Identity(keys / "tokens", keys / "ours.key").read()
    with pytest.raises(UserError, match="no token in it"):
        (tmp_path / "empty").write_text("\n")
        read_tokens(tmp_path / "empty")
    with pytest.raises(UserError, match="No such file"):
        read_tokens(tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs TLS"):
        ClientSecurity(identity=identity(keys, "ours")).channel("127.0.0.1:1", [])
    pair = (f"--tls_certificate={keys / 'ours.pem'}", f"--tls_key={keys / 'ours.key'}")
    line = mistake(*pair, f"--tls_client_ca={keys / 'tokens'}")
    assert f"{keys / 'tokens'}: no certificates in PEM" in line
    with pytest.raises(UserError, match=r"ours\.key: no certificates in PEM"):
        ClientSecurity(ca=keys / "ours.key").channel("127.0.0.1:1", [])
    ServerSecurity(allow_plaintext=True).check_address("0.0.0.0")
    ServerSecurity(identity=identity(keys, "ours")).check_address("0.0.0.0")
    hosts = ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8", "10.0.0.1", "0.0.0.0", "::", "host")
    assert [is_loopback(host) for host in hosts] == [True] * 5 + [False] * 4


def test_a_token_is_not_sent_where_others_can_read_it(keys):
    for address in ("10.0.0.1:50051", "retro-front:50051", "[fd00::1]:50051"):
        with pytest.raises(
            UserError, match=rf"will not send a token to {re.escape(address)} without TLS: .*_plaintext"
        ):
            ClientSecurity(token="new-secret").channel(address, [])
        for fine in (
            ClientSecurity(),
            ClientSecurity(ca=keys / "ours.ca", token="new-secret"),
            ClientSecurity(token="new-secret", allow_plaintext=True),
        ):
            fine.channel(address, []).close()
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        ClientSecurity(token="new-secret").channel(address, []).close()
    reached = {"token_file": str(keys / "tokens"), "addresses": "10.0.0.1:50051"}
    with pytest.raises(UserError, match="will not send a token"):
        Service(**reached).connect()
    Service(**reached, allow_plaintext=True).connect().close()
    flags = ("--backends=10.0.0.1:1", "--port=0", f"--backend_token_file={keys / 'tokens'}")
    assert "will not send a token to 10.0.0.1:1" in error_line("launch/serve_retrieval.py", *flags)


def test_probes_without_tls_have_a_port_of_their_own(served):
    address = served[0].event("listening")["health"]
    assert health(address, "liveness") == health(address, "readiness") == "SERVING"


def test_a_renewed_certificate_is_used_without_a_restart(keys, tmp_path):
    World(num_shards=1).write(tmp_path)
    current = tmp_path / "keys"
    current.mkdir()
    for name in ("ours.pem", "ours.key", "ours.ca", "tokens"):
        (current / name).write_bytes((keys / name).read_bytes())
    server = standin(tmp_path, "0", secure=current)
    with running(server):
        server.event("loaded")
        security = {"ca": keys / "ours.ca", "identity": identity(keys, "ours"), "token": "new-secret"}
        search(server, **security)
        for suffix in ("pem", "key"):
            (current / f"new.{suffix}").write_bytes((keys / f"theirs.{suffix}").read_bytes())
            (current / f"new.{suffix}").rename(current / f"ours.{suffix}")
        search(server, **{**security, "ca": keys / "theirs.ca"})
        with pytest.raises(RetrievalError):
            search(server, **security)
