"""Errors that a trainer raises on purpose, beside the InputError of core."""

from miles_core.errors import MilesError


class NonFiniteError(MilesError):
    """The loss or a gradient was not finite; raised on every rank before the optimizer moved."""

    exit_code = 5


class CheckpointError(MilesError):
    """A checkpoint cannot be written, or what lies on disk is not a complete one."""

    exit_code = 5
