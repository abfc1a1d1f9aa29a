"""One writer at a time: a lock on a directory that the kernel releases when its holder ends, also by SIGKILL.

The lock is `flock` on a file `.lock` in the directory, which says who holds it. On NFS, Linux passes flock on to the
server, so it also holds between machines, where the server's lock service runs; a mount with `nolock` or
`local_lock=flock` sees this machine alone. A Lustre client needs the mount option `flock`. A file system without locks
is said on stderr and used all the same.
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

from retro_jax.errors import UserError

LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class DirectoryLock:
    """Holds a directory from its creation until `release`, or until the process ends; a context manager as well."""

    def __init__(self, directory: str | os.PathLike, remedy: str) -> None:
        """Takes the lock at once or not at all.

        Args:
          directory: an existing one.
          remedy: what to do when it is taken, for the message.

        Raises:
          UserError: another process holds it; named by host, process id and since when.
        """
        self._path = Path(directory) / LOCK
        while True:
            self._descriptor: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(self._path)
                os.close(self._descriptor)
                raise UserError(f"{directory} is in use by {holder}; {remedy}") from None
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    os.close(self._descriptor)
                    raise
                print(
                    f"{directory}: this file system has no locks ({error.strerror}); see to it that one run uses it",
                    file=sys.stderr,
                )
            if self._is_current():
                break
            os.close(self._descriptor)  # its last holder removed the file while we waited for it
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content.encode(), 0)
        except OSError as error:
            self.release()
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def release(self) -> None:
        """Gives the directory free and removes the file; a second call does nothing."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(descriptor)

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def _holder(path: Path) -> str:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return f"process {known['pid']} on {known['host']} since {known['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock, or has just gone
        return "another process"
