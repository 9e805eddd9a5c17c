"""The package as it is imported: public names come when they are asked for."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

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


# The house: the modules and folders of the package, each on the floor above all that it imports.

PACKAGE = Path(nemo_rng_dcp.__file__).parent
FLOORS, FLOORS_OF_THE_LIBRARY = 8, 6


def house() -> dict[str, set[str]]:
    """Return by module or folder of the package which others it imports, also for types alone."""
    files = {file: file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py")}
    rooms: dict[str, set[str]] = {path.parts[0]: set() for path in files.values()}
    for file, path in files.items():
        room = path.parts[0]
        for module in imported_by(file):
            package, _, below = module.partition(".")
            if package == PACKAGE.name:
                name = below.partition(".")[0]
                # A public name of the package itself comes from its __init__.
                rooms[room].add(name if name in rooms else "__init__")
        rooms[room].discard(room)
    return rooms


def imported_by(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_import_runs_upward_and_the_floors_are_few() -> None:
    rooms, floors = house(), dict[str, int]()
    for room in TopologicalSorter(rooms).static_order():  # a circle is a CycleError
        floors[room] = 1 + max((floors[below] for below in rooms[room]), default=0)
    face = ("__init__", "__main__", "cli")  # names of the library for others, and no part of it
    library = {room: floor for room, floor in floors.items() if room not in face}
    assert max(floors.values()) <= FLOORS, floors
    assert max(library.values()) <= FLOORS_OF_THE_LIBRARY, library
