"""What the commands print: the streams of a checkpoint, a comparison, a prediction."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_rng_dcp.origin import version_text
from nemo_rng_dcp.tools.comparison import Comparison
from nemo_rng_dcp.tools.findings import Finding, Streams
from nemo_rng_dcp.tools.foreign import ForeignState
from nemo_rng_dcp.tools.resume import CONTINUED, FORKED, REFUSED, Fate, Resume
from nemo_rng_dcp.tools.terminal import Style, paragraph, plural, short_spans, spans, table

MANY = 40
"""More rows than these are summarised."""

_COLOURS = {FORKED: "yellow", REFUSED: "red", CONTINUED: "green"}


def within(row: int, rows: Sequence[range] | None) -> bool:
    """Return whether a row was asked for: ``None`` asks for all."""
    return rows is None or any(row in span for span in rows)


def streams_lines(streams: Streams, rows: Sequence[range] | None, style: Style) -> list[str]:
    """Return an entry: who saved it, and a line for each row, all or those in ``rows``."""
    lines = _title(streams, style)
    chosen = [row for row in sorted(streams.digests) if within(row, rows)]
    if rows is None and len(chosen) > MANY:
        for name in streams.generators:
            found = [its[name] for its in streams.digests.values() if name in its]
            lines.append(
                f"{name:<8} {plural(len(found), 'good row')}, {len(set(found)):,} different"
            )
        lines += ["", "The first and the last rows (--rows 12,40-44 shows others):"]
        chosen = chosen[:3] + chosen[-3:]
    cells = [
        [str(row), *(streams.digests[row].get(name, "-") for name in streams.generators)]
        for row in chosen
    ]
    return [*lines, *table(["row", *streams.generators], cells, style), ""]


def foreign_lines(state: ForeignState, style: Style) -> list[str]:
    """Return what other code stored, a line for each key."""
    kind = f"{plural(len(state.ranks), 'rank')} in the keys" if state.ranks else "rank-less keys"
    lines = paragraph(f"{style(state.path or '(top level)', 'bold')}: no StatefulRNG's; {kind}", 2)
    cells = []
    for name, stored in state.contents.items():
        what = "a pickle" if stored.dtype is None else f"{stored.dtype} {list(stored.size)}"
        writer = f"written by rank {state.writers[name]}" if name in state.writers else ""
        cells.append(["", name or "(the key itself)", what.removeprefix("torch."), writer])
    return [*lines, *table(["", "key", "stored as", ""], cells, style), ""]


def finding_lines(findings: Sequence[Finding], notes: Sequence[str], style: Style) -> list[str]:
    lines = []
    for note in notes:
        lines += paragraph(f"note: {note}", 2)
    for finding in findings:
        where = [finding.path, f"{finding.table}" * bool(finding.table)]
        if finding.rows:
            row = "row" if len(finding.rows) == 1 else "rows"
            where.append(f"{row} {short_spans(finding.rows)}")
        text = ", ".join(part for part in where if part)
        first, *rest = paragraph(f"finding: {text}: {finding.text}", 2)
        lines += [first.replace("finding:", style("finding:", "red"), 1), *rest]
    if not findings:
        lines.append(style("no findings", "green"))
    return lines


def comparison_lines(found: Comparison, rows: Sequence[range] | None, style: Style) -> list[str]:
    """Return how two checkpoints' entries differ."""
    name = found.key or "(top level)"
    lines = [line for text in found.remarks for line in paragraph(f"{name}: {text}", 2)]
    differing = found.differing
    if not differing:
        return [*lines, f"{name}: {plural(found.compared, 'row')} compared, no stream differs"]
    generators = list(dict.fromkeys(name for its in differing.values() for name in its))
    lines.append(
        f"{name}: {len(differing):,} of {plural(found.compared, 'row')} differ: "
        + ", ".join(f"{g} in {sum(g in its for its in differing.values()):,}" for g in generators)
    )
    chosen = [row for row in differing if within(row, rows)]
    more = len(chosen) - MANY
    if rows is None:
        chosen = chosen[:MANY]
    cells = [
        [str(row), generator, *pair] for row in chosen for generator, pair in differing[row].items()
    ]
    lines += table(["row", "generator", "A", "B"], cells, style)
    if rows is None and more > 0:
        lines.append(f"... and {plural(more, 'more row')}, which --rows shows")
    return lines


