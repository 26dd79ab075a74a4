"""Exceptions that name what went wrong with a file."""


class CheckpointError(ValueError):
    """A saved model or a checkpoint cannot be used: its file is damaged, or it is of another fit.

    The message gives the name of the file, and what was found in it.
    """
