"""The command line of ``nemo-rng-dcp``, also ``python -m nemo_rng_dcp``, and its exit codes."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TextIO

from nemo_rng_dcp.cli.arguments import parser

# torch takes a second to import: each command imports what it needs, --help nothing.

CLEAN, FINDINGS, TROUBLE = 0, 1, 2
INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended."""
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
    options = parser().parse_args(arguments)
    collecting = gc.isenabled()
    # Going through torch's objects again and again would take a fifth of the time.
    gc.disable()
    try:
        if sys.stdout is None:
            raise OSError("stdout is closed, so there is nowhere to print to")
        answer = COMMANDS[options.command](options)
    except (RuntimeError, OSError, ValueError) as error:
        answer = Answer([], TROUBLE, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # 1 would say that there are findings
        answer = Answer([], TROUBLE, f"{type(error).__name__}: {error}".removesuffix(": "))
    finally:
        if collecting:
            gc.enable()
    try:
        if answer.lines:
            _write("\n".join(answer.lines), sys.stdout)
    except OSError as error:
        # The reader of a pipe (head, less) has seen enough.
        reason = answer.reason if isinstance(error, BrokenPipeError) else str(error)
        answer = Answer([], TROUBLE, reason)
    if answer.reason and sys.stderr is not None:
        # What an error quotes may come from the checkpoint: no control codes, and in one line.
        text = "".join(c if c.isprintable() else " " for c in answer.reason)
        with suppress(OSError):
            _write(f"nemo-rng-dcp: {' '.join(text.split())}", sys.stderr)
    return answer.code


def _write(text: str, stream: TextIO) -> None:
    # A folder's name may have letters that the stream has not.
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError:
        # Python would try again at exit, and exit with another code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def inspect(options: argparse.Namespace) -> Answer:
    """Say which streams are in a checkpoint and what is wrong with them."""
    from nemo_rng_dcp.cli.findings import SEVERITIES
    from nemo_rng_dcp.cli.inspect import Inspection
    from nemo_rng_dcp.cli.opening import open_checkpoint
    from nemo_rng_dcp.cli.terminal import Style

    found = Inspection(open_checkpoint(options.checkpoint))
    failing = SEVERITIES[: SEVERITIES.index(options.fail_on) + 1]
    code = FINDINGS if any(each.severity in failing for each in found.findings) else CLEAN
    if options.json:
        return Answer(_json(found.to_json(options.rows)), code)
    return Answer(found.lines(options.rows, Style(sys.stdout)), code)


def diff(options: argparse.Namespace) -> Answer:
    """Say which streams differ between two checkpoints."""
    from nemo_rng_dcp.cli.checkpoint.table import require_tables
    from nemo_rng_dcp.cli.diff import compare
    from nemo_rng_dcp.cli.opening import open_checkpoint
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
    from nemo_rng_dcp.cli.checkpoint.table import require_tables
    from nemo_rng_dcp.cli.explain import explanations_of
    from nemo_rng_dcp.cli.job import Options, rows_of_ranks
    from nemo_rng_dcp.cli.opening import open_checkpoint
    from nemo_rng_dcp.cli.terminal import Style

    ranks, mesh = rows_of_ranks(options.world_size, options.mesh, options.along)
    job = Options(ranks, mesh, options.ranked, options.generators, options.shared)
    tables = require_tables(open_checkpoint(options.checkpoint))
    explanations = explanations_of(tables, job)
    code = FINDINGS if any(each.refusals for each in explanations) else CLEAN
    if options.json:
        entries = [each.to_json(options.rows) for each in explanations]
        return Answer(_json({"checkpoint": options.checkpoint, "entries": entries}), code)
    style = Style(sys.stdout)
    return Answer([line for each in explanations for line in each.lines(options.rows, style)], code)


def import_(options: argparse.Namespace) -> Answer:
    """Make a checkpoint of the RNG state that a framework stored by rank."""
    from nemo_rng_dcp.cli.importing import Import
    from nemo_rng_dcp.cli.terminal import Style

    done = Import(options.folder, options.out)
    if options.json:
        return Answer(_json(done.to_json(options.rows)), CLEAN)
    return Answer(done.lines(options.rows, Style(sys.stdout)), CLEAN)


COMMANDS = {"inspect": inspect, "diff": diff, "explain": explain, "import": import_}


def _json(content: dict[str, Any]) -> list[str]:
    return [json.dumps({"schema": SCHEMA, **content}, indent=1)]
