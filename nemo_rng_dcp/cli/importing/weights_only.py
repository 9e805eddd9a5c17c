"""What ``torch.save`` wrote, read by torch's unpickler of weights: it executes nothing.

The command's own parser, which takes no more time and memory than there are bytes, looks at a
pickle before. torch's refuses by name whatever is not on its list. To the list are added NumPy's
arrays and numbers, NeMo Automodel's older dataclass, in whose place ``RNGState`` is made, and the
times and the version of torch that Composer keeps beside its states.
"""

from __future__ import annotations

import errno
import os
import re
import zipfile
from datetime import timedelta
from typing import IO, Any

import numpy as np
import torch

from nemo_rng_dcp.cli.reading.pickles import ForbiddenError, parse
from nemo_rng_dcp.cli.reading.tensors import pickle_in
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.rng_state import RNGState

_OLDER_RNG_STATE = "nemo_automodel.components.training.rng.RNGState"


def load(source: IO[bytes], where: str) -> Any:
    """Return what is in a file, on the CPU.

    Args:
        source: The file.
        where: What an error calls it.

    Raises:
        RNGStateError: It is damaged, or names something that is in no RNG state.
        OSError: It cannot be read.
    """
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.int64(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, (RNGState, _OLDER_RNG_STATE)]
    allowed += [timedelta, torch.torch_version.TorchVersion]
    allowed += [type(np.dtype(kind)) for kind in ("uint32", "int32", "int64", "float64")]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # NumPy 2 and 1
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    try:
        with zipfile.ZipFile(source) as archive:
            _, pickled = pickle_in(archive, source.seek(0, os.SEEK_END))
        # torch's unpickler hashes a dict's key, though a few bytes can take for ever.
        parse(pickled, lambda name: True)
        source.seek(0)
        with torch.serialization.safe_globals(allowed):
            return torch.load(source, map_location="cpu", weights_only=True)
    except ForbiddenError as error:
        raise RNGStateError(f"{where}: refused: it holds {error}") from error
    except Exception as error:
        # Of a damaged archive zipfile seeks to a place before the first.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise OSError(error.errno, error.strerror, where) from error
        reason = "damaged, or not written by torch.save"
        if found := re.search(r"(?:GLOBAL|class|function) (\S+)", str(error)):
            reason = f"refused: it names {found[1]}, which is in no RNG state. It was not run"
        raise RNGStateError(f"{where}: {reason}") from error
