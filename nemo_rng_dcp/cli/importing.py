"""``nemo-rng-dcp import``: a checkpoint of records, made of what a framework stored by rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_rng_dcp import standalone
from nemo_rng_dcp.cli.checkpoint.checkpoint import is_record
from nemo_rng_dcp.cli.checkpoint.dcp_metadata import metadata_files, read_metadata
from nemo_rng_dcp.cli.checkpoint.folder import MissingFolderError, open_folder
from nemo_rng_dcp.cli.frameworks.rank_states import to_records
from nemo_rng_dcp.cli.frameworks.search import read_states
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
        text = f"nothing was saved to {out}, name another folder: {error}"
        raise RNGStateError(text) from error
    others = sorted(key for key, stored in found if not is_record(key, stored))
    if others:
        raise RNGStateError(
            f"{out} holds a checkpoint of other things ({others[0]}, for one), which would be "
            f"lost. Save the records to a folder of their own, such as {out}/rng."
        )
    for name in files:
        folder.remove(name)
