"""The one exception type that is this library's own."""


class RNGStateError(RuntimeError):
    """An RNG state that cannot be stored or restored.

    The message starts with the generator's name (``numpy: ...``), says what was found and what
    was expected, and what to do next. No stream of this rank has moved, unless the message says
    that one could not be put back.
    """
