"""Accelerate's own checks, on streams that were saved, moved and loaded.

Its package ships a script to try an installation with (``accelerate test``): samplers,
generators that are synchronised, and trainings whose weights on several ranks have to be those on
one. Here, before an order is drawn and before each backward, a StatefulRNG saves, the streams are
drawn from, and it loads.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, RandomSampler

from nemo_rng_dcp import StatefulRNG
from tests.support.jobs import JobError, job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks


class Resumes:
    """Saves, draws and loads before each call of what it is put around."""

    def __init__(self, loads: bool) -> None:
        self.loads = loads
        self.count = 0

    def resume(self, owner: Any) -> None:
        generator = getattr(owner, "generator", None)
        generators = {"order": generator} if isinstance(generator, torch.Generator) else {}
        rng = StatefulRNG(None, generators=generators)
        state: Any = rng.state_dict()
        for _ in range(self.count % 5 + 1):  # never the same: two trainings that differ alike agree
            draw()
            for stream in generators.values():
                torch.rand(1, generator=stream)
        if self.loads:
            rng.load_state_dict(state)
        self.count += 1

    @contextmanager
    def before(self, owner: type, name: str) -> Iterator[None]:
        plain: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.resume(args[0])
            return plain(*args, **kwargs)

        with mock.patch.object(owner, name, call):
            yield


def run_checks(loads: bool) -> int:
    os.environ.update(ACCELERATE_USE_CPU="true", WORLD_SIZE=str(dist.get_world_size()))
    from accelerate.data_loader import SeedableRandomSampler
    from accelerate.test_utils.scripts import test_script

    resumes = Resumes(loads)
    with (
        resumes.before(DataLoader, "__iter__"),
        resumes.before(RandomSampler, "__iter__"),
        resumes.before(SeedableRandomSampler, "__iter__"),
        resumes.before(torch.Tensor, "backward"),
    ):
        test_script.main()
    return resumes.count


@pytest.mark.parametrize("ranks", [1, 2])
def test_its_checks_hold_on_streams_that_come_back(ranks: int) -> None:
    counts = job(ranks, run_checks, True)
    print(counts)
    assert min(counts) > 100


def test_they_fail_on_streams_that_do_not() -> None:
    with pytest.raises(JobError, match="Did not obtain the same"):
        job(2, run_checks, False)
