"""The states of a job's ranks, wherever a framework has left them in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from nemo_rng_dcp.cli.importing.rank_files import COMPOSER, OTHER, Files, find_files, read_files
from nemo_rng_dcp.cli.importing.rank_keys import read_keys
from nemo_rng_dcp.cli.importing.rank_states import JobStates
from nemo_rng_dcp.cli.reading.checkpoint import ranks_that_wrote
from nemo_rng_dcp.cli.reading.folder import Folder
from nemo_rng_dcp.cli.reading.foreign import find_foreign
from nemo_rng_dcp.cli.reading.opening import checkpoint_in, checkpoints_in
from nemo_rng_dcp.errors import RNGStateError

_Found = TypeVar("_Found", Files, JobStates)


def read_states(where: Path) -> JobStates:
    """Return the states of a job's ranks from a folder, one below it, or Composer's file.

    Files that a known framework writes for its ranks are taken first, then rank-named keys of a DCP
    checkpoint, then other files with a rank in their names.

    Raises:
        RNGStateError: There are none, or those of several checkpoints; or they cannot be read.
        OSError: A file cannot be read.
    """
    if where.is_file():
        return read_files(Files(COMPOSER, where.parent, {0: where.name}))
    folder = Folder(str(where))
    folders = folder.below()
    found = [files for inside in (folder, *folders) for files in find_files(inside)]
    of_ranks = [files for files in found if not files.naming.refused]
    if known := [files for files in of_ranks if files.naming is not OTHER]:
        return read_files(_only_one(where, known))
    below, error = checkpoints_in(folders)
    checkpoints = [*filter(None, [checkpoint_in(folder)]), *below]
    if jobs := [job for checkpoint in checkpoints if (job := read_keys(checkpoint))]:
        return _only_one(where, jobs)
    if of_ranks:
        return read_files(_only_one(where, of_ranks))
    if error is not None:
        raise error
    notes = [f"Found {files.first}: {files.naming.refused}." for files in found]
    for checkpoint in checkpoints:
        writers = ranks_that_wrote(checkpoint.files)
        notes += [note for state in find_foreign(checkpoint) for note in state.verdict(writers)[0]]
    raise RNGStateError(
        f"{where}: no RNG files of a rank in it or in a folder below, such as random_states_0.pkl "
        f"(Accelerate), and no rank-named keys of a DCP checkpoint. {' '.join(notes)}"
    )


def _only_one(where: Path, found: Sequence[_Found]) -> _Found:
    if len(found) > 1:
        places = ", ".join(map(str, found[:6]))
        raise RNGStateError(f"{where}: {len(found)} checkpoints have RNG state, name one: {places}")
    return found[0]
