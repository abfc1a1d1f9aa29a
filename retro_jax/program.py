"""How a program of launch/ or tools/ starts and how it fails: flags, one-line errors, exit status."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from retro_jax.errors import UserError


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Parses flags, runs `main`, and turns a user's mistake into one line on stderr and exit status 1.

    Unknown flags are mistakes (absl names the nearest flag), and so are positional arguments unless `positional`, when
    `main` gets their list. A full disk, a missing file and a refused permission are reported with the file's name.
    SIGINT exits with 130.
    """

    def checked(arguments: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every step of theirs at INFO
        # Orbax logs the traceback of a failed save and raises it as well; the raised one becomes the one line.
        logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
        if len(arguments) > 1 and not positional:
            _fail(f"unexpected argument {arguments[1]!r}; every option is a --flag (try --help)")
        try:
            main(list(arguments[1:])) if positional else main()
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output has gone, and Python would complain when it flushes
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            _fail(f"{name}{_MESSAGES.get(error.errno, error.strerror or str(error))}")

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow complains of GPUs that it does not need
    app.run(checked, flags_parser=_parse_flags)


_MESSAGES = {
    errno.ENOSPC: "no space left on the device; free some and run the same command again, finished parts are kept",
    errno.EDQUOT: "disk quota exceeded; free some and run the same command again, finished parts are kept",
    errno.ENOENT: "no such file or directory",
    errno.EACCES: "permission denied",
    errno.EROFS: "read-only file system",
    errno.EISDIR: "is a directory, expected a file",
    errno.ENOTDIR: "a part of the path is not a directory",
}


def _parse_flags(arguments: Sequence[str]) -> list[str]:
    for argument in arguments:
        if not argument.isprintable() and any("\ud800" <= character <= "\udfff" for character in argument):
            _fail(f"argument {argument!r} is not valid UTF-8")
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(" ".join(str(error).split()))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
