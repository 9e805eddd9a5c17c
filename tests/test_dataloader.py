"""DataLoader workers, augmentation and mid-epoch resumes on real ranks: launched by torchrun."""

import pytest

from conftest import Launches
from ranks import dataloader
from ranks.harness import checks_of

AUGMENTATION = dataloader.check_a_sample_is_augmented_alike_for_any_ranks_and_workers.__name__


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("check", checks_of(dataloader))
def test_on_real_ranks(check: str, processes: int, launches: Launches) -> None:
    launches.assert_passed(dataloader, check, processes)


def test_a_sample_is_augmented_alike_for_1_2_and_4_ranks(launches: Launches) -> None:
    samples = set()
    for processes in (1, 2, 4):
        launches.assert_passed(dataloader, AUGMENTATION, processes)
        file = f"dataloader-{processes}/{AUGMENTATION.removeprefix('check_')}.json"
        samples.add((launches.folder / file).read_text())
    assert len(samples) == 1
