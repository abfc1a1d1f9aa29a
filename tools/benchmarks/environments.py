"""Environments of their own for peers, whose packages do not go with ours; made on first use."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from retro_jax.errors import UserError

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peers"


def environment(name: str, python: str | None, home: Path, packages: Sequence[str], imports: str, needs: str) -> str:
    """The interpreter that has a peer.

    Args:
      name: of the peer, for messages.
      python: one that has it already; None makes an environment.
      home: where that is made.
      packages: what is installed in it, without dependencies.
      imports: a program that fails where the peer is missing.
      needs: what installing takes, said when it fails.

    Raises:
      UserError: it is not there, or cannot be installed.
    """
    if python is not None:
        if shutil.which(python) is None:
            raise UserError(f"--peer_python={python}: no such program")
        found = subprocess.run([python, "-c", imports], capture_output=True, text=True, check=False)
        if found.returncode:
            reason = (found.stderr.splitlines() or [f"no {name}"])[-1]
            raise UserError(f"--peer_python={python} lacks what the peer needs: {reason}")
        return python
    ready, wanted = home / "ready", "\n".join(packages)
    if not (ready.is_file() and ready.read_text() == wanted):
        shutil.rmtree(home, ignore_errors=True)
        for command in install_commands(home, packages):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
                reason = lines[-1] if lines else result.returncode
                raise UserError(f"the peer {name} cannot be installed: {reason}. It needs {needs}")
        ready.write_text(wanted)
    return str(home / "bin" / "python")


def install_commands(home: Path, packages: Sequence[str]) -> list[list[str]]:
    """What makes the environment, command by command."""
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "--disable-pip-version-check"]
    return [
        [sys.executable, "-m", "venv", "--without-pip", str(home)],
        [*pip, "install", "--quiet", "--no-deps", *packages],
    ]
