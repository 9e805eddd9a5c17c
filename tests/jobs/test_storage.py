"""Every way in which DCP writes, storage that fails, and ranks that are killed at it."""

import errno
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, StatefulRNG
from tests.jobs import kills
from tests.support.jobs import job
from tests.support.launch import torchrun
from tests.support.streams import draw, unmoved

Numbers = list[float]


def save(path: Path) -> Numbers:
    rng = StatefulRNG(42, ranked=True)
    draw(dist.get_rank())
    dcp.save({"rng": rng}, checkpoint_id=path)
    return draw()


def load(path: Path) -> list[Numbers]:
    """Load with and without the planner, as a new job would, and draw."""
    drawn = []
    for planner in (None, RNGLoadPlanner()):
        rng = StatefulRNG(1000, ranked=True)
        dcp.load({"rng": rng}, checkpoint_id=path, planner=planner)
        drawn.append(draw())
    return drawn


def assert_continues(path: Path, expected: list[Numbers]) -> None:
    assert job(len(expected), load, path) == [[numbers, numbers] for numbers in expected]


def save_async(path: Path, way: str) -> Numbers:
    """Save while training goes on; returns what was drawn first after the call."""
    options: dict[str, Any] = {}
    if way == "process":
        options["async_checkpointer_type"] = AsyncCheckpointerType.PROCESS
    elif way == "stager":
        staging = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        options["async_stager"] = DefaultStager(staging)
    rng = StatefulRNG(42, ranked=True)
    draw(dist.get_rank())
    with unmoved():
        writing = dcp.async_save({"rng": rng}, checkpoint_id=path, **options)
    expected = draw()
    draw(50)
    if way == "stager":
        writing.staging_completion.result()  # type: ignore[union-attr]
        writing = writing.upload_completion  # type: ignore[union-attr]
    writing.result()
    return expected


@pytest.mark.parametrize("way", ["thread", "process", "stager"])
def test_async_save_while_training_goes_on(way: str, tmp_path: Path) -> None:
    """The checkpoint holds the state of the call, not that of the write."""
    assert_continues(tmp_path, job(2, save_async, tmp_path, way))


def save_with_cached_plans(path: Path) -> Numbers:
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    rng = StatefulRNG(42, ranked=True)
    for step in range(3):
        draw(1 + dist.get_rank())
        dcp.save({"rng": rng}, checkpoint_id=path / str(step), planner=planner)
    return draw()


def test_cached_plans_write_the_new_state(tmp_path: Path) -> None:
    expected = job(2, save_with_cached_plans, tmp_path)
    assert_continues(tmp_path / "2", expected)


