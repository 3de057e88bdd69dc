"""What goes wrong, as one sentence that says why and what to do."""


class UsageError(Exception):
    """The command cannot do what was asked; the message is one sentence that says why and what to do."""


class DataError(UsageError):
    """Wrong or missing data."""


def brief(error: BaseException) -> str:
    """Returns the first line of an error, for a parenthesis in ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
