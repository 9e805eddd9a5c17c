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

_COMPOSER = re.compile(r"rng\.\d+\.(python|numpy|torch|cuda)")
_DEVICE = re.compile(r"cuda\w*\.(\d+)")
_NO_GLOBAL_RANK = re.compile(r"[a-z]_rank")


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
    values: dict[tuple[int, str], dict[int | None, Any]] = {}
    for rank, key in found:
        # A prefix ends with the rank's place.
        ranks.setdefault(rank, RankStates(f"{key.prefix[:-1]}{rank}", written, {}))
        # DCP took a list of devices' states apart.
        match = _DEVICE.fullmatch(key.rest)
        device = int(match[1]) if match else None
        if not (name := generator_of(key.key)):
            unknown = "does not say whether it is python, numpy, torch or cuda"
            raise RNGStateError(f"{where}: {key.key} {unknown}")
        states = values.setdefault((rank, name), {})
        if device in states or (states and None in (device, *states)):
            raise RNGStateError(f"{where}: {key.key} is not rank {rank}'s only state of {name}")
        states[device] = _value(checkpoint, key.key)
    for (rank, name), states in values.items():
        ordered = [states[device] for device in sorted(states, key=lambda device: device or 0)]
        ranks[rank].states[name] = ordered[0] if None in states else ordered
    composer = all(_COMPOSER.fullmatch(key.key) for _, key in found)
    global_ranks = not any(_NO_GLOBAL_RANK.search(key.key.lower()) for _, key in found)
    return JobStates("Composer" if composer else "rank-named keys", where, ranks, global_ranks)


def _value(checkpoint: Checkpoint, key: str) -> Any:
    chunks = list(checkpoint.chunks(key))
    if [chunk.sizes for chunk in chunks] != [checkpoint.keys[key].size]:
        raise RNGStateError(f"{checkpoint.where}: {key} is in {len(chunks)} parts, expected one")
    try:
        content = checkpoint.content(chunks[0])
    except ValueError as error:
        raise RNGStateError(f"{checkpoint.where}: {key}: {error}") from error
    return weights_only.load(io.BytesIO(content), f"{checkpoint.where}: {key}")
