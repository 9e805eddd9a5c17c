"""Every way in which DCP writes, storage that fails, and ranks that are killed at it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from conftest import Launches
from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from ranks import kills, storage
from ranks.harness import checks_of
from scripts.demo.launch import Launch
from streams import draw


@pytest.mark.parametrize("check", checks_of(storage))
def test_on_2_real_ranks(check: str, launches: Launches) -> None:
    launches.assert_passed(storage, check, 2)


def test_killed_ranks_leave_the_complete_checkpoint_in_charge(tmp_path: Path) -> None:
    Launch(Path(kills.__file__), 2, str(tmp_path), restarts=3).output()
    attempts = sorted(path.name for path in tmp_path.glob("attempt-*"))
    assert attempts == [f"attempt-{n}-{rank}" for n in range(4) for rank in range(2)]
    begun = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert begun == ["step-00000001", "step-00000002", "step-00000003"]
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


SMALL_DISK = """
import sys, torch.distributed.checkpoint as dcp, torch
from nemo_rng_dcp import StatefulRNG
from streams import draw, unmoved
rng = StatefulRNG(42)
filler = torch.zeros(300_000)
with unmoved():
    try:
        dcp.save({"rng": rng, "filler": filler}, checkpoint_id=sys.argv[1])
    except BaseException as error:
        print(type(error).__name__, error)
print("streams unmoved")
"""


def test_a_real_disk_without_room(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        command = [sys.executable, "-c", SMALL_DISK, str(tmp_path / "full")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        # torch words it its own way: its zip writer finds less written than it wrote.
        assert "CheckpointException" in done.stdout, done.stdout + done.stderr
        assert "streams unmoved" in done.stdout
        assert not (tmp_path / "full" / ".metadata").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_state_dict_on_its_own_is_read_without_unpickling_code(tmp_path: Path) -> None:
    rng = StatefulRNG(42)
    torch.save(rng.state_dict(), tmp_path / "rng.pt")
    expected = draw()
    rng.load_state_dict(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected
