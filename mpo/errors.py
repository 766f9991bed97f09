"""The one exception that the command line turns into a short message instead of a traceback."""


class UserError(Exception):
    """Something that the user can mend: says what was wrong, where, and what to do.

    Raised for bad configurations, data, models, checkpoints and folders. `mpo` prints the message and exits with status 2.
    """
