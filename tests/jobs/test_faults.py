"""Faults of a job and of its storage, with real processes and signals.

Whatever ends a save or a load, the previous checkpoint stays in charge and is loaded bit for bit.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner

from nemo_rng_dcp import RNGLoadPlanner, RNGStateError, StatefulRNG
from tests.support.jobs import JobError, begin_group, gather, job
from tests.support.streams import draw, unmoved

Numbers = list[float]
Fault = Callable[[dict[str, Any], Path], object]


def begin(seed: int) -> dict[str, Any]:
    return {"rng": StatefulRNG(seed, ranked=True), "weight": torch.ones(3)}


def save_first(folder: Path) -> Numbers:
    """A checkpoint that is complete; returns what each rank draws next."""
    state = begin(42)
    draw(1 + dist.get_rank())
    dcp.save(state, checkpoint_id=folder / "1")
    return draw()


def complete(folder: Path) -> list[str]:
    """DCP writes a checkpoint's metadata last: a folder without it is no checkpoint."""
    return sorted(path.parent.name for path in folder.glob("*/.metadata"))


def load_newest(folder: Path) -> list[Numbers]:
    drawn = []
    for planner in (None, RNGLoadPlanner()):
        state = begin(1000)
        dcp.load(state, checkpoint_id=folder / complete(folder)[-1], planner=planner)
        drawn.append(draw())
    return drawn


@pytest.fixture
def in_charge(tmp_path: Path) -> Iterator[Path]:
    """A folder whose one checkpoint must be in charge, and exact, after whatever the test does."""
    expected = job(2, save_first, tmp_path)
    yield tmp_path
    assert complete(tmp_path) == ["1"]
    assert job(2, load_newest, tmp_path) == [[numbers, numbers] for numbers in expected]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(100)


# Ranks that are ended.


class EndedWriter(dcp.FileSystemWriter):
    """Ends a rank when its data is written, or rank 0 when only the metadata is missing."""

    def __init__(self, path: Path, number: signal.Signals, publishing: bool = False) -> None:
        super().__init__(path)
        self.number, self.publishing = number, publishing

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        written = super().write_data(plan, planner)
        if dist.get_rank() == 1 and not self.publishing:
            written.wait()
            send(self.number)
        return written

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        send(self.number)


class EndedReader(dcp.FileSystemReader):
    """Ends rank 1 before it reads its data."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        if dist.get_rank() == 1:
            send(signal.SIGKILL)
        return super().read_data(plan, planner)


def in_a_save(state: dict[str, Any], folder: Path) -> None:
    dcp.save(state, storage_writer=EndedWriter(folder / "2", signal.SIGKILL))


def by_sigterm(state: dict[str, Any], folder: Path) -> None:
    dcp.save(state, storage_writer=EndedWriter(folder / "2", signal.SIGTERM))


def in_an_async_save(state: dict[str, Any], folder: Path) -> None:
    writer = EndedWriter(folder / "2", signal.SIGKILL)
    dcp.async_save(state, storage_writer=writer).result()  # type: ignore[union-attr]


def before_publishing(state: dict[str, Any], folder: Path) -> None:
    writer = EndedWriter(folder / "2", signal.SIGKILL, publishing=True)
    dcp.save(state, storage_writer=writer)


def in_a_load(state: dict[str, Any], folder: Path) -> None:
    dcp.load(state, storage_reader=EndedReader(folder / "1"), planner=RNGLoadPlanner())


def run_to_the_end(folder: Path, fault: Fault) -> NoReturn:
    state = begin(1000)
    dcp.load(state, checkpoint_id=folder / "1")
    draw(5)
    fault(state, folder)
    raise AssertionError("nothing ended this rank")


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        (in_a_save, "rank 1 ended with SIGKILL"),
        (by_sigterm, "rank 1 ended with SIGTERM"),
        (in_an_async_save, "rank 1 ended with SIGKILL"),
        (before_publishing, "rank 0 ended with SIGKILL"),
        (in_a_load, "rank 1 ended with SIGKILL"),
    ],
)
def test_an_ended_rank(fault: Fault, end: str, in_charge: Path) -> None:
    with pytest.raises(JobError, match=end) as caught:
        job(2, run_to_the_end, in_charge, fault)
    assert "nothing ended this rank" not in str(caught.value)


# A peer that hangs.


class HungWriter(dcp.FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().write_data(plan, planner)


def save_beside_a_hung_peer(folder: Path, before: bool) -> None:
    begin_group(limit=3)
    _, hung = gather(os.getpid())
    rng = StatefulRNG(1000, ranked=True)
    try:
        if before:
            if dist.get_rank() == 1:
                os.kill(hung, signal.SIGSTOP)
            dist.monitored_barrier(timeout=timedelta(milliseconds=100))
        with unmoved(), pytest.raises(RuntimeError) as caught:
            dcp.save({"rng": rng}, storage_writer=HungWriter(folder / "2"))
        raise TimeoutError(str(caught.value))
    finally:
        os.kill(hung, signal.SIGKILL)  # nothing less ends it, and the job would try


def test_a_hung_peer_ends_the_save_by_the_time_out_of_the_group(in_charge: Path) -> None:
    with pytest.raises(JobError, match=r"TimeoutError: .*Timed out waiting 3000ms"):
        job(2, save_beside_a_hung_peer, in_charge, False, group=False)


def test_a_monitored_barrier_before_the_save_names_the_hung_peer(in_charge: Path) -> None:
    """gloo's own time-out names no rank, and the save itself is DCP's."""
    with pytest.raises(JobError, match=r"Rank 1 failed to pass monitoredBarrier in 100 ms"):
        job(2, save_beside_a_hung_peer, in_charge, True, group=False)


# Storage that fails.


class RemovingWriter(dcp.FileSystemWriter):
    """Somebody removes the folder while ranks write to it."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.path)
        dist.barrier()
        return super().write_data(plan, planner)


