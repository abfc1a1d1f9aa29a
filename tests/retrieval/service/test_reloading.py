"""A server follows its database: what cannot be loaded ends nothing and is tried again; three are never held."""

import errno
import gc
import io
import json
import types
import weakref

import pytest

from retro_jax.errors import UserError
from retro_jax.retrieval.service import local
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.local import LocalSource
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.wire import RefusedError

KEEP = 60.0


class Held:
    """A holding of which only the version counts."""

    def __init__(self, name: str, recall: float | None) -> None:
        self.version = pb.Version(database=name, num_shards=1, shards=[0])
        self._recall = recall

    def recall(self) -> float | None:
        return self._recall


class Disk:
    """What a server finds: `name` is the version there, `trouble` what opening it raises; its clock is `now`."""

    def __init__(self, min_recall: float = 0.0) -> None:
        self.name, self.trouble, self.recall, self.now, self.opened = "a", None, 1.0, 1000.0, 0
        self.most_held_at_open = 0
        self._alive = weakref.WeakSet()
        self.log, self.metrics = io.StringIO(), Metrics()
        self.source = LocalSource(
            self._open,
            lambda: self.name,
            log=Log(self.log),
            metrics=self.metrics,
            keep_seconds=KEEP,
            min_recall=min_recall,
        )

    def _open(self) -> Held:
        gc.collect()
        self.most_held_at_open = max(self.most_held_at_open, len(self._alive))
        self.opened += 1
        if self.trouble is not None:
            raise self.trouble
        held = Held(self.name, self.recall)
        self._alive.add(held)
        return held

    @property
    def held(self) -> str:
        return "".join(version.database for version in self.source.versions())

    def events(self, name: str) -> list[dict]:
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [line for line in lines if line["event"] == name]

    def look(self, after: float = 1.0, *, at_once: bool = False, using: str = "") -> str:
        """The versions that are held after a look, so many seconds later, by a server of which these are asked for."""
        self.now += after
        for name in using:
            self.source.using(name)
        self.source.refresh(at_once=at_once)
        return self.held


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(local, "time", types.SimpleNamespace(monotonic=lambda: disk.now))
    disk.source.load()
    return disk


def test_what_failed_is_tried_again_after_growing_pauses_and_at_once_when_asked(disk):
    disk.name, disk.trouble = "b", OSError(errno.EIO, "Input/output error")
    tried = []
    for second in range(100):
        before = disk.opened
        assert disk.look() == "a"
        if disk.opened > before:
            tried.append(second)
    assert tried == [0, 5, 15, 35, 75]
    assert disk.opened == 1 + len(tried) == len(disk.events("reload failed")) + 1
    disk.look(at_once=True)
    assert disk.opened == 7 and disk.held == "a"
    disk.trouble = None  # mended in its place: nothing that a look sees has changed
    assert disk.look() == "a"
    assert disk.look(300) == "ab"
    # Another version is no matter of the failed one's pause.
    disk.name, disk.trouble = "c", UserError("damaged")
    assert disk.look(KEEP + 1) == "b"
    disk.name, disk.trouble = "d", None
    assert disk.look() == "bd"


@pytest.mark.parametrize("trouble", [MemoryError(), RuntimeError("Symlink loop from 'current'"), KeyError("settings")])
def test_whatever_a_reload_raises_the_old_version_answers_on(disk, trouble):
    disk.name, disk.trouble = "b", trouble
    assert disk.look() == "a"
    assert disk.source.version("").database == "a"
    (told,) = disk.events("reload failed")
    assert told["reason"].startswith(type(trouble).__name__)
    assert disk.metrics.reload_failures._value.get() == 1


def test_a_third_version_waits_for_room_and_three_are_never_held(disk):
    disk.name = "b"
    assert disk.look() == "ab"
    disk.name = "c"
    for _ in range(5):
        assert disk.look(KEEP / 2, using="ab") == "ab"  # both are asked for
    assert len(disk.events("reload waits")) == 1
    assert disk.look(KEEP + 1, using="b") == "bc"  # nobody asks for the oldest any more
    assert disk.most_held_at_open == 1
    with pytest.raises(RefusedError, match="not from a"):
        disk.source.version("a")


def test_of_two_versions_the_one_goes_that_nobody_uses(disk):
    """Else a front that stays with the older one, since some shard lacks the newer, would keep a third out for ever."""
    disk.name = "b"
    disk.look()
    disk.name = "c"
    assert disk.look(KEEP + 1, using="a") == "ac"
    assert disk.most_held_at_open == 1
    disk.name, disk.trouble = "d", UserError("damaged")
    assert disk.look(KEEP + 1, using="a") == "a"  # what could not be loaded had its room made all the same
    disk.name, disk.trouble = "c", None
    assert disk.look(using="a") == "ac"


def test_who_asks_for_it_now_does_not_wait_for_room(disk):
    disk.name = "b"
    disk.look()
    disk.name = "c"
    assert disk.look(using="ab", at_once=True) == "bc"
    assert disk.most_held_at_open == 1
    assert [event["database"] for event in disk.events("released")] == ["a"]


def test_recall_below_the_floor_is_refused_nothing_found_too_and_no_probes_pass():
    for recall, floor, said in ((0.79, 0.8, "0.790"), (0.0, 0.8, "0.000")):
        disk = Disk(min_recall=floor)
        disk.recall = recall
        with pytest.raises(UserError, match=rf"recall at k = 2 is {said} .* 0.8 is wanted \(--min_recall\)"):
            disk.source.load()
        assert disk.held == ""
    disk = Disk(min_recall=0.8)
    disk.recall = None
    disk.source.load()
    assert disk.held == "a" and not disk.source.version("").HasField("recall")
    assert str(disk.metrics.recall._value.get()) == "nan"
    disk = Disk(min_recall=0.0)
    disk.recall = 0.0
    disk.source.load()
    assert disk.source.version("").HasField("recall") and disk.metrics.recall._value.get() == 0


def test_a_full_disk_under_the_log_is_no_reason_to_stop(disk, monkeypatch):
    class Full(io.StringIO):
        full = True

        def flush(self) -> None:
            if self.full:
                self.seek(0)
                self.truncate()
                raise OSError(errno.ENOSPC, "No space left on device")

    stream = Full()
    monkeypatch.setattr(disk.source, "_log", Log(stream))
    disk.name, disk.trouble = "b", OSError(errno.ENOSPC, "No space left on device")
    for _ in range(3):
        assert disk.look(1000) == "a"
    stream.full = False
    disk.look(1000)
    assert json.loads(stream.getvalue())["suppressed"] == 3
