"""The command line of ``nemo-rng-dcp``, also ``python -m nemo_rng_dcp``, and its exit codes."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from nemo_rng_dcp import __version__

# torch takes a second to import: each command imports what it needs, --help nothing.

CLEAN, FINDINGS, TROUBLE = 0, 1, 2
SCHEMA = 1
"""The version of what ``--json`` prints, see docs/command.md."""


class Answer(NamedTuple):
    """What a command has to say.

    Attributes:
        lines: For stdout.
        code: The exit code.
        reason: For stderr, if the command could not do all of its work.
    """

    lines: list[str]
    code: int
    reason: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    collecting = gc.isenabled()
    # Going through torch's objects again and again would take a fifth of the time.
    gc.disable()
    try:
        if sys.stdout is None:
            raise OSError("stdout is closed, so there is nowhere to print to")
        answer: Answer = options.command(options)
    except (RuntimeError, OSError, ValueError) as error:
        answer = Answer([], TROUBLE, str(error) or type(error).__name__)
    finally:
        if collecting:
            gc.enable()
    try:
        if answer.lines:
            sys.stdout.write("\n".join(answer.lines) + "\n")
            sys.stdout.flush()
    except OSError as error:
        # Python would complain at exit of what could not be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of a pipe (head, less) has seen enough.
        reason = answer.reason if isinstance(error, BrokenPipeError) else str(error)
        answer = Answer([], TROUBLE, reason)
    if answer.reason:
        # What an error quotes may come from the checkpoint: no control codes, and in one line.
        text = "".join(c if c.isprintable() else " " for c in answer.reason)
        print(f"nemo-rng-dcp: {' '.join(text.split())}", file=sys.stderr)
    return answer.code


def inspect(options: argparse.Namespace) -> Answer:
    """Say which streams are in a checkpoint and what is wrong with them."""
    from nemo_rng_dcp.cli.checkpoint import open_checkpoint
    from nemo_rng_dcp.cli.findings import SEVERITIES
    from nemo_rng_dcp.cli.inspect import Inspection
    from nemo_rng_dcp.cli.terminal import Style

    found = Inspection(open_checkpoint(options.checkpoint))
    failing = SEVERITIES[: SEVERITIES.index(options.fail_on) + 1]
    code = FINDINGS if any(each.severity in failing for each in found.findings) else CLEAN
    if options.json:
        return Answer(_json(found.to_json(options.rows)), code)
    return Answer(found.lines(options.rows, Style(sys.stdout)), code)


def diff(options: argparse.Namespace) -> Answer:
    """Say which streams differ between two checkpoints."""
    from nemo_rng_dcp.cli.checkpoint import open_checkpoint
    from nemo_rng_dcp.cli.diff import compare
    from nemo_rng_dcp.cli.tables import require_tables
    from nemo_rng_dcp.cli.terminal import Style, plural

    tables = [require_tables(open_checkpoint(where)) for where in (options.a, options.b)]
    comparisons = compare(*tables)
    code = FINDINGS if any(found.differences for found in comparisons) else CLEAN
    if options.json:
        entries = [found.to_json(options.rows) for found in comparisons]
        lines = _json({"a": options.a, "b": options.b, "entries": entries})
    else:
        style = Style(sys.stdout)
        lines = [line for found in comparisons for line in found.lines(options.rows, style)]
    damaged = {side: sum(found.damaged[side] for found in comparisons) for side in ("A", "B")}
    reasons = [f"{plural(count, 'row')} of {side}" for side, count in damaged.items() if count]
    if reasons:
        text = f"{' and '.join(reasons)} missing or damaged, not compared; see inspect"
        return Answer(lines, TROUBLE, text)
    return Answer(lines, code)


def explain(options: argparse.Namespace) -> Answer:
    """Say what a resume would do to each stream."""
    from nemo_rng_dcp.cli.checkpoint import open_checkpoint
    from nemo_rng_dcp.cli.explain import Explanation, Options, rows_of_ranks
    from nemo_rng_dcp.cli.tables import require_tables
    from nemo_rng_dcp.cli.terminal import Style

    ranks, mesh = rows_of_ranks(options.world_size, options.mesh, options.along)
    job = Options(ranks, mesh, options.ranked, options.generators, options.shared)
    tables = require_tables(open_checkpoint(options.checkpoint))
    explanations = [Explanation(table, job) for table in tables]
    code = FINDINGS if any(each.refusals for each in explanations) else CLEAN
    if options.json:
        entries = [each.to_json(options.rows) for each in explanations]
        return Answer(_json({"checkpoint": options.checkpoint, "entries": entries}), code)
    style = Style(sys.stdout)
    return Answer([line for each in explanations for line in each.lines(options.rows, style)], code)


def import_(options: argparse.Namespace) -> Answer:
    """Make a checkpoint of the RNG state that a framework stored by rank."""
    from pathlib import Path

    from nemo_rng_dcp.cli.importing import read_states, save_records
    from nemo_rng_dcp.cli.states import to_records
    from nemo_rng_dcp.cli.terminal import Style, plural, table, within
    from nemo_rng_dcp.record import fingerprint

    job = read_states(Path(options.folder))
    records = to_records(job)
    save_records(records, Path(options.out))
    shown = [record for record in records if within(record.row, options.rows)]
    digits = [{n: fingerprint(its.state) for n, its in each.streams.items()} for each in shown]
    if options.json:
        rows = [
            {"row": each.row, "file": job.ranks[each.row].place, "streams": its}
            for each, its in zip(shown, digits, strict=True)
        ]
        content = {"framework": job.framework, "folder": job.where}
        return Answer(_json({**content, "out": options.out, "rows": rows}), CLEAN)
    header = ["row", "file", *records[0].streams]
    cells = [
        [str(each.row), job.ranks[each.row].place, *its.values()]
        for each, its in zip(shown, digits, strict=True)
    ]
    lines = [f"{job.where}: {job.framework}, {plural(len(records), 'rank')}"]
    lines += table(header, cells, Style(sys.stdout))
    lines += ["", f"saved to {options.out}: load it with StatefulRNG.load()"]
    return Answer(lines, CLEAN)


def _json(content: dict[str, Any]) -> list[str]:
    return [json.dumps({"schema": SCHEMA, **content}, indent=1)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-rng-dcp",
        description="Show, compare and explain the random streams in a checkpoint. It reads the "
        "checkpoint in one process without a GPU, executes nothing in it and changes nothing.",
    )
    parser.add_argument("--version", action="version", version=f"nemo-rng-dcp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = _command(
        commands,
        "inspect",
        "the streams in a checkpoint, and what is wrong with them",
        "0 as expected, 1 findings, 2 the checkpoint cannot be read",
        ["nemo-rng-dcp inspect runs/step-1000", "nemo-rng-dcp inspect runs/step-1000 --rows 0-7"],
    )
    one.add_argument("checkpoint", help="its folder")
    one.add_argument(
        "--fail-on",
        choices=["damage", "lost", "suspicious"],
        default="lost",
        help="exit with 1 for findings of this severity or a worse one (default: lost)",
    )
    one.set_defaults(command=inspect)

    two = _command(
        commands,
        "diff",
        "the streams that differ between two checkpoints",
        "0 the same, 1 different, 2 a checkpoint cannot be read",
        [
            "nemo-rng-dcp diff run-a/step-1000 run-b/step-1000",
            "nemo-rng-dcp diff run-a/step-1000 run-b/step-1000 --rows 3 --json",
        ],
    )
    two.add_argument("a", help="a checkpoint's folder")
    two.add_argument("b", help="another one's")
    two.set_defaults(command=diff)

    three = _command(
        commands,
        "explain",
        "what a resume would do to each stream",
        "0 it loads, 1 a load would raise, 2 the checkpoint cannot be read",
        [
            "nemo-rng-dcp explain runs/step-1000 --world-size 8",
            "nemo-rng-dcp explain runs/step-1000 --world-size 8 --mesh dp=4,tp=2 --along dp",
        ],
    )
    three.add_argument("checkpoint", help="its folder")
    three.add_argument("--world-size", type=_positive, required=True, metavar="N")
    three.add_argument("--mesh", type=_mesh, help="the resumed job's mesh, such as dp=4,tp=2")
    three.add_argument(
        "--along",
        type=_names,
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
        type=_names,
        metavar="NAMES",
        help="all that the resumed job has, such as python,numpy,torch,cuda (default: as saved)",
    )
    three.add_argument(
        "--shared",
        type=_names,
        metavar="NAMES",
        help="which of them are its shared_generators (default: as saved)",
    )
    three.set_defaults(command=explain)

    four = _command(
        commands,
        "import",
        "the streams that a framework stored by rank, and write them as a checkpoint of records",
        "0 written, 2 they cannot be read or the checkpoint not written",
        ["nemo-rng-dcp import runs/checkpoint-1000 runs/checkpoint-1000-rng"],
    )
    four.add_argument("folder", help="a framework's checkpoint; of Composer's, the file")
    four.add_argument("out", help="the folder to write to")
    four.set_defaults(command=import_)
    return parser


def _command(
    commands: Any, name: str, help_: str, exit_codes: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    lines = "\n".join(f"  {example}" for example in examples)
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_,
        description=f"Print {help_}.",
        epilog=f"examples:\n{lines}\n\nexit code: {exit_codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--rows", type=_rows, help="list only these rows, such as 12,40-44")
    command.add_argument("--json", action="store_true", help="for machines, see docs/command.md")
    return command


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks, expected 1 or more")
    return int(text)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


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
