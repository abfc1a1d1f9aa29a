"""launch/explore.py as a user runs it: a server that ends cleanly, a page in a file, mistakes in one line."""

import http.client
import json
import re
import signal

import pytest
from small_run import error_line, program, run_program

TEXT = "A text with plenty of words, so that several chunks are complete"


@pytest.fixture
def flags(database, finished_run):
    directory, bert = database
    return [f"--workdir={finished_run}", f"--database={directory}", f"--embedder={bert}"]


def post(port, path, session):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, json.dumps(session), {"content-type": "application/json"})
    return connection.getresponse()


def test_it_serves_what_it_writes_to_a_file_and_ends_when_told_to(flags, tmp_path):
    server = program("launch/explore.py", *flags, "--port=0", f"--prompt={TEXT}")
    try:
        port = int(re.search(r"The explorer: http://127\.0\.0\.1:(\d+)/", server.stdout.readline())[1])
        assert f"port {port} is in use" in error_line("launch/explore.py", *flags, f"--port={port}")
        view = json.load(post(port, "/api/view", {"prompt": TEXT, "max_new_tokens": 0, "decoding": {"top_p": 0.5}}))
        assert {slot["state"] for slot in view["chunks"][1]["reads"]["neighbours"]} == {"retrieved"}
        assert view["chunks"][1]["reads"]["neighbours"][0]["document"]
        stream = post(port, "/api/generate", {"prompt": TEXT, "max_new_tokens": 1000})
        assert json.loads(stream.readline())["tokens"]
        server.send_signal(signal.SIGTERM)
        _, stderr = server.communicate(timeout=60)
        assert server.returncode == 0 and "Traceback" not in stderr
    finally:
        server.kill()
        server.communicate()
    page = tmp_path / "page.html"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    more = [f"--prompt_file={text}", "--max_new_tokens=0", "--temperature=1", "--top_p=0.5", f"--html={page}"]
    status, stdout, stderr = run_program("launch/explore.py", *flags, *more)
    assert status == 0 and f"{page}: {len(view['tokens'])} tokens in {len(view['chunks'])} chunks" in stdout, stderr
    data = re.search(r'id="view">(.*?)</script>', page.read_text())[1]
    assert json.loads(data) == view


def test_mistakes_are_named_in_one_line(flags, tmp_path):
    workdir = flags[0]
    assert "nothing to retrieve from" in error_line("launch/explore.py", workdir, "--port=0")
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff")
    assert "is not valid UTF-8" in error_line("launch/explore.py", *flags, f"--prompt_file={text}")
    assert "--html needs a text" in error_line("launch/explore.py", *flags, "--max_new_tokens=0", "--html=x.html")
