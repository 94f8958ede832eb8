"""Errors of this library."""


class CheckpointError(Exception):
    """A checkpoint could not be written or read. The message names the file and the tensor."""
