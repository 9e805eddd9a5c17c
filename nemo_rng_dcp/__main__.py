"""The command ``nemo-rng-dcp``, also ``python -m nemo_rng_dcp``: inspect, diff, explain."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_rng_dcp.errors import RNGStateError
from nemo_rng_dcp.tools import report
from nemo_rng_dcp.tools.comparison import compare
from nemo_rng_dcp.tools.findings import Finding, Streams, examine, examine_foreign
from nemo_rng_dcp.tools.foreign import find_foreign, ranks_that_wrote
from nemo_rng_dcp.tools.metadata import CheckpointMetadata
from nemo_rng_dcp.tools.reading import read_entries
from nemo_rng_dcp.tools.resume import REFUSED, predict, rows_of_ranks
from nemo_rng_dcp.tools.terminal import Progress, Style, plural

CLEAN, FINDINGS, TROUBLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options, Style(sys.stdout))
        sys.stdout.flush()
        return code
    except (RNGStateError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader (head, less) has seen enough; Python would complain of it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return TROUBLE
        # What an error quotes may come from the checkpoint: no control codes, and in one line.
        text = "".join(c if c.isprintable() else " " for c in str(error))
        print(f"nemo-rng-dcp: {' '.join(text.split())}", file=sys.stderr)
        return TROUBLE


def inspect(options: argparse.Namespace, style: Style) -> int:
    """Print the streams of a checkpoint and what is wrong with them."""
    metadata = CheckpointMetadata(options.checkpoint)
    entries = _streams(options.checkpoint, metadata)
    others = find_foreign(metadata, [streams.key for streams in entries])
    findings, notes = [each for streams in entries for each in streams.findings], []
    for state in others:
        more, its_notes = examine_foreign(state, ranks_that_wrote(metadata.files()))
        findings += more
        notes += its_notes
    if not entries and not others:
        findings.append(Finding("", "", (), "no RNG state in it: a resume restores no stream"))
    if options.json:
        _print_json(
            checkpoint=str(options.checkpoint),
            entries=[_streams_json(streams, options.rows) for streams in entries],
            others=[
                {"path": state.path, "ranks": sorted(state.ranks), "keys": list(state.contents)}
                for state in others
            ],
            findings=[asdict(finding) for finding in findings],
            notes=notes,
        )
    else:
        lines = [
            line for each in entries for line in report.streams_lines(each, options.rows, style)
        ]
        lines += [line for state in others for line in report.foreign_lines(state, style)]
        print("\n".join([*lines, *report.finding_lines(findings, notes, style)]))
    return FINDINGS if findings else CLEAN


def diff(options: argparse.Namespace, style: Style) -> int:
    """Print which streams differ between two checkpoints."""
    a, b = (_streams_or_trouble(folder) for folder in (options.a, options.b))
    comparisons = compare(a, b)
    differing = any(found.differing for found in comparisons)
    if options.json:
        _print_json(
            a=str(options.a),
            b=str(options.b),
            entries=[
                {
                    "key": found.key,
                    "remarks": found.remarks,
                    "damaged": found.damaged,
                    "differing": found.differing,
                }
                for found in comparisons
            ],
        )
    else:
        for found in comparisons:
            print("\n".join(report.comparison_lines(found, options.rows, style)))
    for side in ("A", "B"):
        if damaged := sum(found.damaged[side] for found in comparisons):
            raise RNGStateError(
                f"{plural(damaged, 'row')} of {side} missing or damaged, not compared; see inspect"
            )
    return FINDINGS if differing else CLEAN


def explain(options: argparse.Namespace, style: Style) -> int:
    """Print what a resume would do to each stream."""
    ranks = rows_of_ranks(options.world_size, options.mesh, options.along)
    entries = _streams_or_trouble(options.checkpoint)
    resumes = [
        predict(streams, ranks, ranked=options.ranked, generators=options.generators)
        for streams in entries
    ]
    if options.json:
        _print_json(
            checkpoint=str(options.checkpoint),
            entries=[{**asdict(each), "needs_planner": each.needs_planner} for each in resumes],
        )
    else:
        for streams, resume in zip(entries, resumes, strict=True):
            print("\n".join(report.resume_lines(streams, resume, options.rows, style)).rstrip())
    refused = any(fate.fate == REFUSED for resume in resumes for fate in resume.fates)
    return FINDINGS if refused else CLEAN


def _streams(folder: Path, metadata: CheckpointMetadata) -> list[Streams]:
    progress = Progress(f"reading {folder.name}")
    try:
        return [examine(entry) for entry in read_entries(folder, metadata, progress)]
    finally:
        progress.close()


def _streams_or_trouble(folder: Path) -> list[Streams]:
    streams = _streams(folder, CheckpointMetadata(folder))
    if not streams:
        raise RNGStateError(f"{folder}: no StatefulRNG's tables in it; see inspect")
    return streams


def _streams_json(streams: Streams, rows: Sequence[range] | None) -> dict[str, Any]:
    return {
        "key": streams.key,
        "rows": streams.count,
        "generators": streams.generators,
        "streams": [
            {"row": row, "origin": asdict(streams.origins[row]), "digests": digests}
            for row, digests in streams.digests.items()
            if report.within(row, rows)
        ],
    }


def _print_json(**content: Any) -> None:
    print(json.dumps(content, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-rng-dcp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser(
        "inspect",
        help="the streams in a checkpoint, and what is wrong with them",
        epilog="exit code: 0 clean, 1 findings, 2 the checkpoint cannot be read",
    )
    one.add_argument("checkpoint", type=Path)
    one.set_defaults(command=inspect)

    two = commands.add_parser(
        "diff",
        help="the streams that differ between two checkpoints",
        epilog="exit code: 0 the same, 1 different, 2 a checkpoint cannot be read",
    )
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    two.set_defaults(command=diff)

    three = commands.add_parser(
        "explain",
        help="what a resume would do to each stream",
        epilog="exit code: 0 it loads, 1 a load would raise, 2 the checkpoint cannot be read",
    )
    three.add_argument("checkpoint", type=Path)
    three.add_argument("--world-size", type=_positive, required=True, metavar="N")
    three.add_argument("--mesh", type=_mesh, help="the resumed job's mesh, such as dp=4,tp=2")
    three.add_argument(
        "--along",
        type=lambda text: text.split(","),
        metavar="DIMS",
        help="the mesh's dimensions along which streams differ, such as dp (default: all)",
    )
    three.add_argument(
        "--ranked",
        action=argparse.BooleanOptionalAction,
        help="the resumed job's StatefulRNG(ranked=...) (default: as it was saved)",
    )
    three.add_argument(
        "--generators",
        type=lambda text: text.split(","),
        metavar="NAMES",
        help="what the resumed job has, such as python,numpy,torch,cuda",
    )
    three.set_defaults(command=explain)

    for command in (one, two, three):
        command.add_argument("--rows", type=_rows, help="only these rows, such as 12,40-44")
        command.add_argument("--json", action="store_true", help="for machines")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks, expected 1 or more")
    return int(text)


def _rows(text: str) -> list[range]:
    spans = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is no list of rows such as 12,40-44")
        if int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"{part!r} ends before it begins")
        spans.append(range(int(first), int(last or first) + 1))
    return spans


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name or name in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} is no mesh such as dp=4,tp=2")
        sizes[name] = _positive(size)
    return sizes


if __name__ == "__main__":
    sys.exit(main())
