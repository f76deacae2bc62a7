"""The one error of this package."""


class LoraError(ValueError):
    """A setting, a model, a tensor or a directory that an adapter cannot take. The message says what would do."""
