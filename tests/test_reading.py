"""Reading a checkpoint executes nothing in it, and says in one line why it cannot be read."""

import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_rng_dcp import RNGStateError
from nemo_rng_dcp.tools.findings import examine
from nemo_rng_dcp.tools.metadata import CheckpointMetadata
from nemo_rng_dcp.tools.reading import Entry, read_entries
from tables import change_metadata, place_of, rows_of, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def read(path: Path) -> list[Entry]:
    return read_entries(path, CheckpointMetadata(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(rows_of(2), tmp_path / "checkpoint")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path, call: Any = os.mkdir) -> None:
        self.file, self.call = file, call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, (str(self.file),)


def write_file(file: str) -> None:
    Path(file).touch()


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come into being."""
    file = tmp_path / "executed"
    yield file
    assert not file.exists()


# What is read.


@pytest.mark.parametrize("key", ["rng", "trainer.app.rng", ""])
def test_entries_are_found_wherever_they_are(key: str, tmp_path: Path) -> None:
    state: Any = rows_of(3)
    for part in reversed(key.split(".") if key else []):
        state = {part: state}
    dcp.save({"model": {"origin": torch.ones(3, 13)}, **state}, checkpoint_id=tmp_path)
    (entry,) = read(tmp_path)
    assert (entry.key, entry.count) == (key, 3)
    assert list(entry.tables) == ["origin", "python", "numpy", "torch"]
    for name, table in rows_of(3).items():
        assert torch.equal(torch.stack([entry.tables[name].rows[row] for row in range(3)]), table)


def test_every_class_that_dcp_stores_is_read(tmp_path: Path) -> None:
    channels = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    others = {"image": channels, "half": torch.zeros(2, dtype=torch.bfloat16), "none": None}
    sets = {"list": [1, {"a": torch.zeros(1)}], "text": "text", "tuple": (1, 2)}
    dcp.save({"rng": rows_of(1), **others, **sets}, checkpoint_id=tmp_path)
    metadata = CheckpointMetadata(tmp_path)
    expected = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert metadata.keys.keys() == expected.keys()
    for key, stored in expected.items():
        if isinstance(stored, TensorStorageMetadata):
            assert metadata.keys[key].dtype == stored.properties.dtype
            assert metadata.keys[key].size == stored.size
        else:
            assert metadata.keys[key].dtype is None


# Nothing is executed.


@pytest.mark.parametrize("call", [os.mkdir, write_file, os.system, exec, open])
def test_a_hostile_metadata_file_is_refused(
    call: Callable[..., Any], path: Path, trap: Path
) -> None:
    name = f"{call.__module__}.{call.__name__}".replace("posix", "(posix|nt)")
    change_metadata(path, lambda m: setattr(m, "planner_data", Payload(trap, call)))
    with pytest.raises(RNGStateError, match=rf"refused: \.metadata wants {name}"):
        read(path)


def test_getattr_gives_nothing(path: Path) -> None:
    """Some versions of Python store an enum as a call of it, so it cannot be refused by name."""
    system = type("System", (), {"__reduce__": lambda _: (getattr, (Metadata, "__init__"))})()
    change_metadata(path, lambda m: setattr(m, "storage_data", system))
    with pytest.raises(RNGStateError, match="malformed: found NoneType, expected dict"):
        read(path)


def test_the_payload_runs_where_it_is_let(tmp_path: Path) -> None:
    """The control: the tests of this file could not pass because the payload is harmless."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_pickle_cannot_change_the_classes_it_is_given(path: Path) -> None:
    module = b"torch.distributed.checkpoint.metadata"
    # The class itself, then the state (None, {"x": 1}), then "set this state".
    build = b"\x80\x02c" + module + b"\nMetadata\nN}X\x01\x00\x00\x00xK\x01s\x86b."
    (path / ".metadata").write_bytes(build)
    with pytest.raises(RNGStateError, match="expected DCP's Metadata"):
        read(path)
    assert not hasattr(Metadata, "x")
    pickle.loads(build)  # the control: it would have
    assert Metadata.x == 1  # type: ignore[attr-defined]
    del Metadata.x  # type: ignore[attr-defined]


def put(path: Path, fqn: str, value: Any) -> None:
    """Store something else in the place of a table."""
    content = io.BytesIO()
    torch.save(value, content)
    file, _, _ = place_of(path, fqn)
    start = file.stat().st_size
    with file.open("ab") as stored:
        stored.write(content.getvalue())

    def move(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == fqn:
                place.offset, place.length = start, len(content.getvalue())

    change_metadata(path, move)


def refusal(path: Path) -> str:
    """Return why the rows of the table numpy could not be read; all others could."""
    (entry,) = read(path)
    assert not entry.tables["numpy"].rows
    assert len(entry.tables["python"].rows) == 2
    (reason,) = set(entry.tables["numpy"].failures.values())
    return reason


def test_a_hostile_table_is_refused(path: Path, trap: Path) -> None:
    put(path, "rng.numpy", [Payload(trap), torch.zeros(2, 628, dtype=torch.int64)])
    assert refusal(path) == "refused: __0_0.distcp holds something else than a tensor"


class Admitted:
    """A class that the program has declared safe to load."""

    def __setstate__(self, state: dict[str, str]) -> None:
        write_file(state["file"])


def test_what_the_program_admits_to_torch_load_is_not_admitted_here(path: Path, trap: Path) -> None:
    value = Admitted()
    value.file = str(trap)  # type: ignore[attr-defined]
    put(path, "rng.numpy", [value, torch.zeros(2, 628, dtype=torch.int64)])
    torch.serialization.add_safe_globals([Admitted])
    before = torch.serialization.get_safe_globals()
    try:
        assert refusal(path).startswith("refused: ")
        assert set(torch.serialization.get_safe_globals()) == set(before)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([item for item in before if item is not Admitted])


NUMBERS = torch.zeros(2, 628, dtype=torch.int64)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nn.Parameter(NUMBERS, requires_grad=False), "holds a Parameter"),
        ({"a": NUMBERS}, "holds a dict"),
        (NUMBERS[:1].repeat(1, 2).view(1, -1), "holds torch.int64 (1, 1256)"),
        (NUMBERS.double(), "holds torch.float64"),
        (NUMBERS.t().contiguous().t(), "no plain tensor"),
        (torch.zeros(1, dtype=torch.int64).expand(2, 628), "bytes for (2, 628) numbers"),
        (torch.zeros(2, 9000, dtype=torch.int64), "bytes for (2, 628) numbers"),
    ],
)
def test_only_a_plain_tensor_is_taken(value: Any, reason: str, path: Path) -> None:
    put(path, "rng.numpy", value)
    assert reason in refusal(path)


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/hostname", "..", "sub/x", "a\\b"])
def test_a_file_outside_the_checkpoint_is_not_opened(name: str, path: Path) -> None:
    file, _, _ = place_of(path, "rng.numpy")
    (path.parent / "outside.distcp").write_bytes(file.read_bytes())

    def move(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == "rng.numpy":
                place.relative_path = name

    change_metadata(path, move)
    assert refusal(path).startswith("refused: its file")


# What cannot be read.


def truncate(path: Path, name: str) -> None:
    file = path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lengthen(metadata: Any) -> None:
    metadata.state_dict_metadata["rng.origin"].chunks[0].sizes = torch.Size((2**40, 13))


def lengthen_all(metadata: Any) -> None:
    metadata.state_dict_metadata["rng.origin"].size = torch.Size((2**40, 13))
    metadata.state_dict_metadata["rng.numpy"].size = torch.Size((2**40, 628))
    lengthen(metadata)


def malform(metadata: Any) -> None:
    metadata.state_dict_metadata["rng.origin"].size = (2, "13")


UNREADABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated metadata": (".metadata is damaged or truncated", lambda p: truncate(p, ".metadata")),
    "no metadata": (
        r"no \.metadata in it, only __0_0.distcp",
        lambda p: (p / ".metadata").unlink(),
    ),
    "no file": ("__0_0.distcp is missing", lambda p: (p / "__0_0.distcp").unlink()),
    "empty file": (
        "__0_0.distcp is truncated: 0 bytes",
        lambda p: (p / "__0_0.distcp").write_bytes(b""),
    ),
    "a folder": (
        "__0_0.distcp is missing",
        lambda p: ((p / "__0_0.distcp").unlink(), (p / "__0_0.distcp").mkdir()),
    ),
    "no metadata class": (
        "holds dict, expected DCP's Metadata",
        lambda p: (p / ".metadata").write_bytes(pickle.dumps({})),
    ),
    "no places": (
        "is malformed",
        lambda p: change_metadata(p, lambda m: setattr(m, "storage_data", 3)),
    ),
    "huge": ("ends at row 1099511627776 of 2", lambda p: change_metadata(p, lengthen)),
    "huge alike": (
        "ends at row 1099511627776 of 1099511627776",
        lambda p: change_metadata(p, lengthen_all),
    ),
    "no size": ("is malformed: found .*'13'", lambda p: change_metadata(p, malform)),
    "not placed": (
        "the metadata names no file",
        lambda p: change_metadata(p, lambda m: m.storage_data.clear()),
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_has_one_reason(case: str, path: Path) -> None:
    reason, damage = UNREADABLE[case]
    damage(path)
    with pytest.raises(RNGStateError, match=reason):
        read(path)


def test_a_table_that_says_it_is_huge_costs_nothing(path: Path) -> None:
    def enlarge(metadata: Any) -> None:
        for name in ("origin", "python", "numpy", "torch"):
            stored = metadata.state_dict_metadata[f"rng.{name}"]
            stored.size = torch.Size((2**60, stored.size[1]))

    change_metadata(path, enlarge)
    (entry,) = read(path)
    findings = [finding.text for finding in examine(entry).findings]
    assert f"{2**60 - 2} of {2**60} rows are missing, the first is 2" in findings
