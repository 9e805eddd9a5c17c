"""The package as it is imported: public names come when they are asked for."""

import pytest

import nemo_rng_dcp
from tests.support.launch import python


def test_every_public_name_is_there() -> None:
    names: dict[str, object] = {}
    exec("from nemo_rng_dcp import *", names)
    assert set(nemo_rng_dcp.__all__) <= names.keys()
    assert set(nemo_rng_dcp.__all__) <= set(dir(nemo_rng_dcp))
    assert names["StatefulRNG"] is nemo_rng_dcp.StatefulRNG


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nemo_rng_dcp' has no attribute 'StatefulRGN'"):
        nemo_rng_dcp.StatefulRGN  # noqa: B018
    with pytest.raises(ImportError, match="StatefulRGN"):
        exec("from nemo_rng_dcp import StatefulRGN")


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, nemo_rng_dcp; sys.exit('torch' in sys.modules)"
    assert python("-c", program).returncode == 0
