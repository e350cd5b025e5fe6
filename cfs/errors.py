"""The one exception for what a user can cause."""


class UserError(ValueError):
    """A mistake that the user can mend; entry points print it as one line and exit with code 2.

    The message names the file or flag, what was found, what was expected and the remedy.
    Every other exception is a bug of ours and keeps its traceback.
    """

    exit_code = 2


class NonFiniteError(UserError):
    """A loss or gradient that is not a finite number: the run stops before it takes the step."""

    exit_code = 3


class MainRankError(UserError):
    """A `UserError` of rank 0 as the other ranks raise it: they stop too, with the same exit code,
    and leave it to rank 0 to say why."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code
