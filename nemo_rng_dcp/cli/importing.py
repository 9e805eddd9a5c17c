"""``nemo-rng-dcp import``: a checkpoint of records, made of what a framework stored by rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nemo_rng_dcp import standalone
from nemo_rng_dcp.cli.checkpoint.checkpoint import (
    checkpoint_in,
    checkpoints_below,
    is_record,
    metadata_files,
    read_metadata,
)
from nemo_rng_dcp.cli.checkpoint.folder import MissingFolderError, open_folder
from nemo_rng_dcp.cli.frameworks.foreign import find_foreign, ranks_that_wrote
from nemo_rng_dcp.cli.frameworks.rank_files import COMPOSER, Files, find_files, read_files
from nemo_rng_dcp.cli.frameworks.rank_keys import read_keys
from nemo_rng_dcp.cli.frameworks.rank_states import JobStates, to_records
from nemo_rng_dcp.cli.terminal import Style, plural, table, visible, within
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.record import KEY, Record, fingerprint


class Import:
    """What was read from a folder and written to another.

    Raises:
        RNGStateError: There is nothing to read, it cannot be read, or the other folder not written.
        OSError: A file cannot be read.
    """

    def __init__(self, folder: str, out: str) -> None:
        if not folder or "://" in folder:
            raise RNGStateError(f"found {folder!r}, expected a folder of this machine's")
        self._job, self._out = read_states(Path(folder)), out
        self._records = to_records(self._job)
        save_records(self._records, out)

    def lines(self, rows: Sequence[range] | None, style: Style) -> list[str]:
        """Return the text; ``rows`` are those to list, ``None``: all."""
        header = ["row", "file", *self._records[0].streams]
        cells = [
            [str(row), visible(place), *digests.values()]
            for row, place, digests in self._rows(rows)
        ]
        return [
            f"{visible(self._job.where)}: {self._job.framework}, "
            f"{plural(len(self._records), 'rank')}",
            *table(header, cells, style),
            *([f"note: not read: {', '.join(self._job.unread)}"] if self._job.unread else []),
            "",
            f"saved to {visible(self._out)}: load it with StatefulRNG.load()",
        ]

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        """Return what ``--json`` prints, see docs/command.md."""
        return {
            "framework": self._job.framework,
            "folder": self._job.where,
            "out": self._out,
            "unread": self._job.unread,
            "rows": [
                {"row": row, "file": place, "streams": digests}
                for row, place, digests in self._rows(rows)
            ],
        }

    def _rows(self, rows: Sequence[range] | None) -> list[tuple[int, str, dict[str, str]]]:
        return [
            (
                record.row,
                self._job.ranks[record.row].place,
                {name: fingerprint(its.state) for name, its in record.streams.items()},
            )
            for record in self._records
            if within(record.row, rows)
        ]


def read_states(where: Path) -> JobStates:
    """Return the states of a job's ranks from a folder, one below it, or Composer's file.

    Files that a framework writes for its ranks are taken first, then rank-named keys of a DCP
    checkpoint.

    Raises:
        RNGStateError: There are none, or those of several checkpoints; or they cannot be read.
        OSError: A file cannot be read.
    """
    if where.is_file():
        return read_files(Files(COMPOSER, where.parent, {0: where.name}))
    folder = open_folder(str(where))
    found = find_files(folder)
    for name in folder.folders:
        with suppress(OSError):  # a folder of somebody else's
            found += find_files(folder.inner(name))
    if len(found) == 1:
        return read_files(found[0])
    if found:
        places = ", ".join(map(str, found[:6]))
        raise RNGStateError(
            f"{where}: the RNG files of {len(found)} checkpoints, name one: {places}"
        )
    below, error = checkpoints_below(folder)
    checkpoints = [*filter(None, [checkpoint_in(folder)]), *below]
    jobs = [job for each in checkpoints if (job := read_keys(each))]
    if len(jobs) == 1:
        return jobs[0]
    if jobs:
        places = ", ".join(job.where for job in jobs[:6])
        raise RNGStateError(f"{where}: {len(jobs)} checkpoints have RNG state, name one: {places}")
    if error is not None:
        raise error
    notes = [
        note
        for each in checkpoints
        for state in find_foreign(each)
        for note in state.notes(ranks_that_wrote(each.files))
    ]
    raise RNGStateError(
        f"{where}: no RNG files of a rank in it or in a folder below, such as "
        "rng/rng_global_rank_0.pt (NeMo Automodel), random_states_0.pkl (Accelerate) or "
        f"rng_state_0.pth (Transformers), and no rank-named keys of a DCP checkpoint. "
        f"{' '.join(notes)}"
    )


def save_records(records: list[Record], out: str | Path) -> None:
    """Write records as a checkpoint that ``StatefulRNG.load`` and ``dcp.load`` take.

    Raises:
        RNGStateError: The folder holds a checkpoint of other things or one that cannot be read, or
            it cannot be written to.
        OSError: An earlier record cannot be read or removed.
    """
    _make_room(os.fspath(out))
    whole = torch.cat([record.to_tensor() for record in records])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "Detected an existing checkpoint")
        standalone.save(lambda: {KEY: whole}, out, None)


def _make_room(out: str) -> None:
    """Remove an earlier record, before DCP unpickles it, which executes what is in it."""
    try:
        folder = open_folder(out)
    except MissingFolderError:
        return
    files = metadata_files(folder).values()
    try:
        found = [item for name in files for item in read_metadata(folder, name).keys.items()]
    except RNGStateError as error:
        raise RNGStateError(f"nothing was saved to {out}: {error}") from error
    others = sorted(key for key, stored in found if not is_record(key, stored))
    if others:
        raise RNGStateError(
            f"{out} holds a checkpoint of other things ({others[0]}, for one), which would be "
            f"lost. Save the records to a folder of their own, such as {out}/rng."
        )
    for name in files:
        folder.remove(name)
