"""The one exception type that is this library's own."""


class RNGStateError(RuntimeError):
    """An RNG state that cannot be stored or restored.

    The message starts with the generator's name (``numpy: ...``), says what was found and what
    was expected, and ends with what to do next. Whenever it is raised, every stream is where it
    was before the call.
    """
