"""What stands above an RNG entry: its name, who saved it and with which versions."""

from __future__ import annotations

from math import prod

from nemo_rng_dcp.cli.terminal import paragraph, plural
from nemo_rng_dcp.record import Record, mesh_text
from nemo_rng_dcp.versions import UNSEEDED


def name_of(key: str) -> str:
    """Return what an entry is called: its key, or that it has none."""
    return key or "(top level)"


def job_of(record: Record) -> dict[str, str]:
    """Return what a record says of the job that saved it, by name, as a person reads it."""
    return {
        "world size": str(record.world_size),
        "seed": "none" if record.seed is None else str(record.seed),
        "ranked": str(record.ranked),
        "resizes": str(record.resizes),
        "mesh": mesh_text(record.mesh),
    }


def title(key: str, count: int, record: Record | None) -> list[str]:
    """Return how many rows an entry has and who saved it, by one of its records."""
    name = name_of(key)
    if record is None:
        return [f"{name}: {plural(count, 'row')}, none of them good"]
    ranked = "ranked" if record.ranked else "not ranked"
    resized = f", resized {plural(record.resizes, 'time')}" if record.resizes else ""
    seed = "no seed" if record.seed is None else f"seed {record.seed}"
    coordinates = prod(dict(record.mesh).values()) if record.mesh else record.world_size
    along = f"coordinate of {mesh_text(record.mesh)}" if record.mesh else "rank"
    shared = [name for name, stream in record.streams.items() if stream.shared]
    saved_by = ", ".join(f"{name} {version}" for name, version in record.versions().items())
    if record.hash_seed != UNSEEDED:
        saved_by += f", PYTHONHASHSEED {record.hash_seed}"
    texts = [
        f"{name}: {plural(count, 'row')} of {plural(record.world_size, 'rank')}, {seed}, "
        f"{ranked}{resized}",
        f"  one row per {along if record.rows == coordinates else 'logical rank'}",
        *[f"  alike on all ranks: {', '.join(shared)}"] * bool(shared),
        f"  saved by {saved_by}",
    ]
    return [line for text in texts for line in paragraph(text, 4)]
