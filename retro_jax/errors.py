"""The exceptions that are meant for a person's eyes."""

import os
from typing import ClassVar


class UserError(Exception):
    """A mistake that the user can mend: bad input, bad setting, full disk, dead file.

    The message is one line that names the thing and the remedy. Programs in launch/ and tools/ print it
    without a traceback and exit with `exit_status`, 1; everything else that is raised is a defect of ours.
    """

    exit_status: ClassVar[int] = 1


class TemporaryError(UserError):
    """Something to wait for, and no mistake: a host that is not there yet, or one that is gone and still holds a lock.

    Exit status 75: a launcher may start the same command again.
    """

    exit_status = os.EX_TEMPFAIL


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError unless the value of a setting is one of those it can have."""
    require(value in choices, f"{name}: {value!r} is none of {', '.join(choices)}")
