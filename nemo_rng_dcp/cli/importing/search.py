"""The states of a job's ranks, wherever a framework has left them in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from nemo_rng_dcp.cli.importing import rank_files
from nemo_rng_dcp.cli.importing.rank_keys import read_keys
from nemo_rng_dcp.cli.importing.rank_states import JobStates
from nemo_rng_dcp.cli.reading.checkpoint import ranks_that_wrote
from nemo_rng_dcp.cli.reading.folder import Folder
from nemo_rng_dcp.cli.reading.foreign import find_foreign
from nemo_rng_dcp.cli.reading.opening import checkpoint_in, checkpoints_below
from nemo_rng_dcp.errors import RNGStateError

_Found = TypeVar("_Found", rank_files.Files, JobStates)


def read_states(where: Path) -> JobStates:
    """Return the states of a job's ranks from a folder, one below it, or Composer's file.

    Files that a known framework writes for its ranks are taken first, then rank-named keys of a DCP
    checkpoint, then other files with a rank in their names.

    Raises:
        RNGStateError: There are none, or those of several checkpoints; or they cannot be read.
        OSError: A file cannot be read.
    """
    if where.is_file():
        alone = rank_files.Files(rank_files.COMPOSER, where.parent, {0: where.name})
        return rank_files.read_files(alone)
    folder = Folder(str(where))
    folders = [folder]
    for name in folder.folders:
        with suppress(OSError):  # a folder of somebody else's
            folders.append(Folder(folder.path_of(name)))
    found = [files for inside in folders for files in rank_files.find_files(inside)]
    if known := [files for files in found if files.naming is not rank_files.OTHER]:
        return rank_files.read_files(_only_one(where, known))
    below, error = checkpoints_below(folder)
    checkpoints = [*filter(None, [checkpoint_in(folder)]), *below]
    jobs = [job for checkpoint in checkpoints if (job := read_keys(checkpoint))]
    if jobs:
        return _only_one(where, jobs)
    if found:
        return rank_files.read_files(_only_one(where, found))
    if error is not None:
        raise error
    notes = [note for inside in folders for note in rank_files.not_read(inside)]
    notes += [
        note
        for checkpoint in checkpoints
        for state in find_foreign(checkpoint)
        for note in state.notes(ranks_that_wrote(checkpoint.files))
    ]
    raise RNGStateError(
        f"{where}: no RNG files of a rank in it or in a folder below, such as random_states_0.pkl "
        f"(Accelerate), and no rank-named keys of a DCP checkpoint. {' '.join(notes)}"
    )


def _only_one(where: Path, found: Sequence[_Found]) -> _Found:
    if len(found) > 1:
        places = ", ".join(map(str, found[:6]))
        raise RNGStateError(f"{where}: {len(found)} checkpoints have RNG state, name one: {places}")
    return found[0]
