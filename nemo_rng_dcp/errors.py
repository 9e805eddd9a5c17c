"""What this library raises and warns with."""


class RNGStateError(RuntimeError):
    """An RNG state that cannot be stored or restored.

    The message names the generator or the row, what was found, what was expected, and what to do
    next. No stream of this rank has moved, unless the message says that one could not be put back.
    """


class RNGStateWarning(UserWarning):
    """Streams are not what one would expect after a load, in a save, or after a scope.

    The message says what. ``warnings.simplefilter("error", RNGStateWarning)`` turns it into an
    error. A load raises it before any stream has moved.
    """
