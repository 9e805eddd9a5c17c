"""Save and load in one job, on real ranks: launched by torchrun, looked at check by check."""

import pytest

from conftest import Launches
from ranks import save_and_load
from ranks.harness import checks_of


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("check", checks_of(save_and_load))
def test_on_real_ranks(check: str, processes: int, launches: Launches) -> None:
    launches.assert_passed(save_and_load, check, processes)
