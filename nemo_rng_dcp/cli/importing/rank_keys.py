"""RNG state under rank-named keys of a DCP checkpoint, such as ``rng.3.torch``."""

from __future__ import annotations

import io
import os
import re
from typing import Any

from nemo_rng_dcp.cli.importing import weights_only
from nemo_rng_dcp.cli.importing.rank_states import JobStates, RankStates, generator_of, require_all
from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint, ranks_that_wrote
from nemo_rng_dcp.cli.reading.foreign import find_keys
from nemo_rng_dcp.errors import RNGStateError

_DEVICE = re.compile(r"cuda\w*\.\d+")


def read_keys(checkpoint: Checkpoint) -> JobStates | None:
    """Return the states under a checkpoint's rank-named keys; ``None`` if it has no such key.

    Raises:
        RNGStateError: A rank is missing, or a value is damaged, refused, or no state that is known.
        OSError: A file cannot be read.
    """
    where = checkpoint.where
    found = [(rank, key) for key in find_keys(checkpoint) if (rank := key.rank) is not None]
    if not found:
        return None
    require_all(where, {rank for rank, _ in found}, ranks_that_wrote(checkpoint.files))
    written = os.stat(where).st_mtime_ns  # the last file of a save is put there by renaming it
    ranks: dict[int, RankStates] = {}
    for rank, key in found:
        # A prefix ends with the rank's place.
        of_rank = ranks.setdefault(rank, RankStates(f"{key.prefix[:-1]}{rank}", written, {}))
        if not (name := generator_of(key.key)):
            unknown = "does not say whether it is python, numpy, torch or cuda"
            raise RNGStateError(f"{where}: {key.key} {unknown}")
        known, value = of_rank.states.get(name), _value(checkpoint, key.key)
        # DCP took a list of devices' states apart.
        if _DEVICE.fullmatch(key.rest) and (known is None or isinstance(known, list)):
            value = [*(known or []), value]
        elif known is not None:
            raise RNGStateError(f"{where}: {key.key} is not rank {rank}'s only state of {name}")
        of_rank.states[name] = value
    return JobStates("rank-named keys", where, ranks)


def _value(checkpoint: Checkpoint, key: str) -> Any:
    chunks = list(checkpoint.chunks(key))
    if [chunk.sizes for chunk in chunks] != [checkpoint.keys[key].size]:
        raise RNGStateError(f"{checkpoint.where}: {key} is in {len(chunks)} parts, expected one")
    try:
        content = checkpoint.content(chunks[0])
    except ValueError as error:
        raise RNGStateError(f"{checkpoint.where}: {key}: {error}") from error
    return weights_only.load(io.BytesIO(content), f"{checkpoint.where}: {key}")
