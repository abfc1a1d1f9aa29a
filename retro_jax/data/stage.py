"""Stage directories: how every step of the pipeline writes its result, so that it is complete or not there.

A stage writes one directory. While it works, the directory holds `plan.json` (what is being made, from what) and
finished shards, each beside a `<shard>.done.json` with its size, checksum and counts. A shard is written under a
temporary name, flushed to disk and renamed; so is a folder of shards that belong together. When all are there,
`manifest.json` is written by atomic rename and the side files are removed. No manifest: no data set. A stage started
again on its own directory goes on after the last finished shard; started with other settings or inputs it refuses and
names the difference. An unfinished directory is locked by the process that writes it: a second one is refused. Shards
may come from other processes and machines (`retro_jax.data.distribute`): they write through a `ShardWriter`, and the
process with the lock finds what they finished on disk.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from retro_jax.errors import UserError
from retro_jax.files import TEMPORARY, atomic_write, file_sha256, sync, temporary_name, write_json
from retro_jax.lock import LOCK, DirectoryLock

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
_DONE = ".done.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One finished file of a stage: its name in the directory, size in bytes, SHA-256 and counts."""

    name: str
    size: int
    sha256: str
    counts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished stage directory holds.

    Attributes:
      stage: name of the stage ("corpus", "embeddings", "index", "neighbours", "sequences").
      settings: every setting that the content depends on.
      inputs: name of each input to its fingerprint.
      counts: totals, each key naming its unit ("documents", "tokens", "bytes", "chunks", ...).
      shards: the files, in order.
    """

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, Any]
    shards: tuple[Shard, ...]
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when anything in the data set changes."""
        return fingerprint(dataclasses.asdict(self))


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_name(stem: str, index: int, count: int, suffix: str) -> str:
    """`stem-00000-of-00004.suffix`, the customary name of shard `index` of `count`."""
    return f"{stem}-{index:05d}-of-{count:05d}{suffix}"


