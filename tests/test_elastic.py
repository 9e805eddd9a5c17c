"""Resuming on another number of ranks or another mesh, on up to 8 real ranks."""

import pytest

from conftest import Launches
from ranks import elastic
from ranks.harness import checks_of


@pytest.mark.parametrize("check", checks_of(elastic))
def test_on_8_real_ranks(check: str, launches: Launches) -> None:
    launches.assert_passed(elastic, check, 8)
