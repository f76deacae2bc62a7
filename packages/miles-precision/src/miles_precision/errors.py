"""The one error of this package."""


class FormatError(ValueError):
    """A tensor, a set of parts, a shape or a name that a format cannot take. The message says what would do."""
