"""Exceptions that name what went wrong with a file, or in another process."""


class CheckpointError(ValueError):
    """A saved model or a checkpoint cannot be used: its file is damaged, or it is of another fit.

    The message gives the name of the file, and what was found in it.
    """


class ProcessError(RuntimeError):
    """Another process of ``torch.distributed`` failed, ended, or does something else.

    The message names its rank, and what happened there.
    """