def save_into(folder: Path, writer: type[dcp.FileSystemWriter]) -> str:
    state = begin(7)
    draw()
    with unmoved(), pytest.raises((CheckpointException, OSError)) as caught:
        dcp.save(state, storage_writer=writer(folder))
    return str(caught.value)


def test_a_folder_that_vanishes(in_charge: Path) -> None:
    for text in job(2, save_into, in_charge / "2", RemovingWriter):
        assert "No such file or directory" in text


def test_a_read_only_folder(in_charge: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("read-only")
    if os.geteuid() != 0:
        folder.chmod(0o555)
        error = "Permission denied"
    else:  # root may write everywhere, but not to what is mounted read-only
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("root that may not mount a file system cannot be kept from writing")
        error = "Read-only file system"
    try:
        for text in job(2, save_into, folder / "2", dcp.FileSystemWriter):
            assert error in text
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)


# A file of another checkpoint in the place of rank 1's.


def file_of(rank: int, checkpoint: Path) -> Path:
    return next(checkpoint.glob(f"__{rank}_*.distcp"))


def fail_on_rank_1(folder: Path, message: str) -> None:
    for planner in (None, RNGLoadPlanner()):
        rng = StatefulRNG(7, ranked=True)
        if dist.get_rank() == 0:
            dcp.load({"rng": rng}, checkpoint_id=folder, planner=planner)
            continue
        with unmoved(), pytest.raises(RNGStateError, match=message):
            dcp.load({"rng": rng}, checkpoint_id=folder, planner=planner)


def save_alone(folder: Path) -> None:
    dcp.save({"rng": begin(42)["rng"]}, checkpoint_id=folder)


def test_the_file_of_another_rank(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    job(2, save_alone, mixed)
    shutil.copy(file_of(0, mixed), file_of(1, mixed))
    job(2, fail_on_rank_1, mixed, "row 1 of 2 was given row 0 of 2")


# A load that a signal interrupts.


class InterruptedReader(dcp.FileSystemReader):
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return super().read_data(plan, planner)


class InterruptedGenerator(random.Random):
    """A signal comes while this generator is written, after the global ones were."""

    armed = False

    def setstate(self, state: Any) -> None:
        super().setstate(state)
        if self.armed:
            self.armed = False
            os.kill(os.getpid(), signal.SIGINT)


def load_through_interrupts(folder: Path) -> Numbers:
    rng = StatefulRNG(7, ranked=True)
    with unmoved(), pytest.raises((KeyboardInterrupt, CheckpointException)):
        dcp.load({"rng": rng}, storage_reader=InterruptedReader(folder))
    own = InterruptedGenerator(1)
    rng = StatefulRNG(7, ranked=True, generators={"own": own})
    state = rng.state_dict()
    expected = draw(), own.random()
    own.armed = True
    before = rng.fingerprint()
    with pytest.raises(KeyboardInterrupt):
        rng.load_state_dict(state)
    assert rng.fingerprint() == before
    rng.load_state_dict(state)
    assert (draw(), own.random()) == expected
    return draw()


def test_an_interrupt_while_the_storage_is_read_or_streams_are_written(in_charge: Path) -> None:
    job(2, load_through_interrupts, in_charge / "1")


class Interrupt:
    """Traces the library, and interrupts it before the n-th line that it runs."""

    def __init__(self, line: int) -> None:
        self.left, self.where = line, ""

    def __call__(self, frame: FrameType, event: str, _: object) -> "Interrupt | None":
        if f"{os.sep}nemo_rng_dcp{os.sep}" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def interrupt_at_every_line() -> int:
    """Return how many lines there were."""
    rng = StatefulRNG(1, generators={"own": random.Random(1)})
    saved = rng.state_dict()
    restored = rng.fingerprint()
    line = 0
    while True:
        line += 1
        draw()
        before = rng.fingerprint()
        interrupt, others = Interrupt(line), sys.gettrace()
        sys.settrace(interrupt)
        try:
            rng.load_state_dict(saved)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(others)
        if not interrupt.where:
            break
        after = rng.fingerprint()
        assert after in (before, restored), f"streams are mixed after {interrupt.where}"
    return line


def test_an_interrupt_at_any_line_of_a_load_leaves_all_streams_or_none_restored() -> None:
    # In a process of its own: between the last line of a `with` and its end, an interrupt leaves
    # the lock with this thread, and other threads of the process would wait for ever.
    [lines] = job(1, interrupt_at_every_line, group=False)
    assert lines > 100
