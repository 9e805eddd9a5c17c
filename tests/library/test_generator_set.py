"""Generators that fail while all are restored."""

from typing import Any

import pytest

from nemo_rng_dcp import RNGStateError
from nemo_rng_dcp.generators import GeneratorSet
from tests.support.streams import unmoved


class Failing:
    """A generator of a user's own that neither takes a state nor a seed."""

    kind = "failing"

    def get(self) -> int:
        return 0

    def set(self, state: int) -> None:
        if state:
            raise OSError("the device is gone")

    def pack(self, state: int) -> bytes:
        return b"0"

    def unpack(self, packed: bytes) -> int:
        return 0

    def seed(self, value: int) -> None:
        raise OSError("the device is gone")


@pytest.mark.parametrize("change", [{"states": {"own": 1}}, {"states": {}, "seeds": {"own": 1}}])
def test_a_generator_that_fails_is_named_and_all_are_put_back(change: dict[str, Any]) -> None:
    generators, of_process = GeneratorSet(None, {"own": Failing()}), GeneratorSet(None)
    moved = of_process.take()
    change["states"] = {**moved, **change["states"]}
    of_process.restore({}, {"python": 5, "torch": 6})
    message = r"^own: the generator did not take its state \(OSError: the device is gone\); every"
    with unmoved(), pytest.raises(RNGStateError, match=message) as error:
        generators.restore(**change)
    assert isinstance(error.value.__cause__, OSError)
