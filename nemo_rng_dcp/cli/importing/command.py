"""``nemo-rng-dcp import``: a checkpoint of records, made of what a framework stored by rank."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_rng_dcp import standalone
from nemo_rng_dcp.cli.importing.rank_states import to_records
from nemo_rng_dcp.cli.importing.search import read_states
from nemo_rng_dcp.cli.reading.folder import storage_of
from nemo_rng_dcp.cli.streams import fingerprints
from nemo_rng_dcp.cli.terminal import aligned, paragraph, plural, within
from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.record import KEY, Record


class Import:
    """What was read from a folder and written to another; see ``main.Report``.

    Raises:
        RNGStateError: There is nothing to read, it cannot be read, or the other folder not written.
        OSError: A file cannot be read.
    """

    failed, trouble = False, ""

    def __init__(self, options: argparse.Namespace) -> None:
        folder, out = options.folder, options.out
        if not folder or "://" in folder:
            raise RNGStateError(f"found {folder!r}, expected a folder of this machine's")
        self._job, self._out = read_states(Path(folder)), out
        self._records = to_records(self._job)
        save_records(self._records, out)

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        return {
            "framework": self._job.framework,
            "folder": self._job.where,
            "out": self._out,
            "unread": self._job.unread,
            "rows": self._rows(rows),
        }

    def lines(self, rows: Sequence[range] | None) -> list[str]:
        ranks = plural(len(self._records), "rank")
        lines = [f"{self._job.where}: {self._job.framework}, {ranks}"]
        cells = [
            [str(row["row"]), row["file"], *row["fingerprints"].values()]
            for row in self._rows(rows)
        ]
        lines += aligned(["row", "file", *self._records[0].streams], cells)
        if self._job.unread:
            lines += paragraph(f"note: not read: {', '.join(self._job.unread)}")
        return [*lines, "", f"saved to {self._out}: load it with StatefulRNG.load()"]

    def _rows(self, rows: Sequence[range] | None) -> list[dict[str, Any]]:
        places = {rank: states.place for rank, states in self._job.ranks.items()}
        return [
            {"row": record.row, "file": places[record.row], "fingerprints": fingerprints(record)}
            for record in self._records
            if within(record.row, rows)
        ]


def save_records(records: Sequence[Record], out: str | Path) -> None:
    """Write records as a checkpoint that ``StatefulRNG.load`` and ``dcp.load`` take.

    Raises:
        RNGStateError: There is something at ``out``, or it cannot be written to.
    """
    storage, path = storage_of(os.fspath(out))
    # An older record is not replaced: to read what it is, DCP would unpickle its .metadata.
    if storage.exists(path) and storage.ls(path):
        raise RNGStateError(f"{out}: it is there already, expected a new folder or an empty one")
    whole = torch.cat([record.to_tensor() for record in records])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        standalone.save(lambda: {KEY: whole}, out, None)