def resume_lines(
    streams: Streams, resume: Resume, rows: Sequence[range] | None, style: Style
) -> list[str]:
    """Return what a resume does to an entry, a line for each row or each run of like rows."""
    lines = _title(streams, style)
    world_size = sum(len(fate.ranks) for fate in resume.fates)
    how = "planner=RNGLoadPlanner()" if resume.needs_planner else "plain dcp.load"
    lines += paragraph(
        f"On {plural(world_size, 'rank')}, {plural(resume.rows, 'row')}, with {how}:", 2
    )
    fates = [fate for fate in resume.fates if within(fate.row, rows)]
    if rows is None and len(fates) > MANY:
        lines += [_run_line(run) for run in _runs(fates)]
    else:
        generators = [name for name in streams.generators if name not in resume.ignored]
        cells = [
            [
                str(fate.row),
                spans(fate.ranks) or "-",
                _fate_text(fate),
                *(fate.digests.get(name, "-") for name in generators),
            ]
            for fate in fates
        ]
        lines += table(["row", "ranks", "streams", *generators], cells, style)
    for name in resume.absent:
        lines.append(f"{name}: absent from the checkpoint: the stream stays as it is")
    for name in resume.ignored:
        lines.append(f"{name}: not read, the resumed job has no such generator")
    refused = [fate for fate in resume.fates if fate.fate == REFUSED]
    if refused:
        text = f"refused: a load raises RNGStateError, for row {short_spans(_sources(refused))}"
        lines += [style(line, "red") for line in paragraph(f"{text} is missing or damaged", 2)]
    return [*lines, ""]


def _title(streams: Streams, style: Style) -> list[str]:
    key = style(streams.key or "(top level)", "bold")
    if not streams.origins:
        return [f"{key}: {plural(streams.count, 'row')}, none of them good"]
    origin = next(iter(streams.origins.values()))
    ranked = "ranked" if origin.ranked else "not ranked"
    resized = f", resized {plural(origin.resizes, 'time')}" if origin.resizes else ""
    versions = ", ".join(
        f"{name} {version_text(number)}"
        for name, number in [
            ("nemo_rng_dcp", origin.library_version),
            ("python", origin.python_version),
            ("numpy", origin.numpy_version),
            ("torch", origin.torch_version),
        ]
    )
    text = (
        f"{key}: {plural(streams.count, 'row')} of {plural(origin.world_size, 'rank')}, seed "
        f"{origin.seed}, {ranked}{resized}, layout {origin.layout_version}"
    )
    return [*paragraph(text, 2), *paragraph(f"  saved by {versions}", 2)]


def _fate_text(fate: Fate) -> str:
    if fate.fate == FORKED or (fate.fate == CONTINUED and fate.source != fate.row):
        return f"{fate.fate}, from {fate.source}"
    return fate.fate


def _runs(fates: Sequence[Fate]) -> list[list[Fate]]:
    """Return neighbours that fare alike together."""
    runs: list[list[Fate]] = []
    for fate in fates:
        alike = runs and (
            runs[-1][-1].fate,
            runs[-1][-1].source == runs[-1][-1].row,
            runs[-1][-1].source + 1,
        ) == (fate.fate, fate.source == fate.row, fate.source)
        if alike:
            runs[-1].append(fate)
        else:
            runs.append([fate])
    return runs


def _run_line(run: Sequence[Fate]) -> str:
    rows, sources = spans(fate.row for fate in run), spans(_sources(run))
    source = f", from rows {sources}" if rows != sources else ""
    return f"  rows {rows}: {run[0].fate}{source}"


def _sources(fates: Sequence[Fate]) -> list[int]:
    return sorted({fate.source for fate in fates})
