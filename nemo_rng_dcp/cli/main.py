"""The command line of ``nemo-rng-dcp``, also ``python -m nemo_rng_dcp``, and its exit codes."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol, TextIO

from nemo_rng_dcp.cli.arguments import parser
from nemo_rng_dcp.cli.terminal import visible

CLEAN, FINDINGS, TROUBLE = 0, 1, 2
INTERRUPTED = 130
"""What a shell expects of a command that Ctrl-C ended."""
SCHEMA = 1
"""The version of what ``--json`` prints, see docs/command.md."""


_REPORTS = {"inspect": "Inspection", "diff": "Diff", "explain": "Explanation", "import": "Import"}
"""The class of each command."""


class Report(Protocol):
    """What a command has found out.

    Attributes:
        failed: Whether that makes the exit code 1.
        trouble: For stderr, if the command could not do all of its work; the exit code is 2 then.
    """

    failed: bool
    trouble: str

    def to_json(self, rows: Sequence[range] | None) -> dict[str, Any]:
        """Return what ``--json`` prints; of what there is by row only ``rows``."""

    def lines(self, rows: Sequence[range] | None) -> list[str]:
        """Return the text for a person; of what there is by row only ``rows``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    From then on this process looks for garbage more rarely: it is the command's own.
    """
    options = parser().parse_args(arguments)
    lines: list[str] = []
    try:
        if sys.stdout is None:
            raise OSError("stdout is closed, so there is nowhere to print to")
        report = _report(options)
        trouble, failed = report.trouble, report.failed
        if options.json:
            lines = [json.dumps({"schema": SCHEMA, **report.to_json(options.rows)}, indent=1)]
        else:
            # What a checkpoint says is shown and not obeyed.
            lines = [visible(line) for line in report.lines(options.rows)]
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # 1 would say that there are findings
        text = str(error) if isinstance(error, (RuntimeError, OSError, ValueError)) else ""
        trouble, failed = text or f"{type(error).__name__}: {error}".removesuffix(": "), True
    code = TROUBLE if trouble else FINDINGS if failed else CLEAN
    try:
        if lines:
            _write("\n".join(lines), sys.stdout)
    except BrokenPipeError:
        code = TROUBLE  # the reader of a pipe (head, less) has seen enough
    except OSError as error:
        code, trouble = TROUBLE, str(error)
    if trouble and sys.stderr is not None:
        # What an error quotes may come from the checkpoint: no control codes, and in one line.
        text = "".join(c if c.isprintable() else " " for c in trouble)
        with suppress(OSError):
            _write(f"nemo-rng-dcp: {' '.join(text.split())}", sys.stderr)
    return code


def _report(options: argparse.Namespace) -> Report:
    # torch takes a second to import, and --help does not need it; DCP takes another one.
    name = options.command.replace("import", "importing.command")
    report = getattr(import_module(f"nemo_rng_dcp.cli.{name}"), _REPORTS[options.command])
    # Of thousands of rows nothing is garbage, and every search for it looks at all of them.
    gc.set_threshold(100_000)
    return report(options)  # type: ignore[no-any-return]


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
