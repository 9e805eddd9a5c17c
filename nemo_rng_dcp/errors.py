"""What this library raises and warns with."""

import sys
import warnings


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


def warn(message: str) -> None:
    """Warn (``RNGStateWarning``), naming the first line outside of this library and of torch.

    Every time: Python hides a second equal warning of one line, and a second load has to be told.
    """
    warnings.warn_explicit(message, RNGStateWarning, *caller())


def caller() -> tuple[str, int]:
    """Return file and line of the call that led here from outside of this library and of torch."""
    frame = sys._getframe()
    while frame.f_back is not None and _package(frame.f_globals) in ("nemo_rng_dcp", "torch"):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _package(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]
