"""A pipeline of the project's own programs, each a process, as `make demo` and `make results` run them."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from retro_jax.data.stage import write_json
from retro_jax.errors import UserError
from retro_jax.parallel.topology import WITHOUT_TPU

STAGES = "stages.json"


class Pipeline:
    """Runs programs one by one and remembers how long each took until it was finished.

    A pipeline that was interrupted is started again as a whole: its programs go on where they stopped.
    """

    def __init__(self, work: Path, root: Path, command: str, environment: Mapping[str, str]) -> None:
        """Prepares a pipeline.

        Args:
          work: its directory; `stages.json` in it holds the times, `compiled` what JAX has compiled.
          root: the directory that names of programs and recipes are relative to.
          command: what a person starts it with, for messages.
          environment: of this process.
        """
        self._path = work / STAGES
        self._root = root
        self._command = command
        # Several steps run the same model: what one has compiled, the next one finds.
        self._environment = {"JAX_COMPILATION_CACHE_DIR": str((work / "compiled").absolute()), **environment}
        if not (list(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists()):  # as TPUs show themselves
            self._environment = {**WITHOUT_TPU, **self._environment}
        records = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else []
        self._records: dict[str, dict] = {record["stage"]: record for record in records}

    @property
    def stages(self) -> list[tuple[str, float]]:
        """Each step and its seconds, in order."""
        return [(name, record["seconds"]) for name, record in self._records.items()]

    def run(self, name: str, script: str, **options: object) -> None:
        """Runs a program with flags; its failure ends the pipeline with its own message.

        Raises:
          UserError: it failed.
        """
        arguments = [self._flag(key, value) for key, value in options.items()]
        print(f"\n[{name}]\n$ python {script} {shlex.join(arguments)}", flush=True)
        begun = time.monotonic()
        command = [sys.executable, str(self._root / script), *arguments]
        status = subprocess.run(command, check=False, env=self._environment).returncode
        record = self._records.setdefault(name, {"stage": name, "seconds": 0.0, "finished": False})
        if not record["finished"]:
            record["seconds"] += time.monotonic() - begun
            record["finished"] = status == 0
            write_json(self._path, list(self._records.values()))
        if status:
            raise UserError(f"it stopped at {name!r} (exit status {status}); `{self._command}` goes on from there")

    def _flag(self, key: str, value: object) -> str:
        if isinstance(value, bool):
            return f"--{key}" if value else f"--no{key}"
        if key == "config":
            return f"--config={self._root / str(value)}"
        if isinstance(value, list | tuple | range):
            return f"--{key}={','.join(map(str, value))}"
        return f"--{key}={value}"