class FullDisk(dcp.FileSystemWriter):
    """A disk without room on the last rank."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write_data(plan, planner)


def save_on_a_full_disk(path: Path) -> None:
    rng = StatefulRNG(7, ranked=True)
    with unmoved(), pytest.raises(CheckpointException, match="No space left on device"):
        dcp.save({"rng": rng}, storage_writer=FullDisk(path))


def test_a_full_disk(tmp_path: Path) -> None:
    expected = job(2, save, tmp_path / "complete")
    job(2, save_on_a_full_disk, tmp_path / "full")
    assert (tmp_path / "full").exists()
    assert not (tmp_path / "full" / ".metadata").exists(), "an incomplete checkpoint looks complete"
    assert_continues(tmp_path / "complete", expected)


def save_over(path: Path) -> tuple[Numbers, Numbers]:
    rng = StatefulRNG(42, ranked=True)
    dcp.save({"rng": rng}, checkpoint_id=path)
    first = draw()
    with pytest.raises(CheckpointException, match="No space left on device"):
        dcp.save({"rng": rng}, storage_writer=FullDisk(path))
    return first, draw()


def test_a_checkpoint_that_is_overwritten_in_part_is_of_two_moments(tmp_path: Path) -> None:
    """DCP leaves the old metadata, which fits the rows of both. The library cannot tell."""
    (_, second), (first, _) = job(2, save_over, tmp_path)
    assert_continues(tmp_path, [second, first])


def file_of_rank_1(folder: Path) -> Path:
    return next(folder.glob("__1_*.distcp"))


def remove_a_file(folder: Path) -> None:
    file_of_rank_1(folder).unlink()


def remove_the_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def truncate_a_file(folder: Path) -> None:
    content = file_of_rank_1(folder).read_bytes()
    file_of_rank_1(folder).write_bytes(content[: len(content) // 2])


def fail_to_load(path: Path, message: str) -> None:
    for planner in (None, RNGLoadPlanner()):
        rng = StatefulRNG(7, ranked=True)
        with unmoved(), pytest.raises(CheckpointException, match=message):
            dcp.load({"rng": rng}, checkpoint_id=path, planner=planner)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_file, r"\.distcp"),
        (remove_the_metadata, r"metadata"),
        (truncate_a_file, r"(?i)eof|archive|zip|invalid|buffer|size"),
    ],
    ids=["no-file", "no-metadata", "half-a-file"],
)
def test_damaged_storage(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    complete, broken = tmp_path / "complete", tmp_path / "broken"
    expected = job(2, save, complete)
    shutil.copytree(complete, broken)
    damage(broken)
    job(2, fail_to_load, broken, message)
    assert_continues(complete, expected)


def flip_in_record(folder: Path, row: int) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    records = [
        (index.offset, info)
        for index, info in metadata.storage_data.items()
        if index.fqn == "rng.rng_streams"
    ]
    _, info = sorted(records)[row]
    file = folder / info.relative_path
    content = bytearray(file.read_bytes())
    # The words lie uncompressed inside the stored tensor; in its middle is one of them.
    content[info.offset + info.length // 2] ^= 1
    file.write_bytes(content)


def load_where_rank_1_is_damaged(path: Path) -> Numbers | None:
    rng = StatefulRNG(7, ranked=True)
    if dist.get_rank() == 1:
        with (
            unmoved(),
            pytest.raises(RNGStateError, match=r"row 1 of 2, does not fit its check word"),
        ):
            dcp.load({"rng": rng}, checkpoint_id=path)
        return None
    dcp.load({"rng": rng}, checkpoint_id=path)
    return draw()


def test_a_flipped_bit_on_disk(tmp_path: Path) -> None:
    expected = job(2, save, tmp_path)
    flip_in_record(tmp_path, row=1)
    assert job(2, load_where_rank_1_is_damaged, tmp_path) == [expected[0], None]


def test_torchrun_restarts_a_killed_job_from_the_complete_checkpoint(tmp_path: Path) -> None:
    """Kills at other moments, without torchrun, are in test_faults.py."""
    torchrun(Path(kills.__file__), 2, str(tmp_path), restarts=1)
    attempts = sorted(path.name for path in tmp_path.glob("attempt-*"))
    assert attempts == [f"attempt-{n}-{rank}" for n in range(2) for rank in range(2)]
    begun = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert begun == ["step-00000001", "step-00000002"]
    assert [path.parent.name for path in tmp_path.glob("checkpoints/*/.metadata")] == begun[:1]


@pytest.mark.filterwarnings("ignore")
def test_to_a_torch_file_and_back(tmp_path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    draw()
    dcp.save({"rng": rng}, checkpoint_id=tmp_path / "a")
    expected = draw()
    dcp_to_torch_save(tmp_path / "a", tmp_path / "file.pt")
    torch_save_to_dcp(tmp_path / "file.pt", tmp_path / "b")
    for planner in (None, RNGLoadPlanner()):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path / "b", planner=planner)
        assert draw() == expected


@pytest.mark.filterwarnings("ignore")
def test_without_coordination(tmp_path: Path) -> None:
    rng = StatefulRNG(42, ranked=True)
    dcp.save({"rng": rng}, checkpoint_id=tmp_path, no_dist=True)
    expected = draw()
    dcp.load({"rng": rng}, checkpoint_id=tmp_path, no_dist=True)
    assert draw() == expected


@pytest.mark.filterwarnings("ignore")
def test_fsspec_in_memory() -> None:
    fsspec = pytest.importorskip("torch.distributed.checkpoint._fsspec_filesystem")
    rng = StatefulRNG(42, ranked=True)
    draw()
    dcp.save({"rng": rng}, storage_writer=fsspec.FsspecWriter("memory://nemo/a"))
    expected = draw()
    for planner in (None, RNGLoadPlanner()):
        reader = fsspec.FsspecReader("memory://nemo/a")
        dcp.load({"rng": rng}, storage_reader=reader, planner=planner)
        assert draw() == expected


def consolidate(path: Path, tensor: torch.Tensor) -> str:
    writer = dcp.HuggingFaceStorageWriter(
        str(path), save_distributed=True, enable_consolidation=True
    )
    try:
        dcp.save({"tensor": tensor}, storage_writer=writer)
    except CheckpointException as error:
        return str(error)
    return ""


def test_torch_itself_consolidates_no_integers_into_safetensors(tmp_path: Path) -> None:
    """The pages say so. When this fails, torch has mended it, and they need not any more."""
    [floats] = job(1, consolidate, tmp_path / "floats", torch.ones(3))
    [integers] = job(1, consolidate, tmp_path / "integers", torch.ones(3, dtype=torch.int64))
    assert floats == ""
    assert "finfo" in integers


def save_on_a_small_disk(path: Path) -> None:
    state = {"rng": StatefulRNG(42), "filler": torch.zeros(300_000)}
    # torch words it its own way: its zip writer finds less written than it wrote.
    with unmoved(), pytest.raises(CheckpointException):
        dcp.save(state, checkpoint_id=path)


def test_a_real_disk_without_room(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        job(1, save_on_a_small_disk, tmp_path / "full")
        assert not (tmp_path / "full" / ".metadata").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_state_dict_on_its_own_is_read_without_unpickling_code(tmp_path: Path) -> None:
    rng = StatefulRNG(42)
    torch.save(rng.state_dict(), tmp_path / "rng.pt")
    expected = draw()
    rng.load_state_dict(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected
