"""Checks of every way in which DCP writes, and of storage that fails, on 2 processes."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from ranks.harness import run
from streams import draw, unmoved

try:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
except ImportError:  # before torch 2.8
    DefaultStager = None  # type: ignore[assignment, misc]


def assert_continues(path: Path, expected: list[float]) -> None:
    """Load with and without the planner, as a new job would, and draw."""
    for planner in (None, RNGLoadPlanner()):
        rng = StatefulRNG(1000, ranked=True)
        dcp.load({"rng": rng}, checkpoint_id=path, planner=planner)
        assert draw() == expected


def check_async_save_while_training_goes_on(path: Path) -> None:
    """The checkpoint holds the state of the call, not that of the write."""
    options: list[dict[str, Any]] = [{}]
    options.append({"async_checkpointer_type": AsyncCheckpointerType.PROCESS})
    if DefaultStager is not None:
        staging = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        options.append({"async_stager": DefaultStager(staging)})
    for number, option in enumerate(options):
        own = path / str(number)
        rng = StatefulRNG(42, ranked=True)
        draw(dist.get_rank())
        with unmoved():
            writing = dcp.async_save({"rng": rng}, checkpoint_id=own, **option)
        expected = draw()
        draw(50)
        if "async_stager" in option:
            writing.staging_completion.result()  # type: ignore[union-attr]
            writing = writing.upload_completion  # type: ignore[union-attr]
        writing.result()
        assert_continues(own, expected)


def check_cached_plans_write_the_new_state(path: Path) -> None:
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    rng = StatefulRNG(42, ranked=True)
    for step in range(3):
        draw(1 + dist.get_rank())
        dcp.save({"rng": rng}, checkpoint_id=path / str(step), planner=planner)
    expected = draw()
    assert_continues(path / "2", expected)


class FullDisk(dcp.FileSystemWriter):
    """A disk without room on the last rank."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write_data(plan, planner)


def saved_before(path: Path) -> tuple[Path, list[float]]:
    """A complete checkpoint, and what it continues with."""
    rng = StatefulRNG(42, ranked=True)
    draw(dist.get_rank())
    dcp.save({"rng": rng}, checkpoint_id=path / "complete")
    return path / "complete", draw()


def check_a_full_disk(path: Path) -> None:
    complete, expected = saved_before(path)
    rng = StatefulRNG(7, ranked=True)
    with unmoved(), pytest.raises(CheckpointException, match="No space left on device"):
        dcp.save({"rng": rng}, storage_writer=FullDisk(path / "full"))
    dist.barrier()
    assert not (path / "full" / ".metadata").exists(), "an incomplete checkpoint looks complete"
    assert_continues(complete, expected)


def damage_by_rank_0(complete: Path, damage: Callable[[Path], object]) -> Path:
    broken = complete.with_name("broken")
    if dist.get_rank() == 0:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(complete, broken)
        damage(broken)
    dist.barrier()
    return broken


def _file(folder: Path) -> Path:
    """The data file of rank 1."""
    return next(folder.glob("__1_*.distcp"))


def _truncate(folder: Path) -> None:
    content = _file(folder).read_bytes()
    _file(folder).write_bytes(content[: len(content) // 2])


def check_damaged_storage(path: Path) -> None:
    complete, expected = saved_before(path)
    damages: dict[str, Callable[[Path], object]] = {
        r"\.distcp": lambda folder: _file(folder).unlink(),
        r"metadata": lambda folder: (folder / ".metadata").unlink(),
        r"(?i)eof|archive|zip|invalid|buffer|size": _truncate,
    }
    for message, damage in damages.items():
        broken = damage_by_rank_0(complete, damage)
        for planner in (None, RNGLoadPlanner()):
            rng = StatefulRNG(7, ranked=True)
            with unmoved(), pytest.raises(CheckpointException, match=message):
                dcp.load({"rng": rng}, checkpoint_id=broken, planner=planner)
    assert_continues(complete, expected)


def check_a_flipped_bit_on_disk(path: Path) -> None:
    complete, expected = saved_before(path)
    broken = damage_by_rank_0(complete, lambda folder: None)
    if dist.get_rank() == 0:
        _flip_in_table(broken, "rng.torch", row=1)
    dist.barrier()
    rng = StatefulRNG(7, ranked=True)
    if dist.get_rank() == 1:
        with (
            unmoved(),
            pytest.raises(Exception, match=r"^torch: row 1 does not fit its check word"),
        ):
            dcp.load({"rng": rng}, checkpoint_id=broken)
    else:
        dcp.load({"rng": rng}, checkpoint_id=broken)
        assert draw() == expected
    assert_continues(complete, expected)


def _flip_in_table(folder: Path, fqn: str, row: int) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    [info] = [
        info
        for index, info in metadata.storage_data.items()
        if index.fqn == fqn and index.offset is not None and index.offset[0] == row
    ]
    file = folder / info.relative_path
    content = bytearray(file.read_bytes())
    # The words lie uncompressed inside the stored tensor; in its middle is one of them.
    content[info.offset + info.length // 2] ^= 1
    file.write_bytes(content)


if __name__ == "__main__":
    run(dict(globals()))
