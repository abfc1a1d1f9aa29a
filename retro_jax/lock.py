"""One writer at a time: a lock on a directory that the kernel releases when its holder ends, also by SIGKILL.

The lock is `flock` on a file `.lock` in the directory, which says who holds it. On NFS, Linux passes flock on to the
server, so it also holds between machines, where the server's lock service runs; a mount with `nolock` or
`local_lock=flock` sees this machine alone. A Lustre client needs the mount option `flock`. A file system without locks
is said on stderr and used all the same.

A host that vanishes releases nothing by itself. A server of NFS 4 forgets its locks after a minute or two, one of NFS 3
when the host comes back, which a virtual machine may never do. So a lock of another host is waited for, and where it
stays, the message says how to give it up: by removing the file, which makes it the lock of nothing.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from retro_jax.errors import TemporaryError, UserError

LOCK = ".lock"
_LEASE_SECONDS = 120.0  # a server of NFS 4 takes 90 by default
_PAUSE_SECONDS = 0.5
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class DirectoryLock:
    """Holds a directory from its creation until `release`, or until the process ends; a context manager as well."""

    def __init__(self, directory: str | os.PathLike, remedy: str, *, patience: float = _LEASE_SECONDS) -> None:
        """Takes the lock: at once or not at all where a process of this host has it.

        Args:
          directory: an existing one.
          remedy: what to do when it is taken, for the message.
          patience: seconds to wait for the lock of another host, which may be gone.

        Raises:
          UserError: another process of this host holds it; named by host, process id and since when.
          TemporaryError: one of another host does, and did so all the time.
        """
        self._path = Path(directory) / LOCK
        self._descriptor: int | None = None
        deadline = None
        while not self._take():
            holder = _holder(self._path)
            if _is_here(holder):
                raise UserError(f"{directory} is in use by {_in_words(holder)}; {remedy}")
            if deadline is None:
                deadline = time.monotonic() + patience
                waiting = f"{directory} is in use by {_in_words(holder)}; waiting for it up to {patience:g} s"
                print(waiting, file=sys.stderr, flush=True)
            if time.monotonic() >= deadline:
                raise TemporaryError(
                    f"{directory} is in use by {_in_words(holder)}; {remedy}; if that host is gone, remove {self._path}"
                )
            time.sleep(_PAUSE_SECONDS)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        content = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "since": since}
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, (json.dumps(content) + "\n").encode(), 0)
        except OSError as error:
            self.release()
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def release(self) -> None:
        """Gives the directory free and removes the file; a second call does nothing."""
        if self._descriptor is None:
            return
        if self._is_current():  # else it was given up for us, and the file is another's
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self) -> bool:
        """Whether the lock was free, and is ours now."""
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    os.close(self._descriptor)
                    self._descriptor = None
                    if isinstance(error, BlockingIOError):
                        return False
                    raise
                print(
                    f"{self._path.parent}: this file system has no locks ({error.strerror}); see to it that one run "
                    "uses it",
                    file=sys.stderr,
                )
            if self._is_current():
                return True
            os.close(self._descriptor)  # its last holder removed the file while we waited for it

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def _boot() -> str:
    """Tells this machine since it was started from any other; a host name may be another machine's next time."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _holder(path: Path) -> dict[str, object]:
    """What the file says of its holder; nothing when it has just taken the lock, or has just gone."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_here(holder: dict[str, object]) -> bool:
    """Whether it is a process of this very machine, which lives as long as it holds the lock."""
    return holder.get("boot") == _boot()


def _in_words(holder: dict[str, object]) -> str:
    if not {"pid", "host", "since"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
