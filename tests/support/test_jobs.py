"""The jobs of the tests: what a test gets back, and what it is told when a rank fails."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support import ranks, workers
from tests.support.jobs import JobError, begin_group, gather, job

IMPORTED_BY = os.getpid()


def importer() -> tuple[int, int]:
    return IMPORTED_BY, os.getpid()


def test_ranks_are_forks_of_one_process_that_has_imported_the_module() -> None:
    ended = job(2, importer, group=False) + job(1, importer, group=False)
    assert len({imported_by for imported_by, _ in ended} - {os.getpid()}) == 1
    assert len({pid for _, pid in ended} - {imported_by for imported_by, _ in ended}) == 3


def importer_of_torch() -> int:
    return int(sys.modules["tests.support.imported"].PROCESS)


def test_all_are_forks_of_one_process_that_has_imported_torch() -> None:
    [of_a_rank] = job(1, importer_of_torch, group=False)
    assert of_a_rank != os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert (of_a_rank == importer_of_torch()) is workers.SHARED


def identity() -> tuple[int, int, list[int], int, int]:
    variables = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return *variables, gather(dist.get_rank()), os.getpid(), torch.get_num_threads()


def test_results_come_back_in_the_order_of_the_ranks() -> None:
    results = job(3, identity)
    assert [result[:3] for result in results] == [(rank, 3, [0, 1, 2]) for rank in range(3)]
    assert len({os.getpid(), *(pid for *_, pid, _ in results)}) == 4
    assert {threads for *_, threads in results} == {1}


def join_late() -> tuple[bool, int]:
    before = dist.is_initialized()
    begin_group()
    return before, dist.get_world_size()


def test_the_group_can_be_begun_by_the_function() -> None:
    assert job(2, join_late, group=False) == [(False, 2)] * 2


def variable() -> str | None:
    return os.environ.get("OF_THIS_TEST")


def test_ranks_have_the_environment_of_their_test(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job(1, variable, group=False) == [None]
    monkeypatch.setenv("OF_THIS_TEST", "here")
    assert job(1, variable, group=False) == ["here"]


def test_ranks_start_processes_of_their_own_as_any_script_does() -> None:
    default = multiprocessing.get_all_start_methods()[0]
    assert job(1, multiprocessing.get_start_method, group=False) == [default]


def unseeded_numbers() -> float:
    return float(np.random.random())


def test_unseeded_ranks_differ_as_fresh_processes_do() -> None:
    assert len(set(job(3, unseeded_numbers))) == 3


def fail_on_rank_1(folder: Path) -> None:
    (folder / f"{dist.get_rank()}").write_text(str(os.getpid()))
    print("printed by", dist.get_rank())
    dist.barrier()
    if dist.get_rank() == 1:
        raise ValueError("a wrong value")
    dist.barrier()


def test_an_error_names_the_rank_and_leaves_none_running(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^fail_on_rank_1 failed on rank 1 of 3 first") as caught:
        job(3, fail_on_rank_1, tmp_path)
    _, *reports = str(caught.value).split("--- rank ")
    for rank, report in enumerate(reports):
        assert f"printed by {rank}\n" in report
        assert "in fail_on_rank_1" in report, "where the rank was"
    assert "ValueError: a wrong value" in reports[1]
    for rank in range(3):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def be_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def be_killed_and_leave_a_fork(folder: Path) -> None:
    fork = os.fork()
    if fork == 0:
        time.sleep(20)
        os._exit(0)
    (folder / "fork").write_text(str(fork))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_ends_before_what_its_ranks_have_started(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="rank 0 ended with SIGKILL"):
        job(1, be_killed_and_leave_a_fork, tmp_path, group=False)
    fork = int((tmp_path / "fork").read_text())
    _, _, state = Path(f"/proc/{fork}/stat").read_text().rpartition(") ")
    assert state[0] in "RS", "it still runs: it sleeps, or is about to"
    os.kill(fork, signal.SIGKILL)


def leave_early() -> None:
    if dist.get_rank() == 1:
        os._exit(0)
    dist.barrier()


def return_what_cannot_be_pickled() -> object:
    return (number for number in range(3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (be_killed, "rank 1 ended with SIGKILL"),
        (leave_early, "rank 1 ended with exit code 0"),
        (return_what_cannot_be_pickled, "cannot pickle 'generator' object"),
    ],
)
def test_a_rank_that_returns_nothing_has_failed(
    function: Callable[[], object], message: str
) -> None:
    with pytest.raises(JobError, match=message):
        job(2, function)


def hang() -> None:
    time.sleep(1000)


def test_ranks_that_hang_say_where() -> None:
    with pytest.raises(JobError) as caught:
        job(2, hang, group=False, limit=0.5)
    assert str(caught.value).count("in hang\n") == 2


class Interrupt(BaseException):
    pass


def interrupt(pytest_process: int, folder: Path) -> None:
    (folder / f"{dist.get_rank()}").write_text(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 0:
        os.kill(pytest_process, signal.SIGUSR1)
    hang()


def test_an_interrupt_leaves_no_rank_running_and_the_next_job_runs(tmp_path: Path) -> None:
    def handle(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handle)
    with pytest.raises(Interrupt):
        job(2, interrupt, os.getpid(), tmp_path)
    signal.signal(signal.SIGUSR1, before)
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)
    assert job(1, variable, group=False) == [None]


def place() -> tuple[str, str]:
    return os.getcwd(), sys.path[-1]


def test_ranks_have_the_folder_and_the_path_of_their_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job(1, place, group=False) == [place()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, "of-this-test"])
    assert job(1, place, group=False) == [(str(tmp_path), "of-this-test")]


def ignore_the_end() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.barrier()
    if dist.get_rank() == 1:
        raise ValueError
    hang()


def test_ranks_that_ignore_sigterm_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.2)
    with pytest.raises(JobError, match="rank 0 ended with SIGKILL"):
        job(2, ignore_the_end)