def load_manifest(directory: str | os.PathLike, stage: str, *, whole: bool = True) -> Manifest:
    """Reads a finished stage directory's manifest and checks that every shard has its size.

    Args:
      directory: of the stage.
      stage: that must be there.
      whole: check the shards; without, `require_shards` is for those that are needed.

    Raises:
      UserError: no directory, no manifest (the stage did not finish), another stage's directory, another format
        version, a shard missing or of the wrong size.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected the output of the {stage} stage")
    if not path.is_file():
        unfinished = " (it was begun and not finished: run it again)" if (directory / PLAN).is_file() else ""
        raise UserError(f"{directory}: no {MANIFEST}, so no complete {stage} data set is here{unfinished}")
    try:
        manifest = _parse_manifest(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest ({error}); build the stage again in an empty directory") from None
    if manifest.stage != stage:
        raise UserError(f"{directory} holds the {manifest.stage} stage; expected {stage}")
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {manifest.format_version}, this program reads {FORMAT_VERSION}; rebuild it"
        )
    if whole:
        require_shards(directory, manifest.shards)
    return manifest


def require_shards(directory: str | os.PathLike, shards: Iterable[Shard]) -> None:
    """Checks that shards of a finished stage are there.

    Raises:
      UserError: one is missing or of the wrong size.
    """
    for shard in shards:
        file = Path(directory) / shard.name
        if not file.is_file():
            raise UserError(f"{file}: shard is missing; rebuild {directory}")
        if file.stat().st_size != shard.size:
            raise UserError(f"{file}: {file.stat().st_size} bytes, the manifest says {shard.size}; rebuild {directory}")


def verify_checksums(directory: str | os.PathLike, shards: Iterable[Shard]) -> None:
    """Reads shards of a finished stage and compares their SHA-256 with the manifest's.

    Raises:
      UserError: naming the first shard that differs.
    """
    for shard in shards:
        if file_sha256(Path(directory) / shard.name) != shard.sha256:
            raise UserError(f"{Path(directory) / shard.name}: checksum differs from the manifest; rebuild {directory}")


class ShardWriter:
    """Writes shards into the directory of a stage that this or another process has open.

    Attributes:
      directory: of the stage.
      advanced: sum of what `advance` was told.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        run: str | None = None,
        advance: Callable[[int], None] = lambda amount: None,
    ) -> None:
        """A writer for the process that holds the lock, or for one that works on its behalf.

        Args:
          directory: of the stage.
          run: name of the file in it that is there as long as the run this writer belongs to; a shard that ends after
            its run is not committed, as another run may have begun to write it. None: the caller holds the lock.
          advance: is told of work done.
        """
        self.directory = Path(directory)
        self.advanced = 0
        self._run = None if run is None else self.directory / run
        self._advance = advance
        self._prefix = ""  # of the names of the shards

    @contextlib.contextmanager
    def shard(self, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yields (temporary path to write, dict to fill with counts); commits the shard on success.

        Raises:
          UserError: the run that this writer belongs to is over.
        """
        counts: dict[str, Any] = {}
        with atomic_write(self.directory / name) as temporary:
            yield temporary, counts
            digest = file_sha256(temporary)
            size = temporary.stat().st_size
            self._refuse_ended_run()
        shard = Shard(self._prefix + name, size, digest, counts)
        try:
            write_json(self.directory / (name + _DONE), dataclasses.asdict(shard))
        except OSError:
            (self.directory / name).unlink(missing_ok=True)  # without its side file nobody would know it is finished
            raise

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator["ShardWriter"]:
        """Yields a writer of the shards in a folder of the stage; on success the folder is committed with all of them.

        It is written under a temporary name and renamed. Where another writer's is there already that one stays, so a
        folder never holds shards of two writers.

        Raises:
          UserError: the run that this writer belongs to is over.
        """
        temporary = self.directory / temporary_name(name)
        temporary.mkdir()
        inside = ShardWriter(temporary)
        inside._run, inside._prefix = self._run, f"{name}/"
        try:
            yield inside
            self._refuse_ended_run()
            try:
                os.rename(temporary, self.directory / name)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync(self.directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def advance(self, amount: int) -> None:
        """Tells the progress bar, where it is in this process, of work done."""
        self.advanced += amount
        self._advance(amount)

    def _refuse_ended_run(self) -> None:
        if self._run is not None and not self._run.exists():
            raise UserError(f"{self._run.parent}: the run that this process worked for is over")


def is_finished(directory: str | os.PathLike, name: str) -> bool:
    """Whether a shard of an unfinished stage was committed and not taken back, looked up on disk."""
    return (Path(directory) / (name + _DONE)).is_file() and (Path(directory) / name).is_file()


def _read_side_file(path: Path) -> Shard:
    return Shard(**json.loads(path.read_text(encoding="utf-8")))


class Stage:
    """A stage directory being written; see the module's docstring.

        with Stage(directory, "corpus", settings=..., inputs=...) as stage:
            if not stage.complete:
                for i in range(n):
                    name = shard_name("chunks", i, n, ".npy")
                    if not stage.has(name):
                        with stage.shard(name) as (path, counts):
                            ...                              # write the file at path, fill the dict counts
                stage.finish(counts={...})
            return stage.manifest

    Attributes:
      complete: the directory already holds this very data set.
      manifest: its manifest, once complete.
    """

    def __init__(
        self, directory: str | os.PathLike, name: str, *, settings: dict[str, Any], inputs: dict[str, str]
    ) -> None:
        """Opens or creates the directory.

        Args:
          directory: created when absent.
          name: stage name.
          settings: JSON-serialisable settings the content depends on.
          inputs: fingerprints of what it is made from.

        Raises:
          UserError: the directory holds something else, or was begun with other settings or inputs, or another
            process is writing it.
        """
        self.directory = Path(directory)
        self.name = name
        self._plan = json.loads(
            json.dumps({"stage": name, "settings": settings, "inputs": inputs, "format_version": FORMAT_VERSION})
        )
        self._shards: dict[str, Shard] = {}
        self.manifest: Manifest | None = None
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file; the {name} stage needs a directory")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock: DirectoryLock | None = None
        if not (self.directory / MANIFEST).is_file() and not self._holds_something_else():
            self._lock = DirectoryLock(self.directory, "wait for it, or give another directory")
        try:
            self._open()
        except BaseException:
            self._release()
            raise

    def _open(self) -> None:
        if (self.directory / MANIFEST).is_file():
            manifest = load_manifest(self.directory, self.name)
            self._refuse_difference(
                {
                    "stage": manifest.stage,
                    "settings": manifest.settings,
                    "inputs": manifest.inputs,
                    "format_version": manifest.format_version,
                }
            )
            self._remove_side_files()  # of a stage killed between its manifest and their removal
            if (self.directory / LOCK).exists():
                with contextlib.suppress(UserError, OSError):  # its holder may be living, and about to remove it
                    DirectoryLock(self.directory, "").release()
            self.manifest = manifest
        elif (self.directory / PLAN).is_file():
            self._refuse_difference(json.loads((self.directory / PLAN).read_text(encoding="utf-8")))
            self._remove_leftovers()
            self.reload()
        elif self._holds_something_else():
            raise UserError(f"{self.directory} is not empty and holds no {self.name} stage; give another directory")
        else:
            self._remove_leftovers()
            write_json(self.directory / PLAN, self._plan)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None and not self._shards and not self.complete:
            self.discard()  # nothing was finished: a mended input must not find the traces of the bad one
        self._release()

    @property
    def complete(self) -> bool:
        return self.manifest is not None

    def has(self, name: str) -> bool:
        """Whether this shard was finished, now or by an earlier run."""
        return name in self._shards

    def counts(self, name: str) -> dict[str, Any]:
        """The counts of a finished shard."""
        return self._shards[name].counts

    @contextlib.contextmanager
    def shard(self, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yields (temporary path to write, dict to fill with counts); commits the shard on success."""
        with ShardWriter(self.directory).shard(name) as (path, counts):
            yield path, counts
        self._shards[name] = _read_side_file(self.directory / (name + _DONE))

    def reload(self) -> None:
        """Takes in the shards that other processes have finished in this directory."""
        for path in self._side_files():
            shard = _read_side_file(path)
            file = self.directory / shard.name
            if file.is_file() and file.stat().st_size == shard.size:
                self._shards[shard.name] = shard

    def drop(self, name: str) -> None:
        """Takes back a shard of an unfinished stage, when it is there."""
        self._shards.pop(name, None)
        # The side file goes last: a shard without one would be taken for nothing of this stage, and stay.
        (self.directory / name).unlink(missing_ok=True)
        (self.directory / (name + _DONE)).unlink(missing_ok=True)

    def drop_folder(self, name: str) -> None:
        """Takes back the shards of a folder of an unfinished stage, when it is there, and what else it holds."""
        for shard in [shard for shard in self._shards if shard.startswith(f"{name}/")]:
            del self._shards[shard]
        temporary = self.directory / temporary_name(name)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.directory / name, temporary)  # at once: half a folder could pass for a whole one
        shutil.rmtree(temporary, ignore_errors=True)

    def keep(self, names: Sequence[str]) -> None:
        """Takes back every shard that is not among the names: what was needed only to make these."""
        for name in sorted(self._shards.keys() - set(names)):
            self.drop(name)

    def finish(self, counts: dict[str, Any]) -> Manifest:
        """Writes the manifest (shards in order of name) and removes the side files."""
        shards = tuple(self._shards[name] for name in sorted(self._shards))
        manifest = Manifest(self.name, self._plan["settings"], self._plan["inputs"], counts, shards)
        write_json(self.directory / MANIFEST, dataclasses.asdict(manifest))
        self._remove_side_files()
        self.manifest = load_manifest(self.directory, self.name)
        return self.manifest

    def discard(self) -> None:
        """Takes back everything an unfinished stage wrote, and its directory when nothing else is in it."""
        for name in list(self._shards):
            self.drop(name)
        (self.directory / PLAN).unlink(missing_ok=True)
        self._release()
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _holds_something_else(self) -> bool:
        names = {path.name for path in self.directory.iterdir()}
        return PLAN not in names and any(name != LOCK and not name.startswith(TEMPORARY) for name in names)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _refuse_difference(self, found: dict[str, Any]) -> None:
        for path, old, new in _differences(found, self._plan):
            raise UserError(
                f"{self.directory} was made with {path} = {old}, now it is {new}; give another directory or remove it"
            )

    def _side_files(self) -> list[Path]:
        found = []
        for folder, folders, names in os.walk(self.directory):
            folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]  # those are not committed
            found += [Path(folder, name) for name in names if name.endswith(_DONE) and not name.startswith(TEMPORARY)]
        return found

    def _remove_side_files(self) -> None:
        for path in self._side_files():
            path.unlink()
        (self.directory / PLAN).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        for folder, folders, names in os.walk(self.directory):
            for name in [name for name in folders if name.startswith(TEMPORARY)]:
                shutil.rmtree(Path(folder, name), ignore_errors=True)  # its writer may be living, and removes it too
                folders.remove(name)
            for name in names:
                if name.startswith(TEMPORARY):
                    Path(folder, name).unlink(missing_ok=True)


def _parse_manifest(value: dict[str, Any]) -> Manifest:
    shards = tuple(Shard(**shard) for shard in value["shards"])
    return Manifest(**{**value, "shards": shards})


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted path, old, new) for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            where = f"{path}.{key}" if path else key
            yield from _differences(old.get(key, "absent"), new.get(key, "absent"), where)
    elif old != new:
        yield path, old, new
