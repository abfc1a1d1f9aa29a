"""The one exception that is meant for a person's eyes."""


class UserError(Exception):
    """A mistake that the user can mend: bad input, bad setting, full disk, dead file.

    The message is one line that names the thing and the remedy. Programs in launch/ and tools/ print it
    without a traceback and exit with status 1; everything else that is raised is a defect of ours.
    """
