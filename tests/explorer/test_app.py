"""The explorer's server: what it answers, and what it refuses."""

import http.client
import json
import threading
import time

import pytest
from tiny_explorer import serving

from retro_jax.errors import UserError
from retro_jax.explorer.app import create_app
from retro_jax.explorer.serving import listen
from retro_jax.explorer.session import Limits, Session
from retro_jax.explorer.turns import Turns

SESSION = {"prompt": "Some words to begin with, and more", "max_new_tokens": 10, "decoding": {"seed": 1}}


def ask(port, path, body=None, method=None, **headers):
    """(status, headers, text); a body is sent as JSON unless it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if body is not None:
        headers = {"content-type": "application/json"} | headers
        body = body if isinstance(body, bytes) else json.dumps(body)
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


def test_the_page_and_its_files_come_with_a_policy_that_forbids_all_else(port):
    for path, kind in (("/", "text/html"), ("/view.js", "text/javascript"), ("/explorer.css", "text/css")):
        status, headers, text = ask(port, path)
        assert status == 200 and headers["content-type"].startswith(kind) and text
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
    assert ask(port, "/../session.py")[0] == ask(port, "/index.html")[0] == 404


def test_it_says_what_it_explores(port):
    about = json.loads(ask(port, "/api/about")[2])
    assert about["run"]["workdir"] == "runs/tiny" and about["limits"] == {"prompt_tokens": 200, "new_tokens": 64}
    assert about["session"]["prompt"] == "Some words to begin with"


def test_a_generation_is_streamed_and_a_view_of_it_is_the_same(port):
    status, headers, text = ask(port, "/api/generate", SESSION)
    assert status == 200 and headers["content-type"].startswith("application/x-ndjson")
    *parts, last = map(json.loads, text.splitlines())
    assert {part["mode"] for part in parts} == {"on", "off"}
    view = last["view"]
    assert "".join(part["text"] for part in parts if part["mode"] == "on") == view["texts"]["on"]
    assert json.loads(ask(port, "/api/view", view["session"])[2]) == view
    page = ask(port, "/api/page", view["session"])[2]
    assert page.startswith("<!doctype html>") and f'"prompt":"{SESSION["prompt"]}"' in page


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "no JSON"),
        (b"[" * 100_000, {}, 400, "no JSON"),
        (b"\xff", {}, 400, "no JSON"),
        ({"prompt": "x", "seed": 1}, {}, 400, "session.seed: unknown key"),
        ({"prompt": "x", "\ud800": 1}, {}, 400, "unknown key"),
        ({"prompt": "word " * 400}, {}, 400, "at most 200"),
        ({"prompt": "x" * 300_000}, {}, 413, "more than 262,144 bytes"),
        (SESSION, {"content-type": "text/plain"}, 415, "expected application/json"),
        (SESSION, {"host": "evil.example"}, 403, "answers only to"),
        (SESSION, {"host": "127.0.0.1.evil.example:80"}, 403, "answers only to"),
        (SESSION, {"origin": "http://evil.example"}, 403, "other origins"),
        (SESSION, {"origin": "null"}, 403, "other origins"),
        (SESSION, {"origin": "http://127.0.0.1:1"}, 403, "other origins"),
    ],
)
def test_what_is_wrong_or_foreign_is_refused_with_a_reason(port, body, headers, status, message):
    found, answered, text = ask(port, "/api/view", body, **headers)
    assert found == status and message in json.loads(text)["error"] and len(text) < 600
    assert "content-security-policy" in answered


def test_limits_hold_in_a_stream_and_other_methods_are_refused(port):
    lines = ask(port, "/api/generate", {"prompt": "x", "max_new_tokens": 65})[2].splitlines()
    assert "at most 64" in json.loads(lines[-1])["error"] and len(lines) == 1
    assert ask(port, "/api/generate")[0] == ask(port, "/", {})[0] == 405


def test_names_of_loopback_and_the_pages_own_origin_are_let_in(port):
    for host in (f"localhost:{port}", "localhost:9999", f"127.0.0.1:{port}", "[::1]:80", "LOCALHOST"):
        assert ask(port, "/api/about", host=host)[0] == 200
    assert ask(port, "/api/about", host="localhost:9999", origin="http://localhost:9999")[0] == 200


class Held:
    """An explorer whose generation gives a piece, then waits to be let go on, and tells when it is ended."""

    limits = Limits()

    def __init__(self):
        self.go_on, self.ended = threading.Event(), threading.Event()
        self.pieces = 0

    def describe(self):
        return {}

    def generate(self, session):
        try:
            while True:
                self.pieces += 1
                yield {"mode": "on", "text": "x" * 1000, "tokens": [5]}
                self.go_on.wait(30)
        finally:
            self.ended.set()

    def view(self, session):
        if session.prompt == "broken":
            raise ConnectionError("the service is gone")
        if session.prompt == "wrong":
            raise AssertionError("a defect")
        return {"prompt": session.prompt}


@pytest.fixture
def held():
    explorer = Held()
    with serving(create_app(explorer, Turns(1), start=Session(""))) as port:
        yield explorer, port
        explorer.go_on.set()


def begin(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/api/generate", json.dumps(SESSION), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.readline()
    return response


def test_a_busy_server_says_so_at_once_and_a_client_that_leaves_makes_room(held):
    explorer, port = held
    response = begin(port)
    for path in ("/api/generate", "/api/view", "/api/page"):
        status, headers, text = ask(port, path, SESSION)
        assert status == 429 and headers["retry-after"] and "busy" in json.loads(text)["error"]
    assert ask(port, "/api/about")[0] == 200  # the page itself opens
    response.close()
    # The piece in progress comes to its end; nobody asks for the next one.
    explorer.go_on.set()
    assert explorer.ended.wait(30)
    while ask(port, "/api/view", SESSION)[0] == 429:  # the seat is given back just after
        pass
    assert explorer.pieces < 1000


def test_requests_take_turns_on_the_one_model(explorer):
    turns = Turns(2)
    with serving(create_app(explorer, turns, start=Session(""))) as port:
        stream = begin(port)  # in progress, and a view is answered in between or after
        assert ask(port, "/api/view", {"prompt": "a text"})[0] == 200
        assert "view" in json.loads(stream.read().decode().splitlines()[-1])


def test_failures_are_told_and_the_server_lives_on(held, caplog):
    _, port = held
    assert ask(port, "/api/view", {"prompt": "broken"})[0] == 502
    status, _, text = ask(port, "/api/view", {"prompt": "wrong"})
    assert status == 500 and "its terminal says what" in text
    deadline = time.monotonic() + 30
    while "a defect" not in caplog.text:  # it is told after the answer
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ask(port, "/api/view", {"prompt": "fine"})[0] == 200


def test_a_port_in_use_is_one_line(port):
    with pytest.raises(UserError, match=f"port {port} is in use; give another one with --port"):
        listen(port)
