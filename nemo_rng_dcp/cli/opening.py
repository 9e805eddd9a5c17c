"""The checkpoint that a path means: the folder itself, or the one below it that has records."""

from __future__ import annotations

from nemo_rng_dcp.cli.checkpoint.checkpoint import Checkpoint, checkpoint_in, checkpoints_below
from nemo_rng_dcp.cli.checkpoint.folder import Folder, open_folder
from nemo_rng_dcp.cli.frameworks.rank_files import find_files
from nemo_rng_dcp.errors import RNGStateError


def open_checkpoint(where: str) -> Checkpoint:
    """Return the checkpoint at a path or URL, or one folder below it.

    Frameworks keep records beside or below other things: the one folder that has records is taken.

    Raises:
        RNGStateError: There is none, there are several to choose from, or it is damaged.
        OSError: It cannot be read.
    """
    folder = open_folder(where)
    own = checkpoint_in(folder)
    if own is not None and own.records:
        return own
    below, error = checkpoints_below(folder)
    chosen = [found for found in below if found.records]
    if not chosen and error is not None:
        raise error
    chosen = chosen or ([own] if own else below)
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        names = ", ".join(found.where for found in chosen[:6])
        text = f"{where}: it holds {len(chosen)} checkpoints, name one: {names}"
        raise RNGStateError(text + _known_files(folder))
    inside = [*folder.sizes, *folder.folders]
    shown = f"only {', '.join(inside[:3])}{', ...' * (len(inside) > 3)}" if inside else "nothing"
    raise RNGStateError(
        f"{where}: no .metadata in it, {shown}. It is no DCP checkpoint, or its save did not "
        f"finish.{_known_files(folder)}"
    )


def _known_files(folder: Folder) -> str:
    """Say whose RNG files are in a folder or below it, one for each rank."""
    if "://" in folder.where:
        return ""  # import reads this machine's alone
    for name in ("", *folder.folders):
        try:
            place = folder.inner(name) if name else folder
            found = find_files(place)
        except OSError:  # a folder of somebody else's
            continue
        if found:
            return f" {place.where}: RNG files of {found[0].naming.framework}, `import` reads these"
    return ""
