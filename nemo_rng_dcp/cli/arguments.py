"""What ``nemo-rng-dcp`` can be asked: its commands and their arguments."""

from __future__ import annotations

import argparse
import re
from inspect import cleandoc

from nemo_rng_dcp.versions import __version__

_MOST_RANKS = 2**20
"""More than any job has; each is a line of what is explained."""
_WHERE = "a checkpoint's folder, or a URL such as s3://bucket/step-1000"


def parser() -> argparse.ArgumentParser:
    """Return the parser; of what it returns, ``command`` names the command."""
    whole = argparse.ArgumentParser(
        prog="nemo-rng-dcp",
        description="Show, compare and explain the random streams in a checkpoint. It reads the "
        "checkpoint in one process without a GPU, executes nothing in it and changes nothing in "
        "it. Only import writes: a new checkpoint, to OUT.",
    )
    whole.add_argument("--version", action="version", version=f"nemo-rng-dcp {__version__}")
    commands = whole.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for describe in (_inspect, _diff, _explain, _import):
        # The docstring is what --help prints: what the command prints, then the rest.
        text, _, epilog = cleandoc(describe.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            describe.__name__.strip("_"),
            help=text.removeprefix("Print ").removesuffix("."),
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        describe(command)
        command.add_argument("--rows", type=_rows, help="list only these rows, such as 12,40-44")
        command.add_argument("--json", action="store_true", help="see docs/command.md")
    return whole


def _inspect(command: argparse.ArgumentParser) -> None:
    """Print the streams in a checkpoint, and what is wrong with them.

    examples:
      nemo-rng-dcp inspect runs/step-1000
      nemo-rng-dcp inspect runs/step-1000 --rows 0-7

    exit code: 0 as expected, 1 findings, 2 the checkpoint cannot be read
    """
    command.add_argument("checkpoint", help=_WHERE)
    command.add_argument(
        "--fail-on",
        choices=["damage", "lost", "suspicious"],
        default="lost",
        help="exit with 1 for findings of this severity or a worse one (default: lost)",
    )


def _diff(command: argparse.ArgumentParser) -> None:
    """Print the streams that differ between two checkpoints.

    examples:
      nemo-rng-dcp diff run-a/step-1000 run-b/step-1000
      nemo-rng-dcp diff run-a/step-1000 run-b/step-1000 --rows 3 --json

    exit code: 0 the same, 1 different, 2 a checkpoint cannot be read
    """
    command.add_argument("a", help=_WHERE)
    command.add_argument("b", help="another one's")


def _explain(command: argparse.ArgumentParser) -> None:
    """Print what a resume would do to each stream.

    examples:
      nemo-rng-dcp explain runs/step-1000 --world-size 8
      nemo-rng-dcp explain runs/step-1000 --world-size 8 --mesh dp=4,tp=2 --along dp

    exit code: 0 it loads, 1 a load would raise, 2 the checkpoint cannot be read
    """
    command.add_argument("checkpoint", help=_WHERE)
    command.add_argument("--entry", help="only this entry, by its key, such as rng")
    about = "What is left out is as it was saved. All but the first two are about one entry."
    job = command.add_argument_group("the job that resumes", about)
    job.add_argument("--world-size", type=_positive, required=True, help="its number of ranks")
    job.add_argument("--mesh", type=_mesh, help="such as dp=4,tp=2 (left out: one row per rank)")
    job.add_argument("--along", type=_names, help="where its streams differ, such as dp")
    job.add_argument("--logical-ranks", type=_positive, help="its logical_ranks=")
    job.add_argument("--ranked", action=argparse.BooleanOptionalAction, help="its ranked=")


def _import(command: argparse.ArgumentParser) -> None:
    """Print the streams that a framework stored by rank, and write them as a checkpoint of records.

    examples:
      nemo-rng-dcp import runs/checkpoint-1000 runs/checkpoint-1000-rng

    exit code: 0 written, 2 they cannot be read or the checkpoint not written
    """
    command.add_argument("folder", help="a framework's checkpoint; of Composer's, the file")
    command.add_argument("out", help="the new folder or URL to write to")


def _positive(text: str) -> int:
    # int() refuses thousands of digits in an error of its own.
    if not text.isdecimal() or len(text) > 9 or not 0 < int(text) <= _MOST_RANKS:
        expected = f"expected 1 to {_MOST_RANKS:,}"
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no number of ranks, {expected}")
    return int(text)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names such as dp,tp")
    return names


def _rows(text: str) -> list[range]:
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of rows such as 12,40-44")
        spans.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return spans


def _mesh(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name or name in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} is no mesh such as dp=4,tp=2")
        sizes[name] = _positive(size)
    return sizes
