"""The one exception for what a user can cause."""


class UserError(ValueError):
    """A mistake that the user can mend; entry points print it as one line and exit with code 2.

    The message names the file or flag, what was found, what was expected and the remedy.
    Every other exception is a bug of ours and keeps its traceback.
    """


class MainRankError(UserError):
    """A `UserError` of rank 0 as the other ranks raise it: they stop too, and leave it to rank 0
    to say why."""
