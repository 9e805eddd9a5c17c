"""Reading a checkpoint executes nothing in it, and says in one line why it cannot be read."""

import io
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nemo_rng_dcp import RNGStateError
from nemo_rng_dcp.cli.main import main
from nemo_rng_dcp.cli.reading import tensors
from nemo_rng_dcp.cli.reading.checkpoint import Checkpoint
from nemo_rng_dcp.cli.reading.index import Stored
from nemo_rng_dcp.cli.reading.opening import open_checkpoint, open_tables
from nemo_rng_dcp.cli.reading.table import Table
from nemo_rng_dcp.cli.reading.tensors import from_archive
from nemo_rng_dcp.record import Record
from tests.support.command import Capture
from tests.support.records import change_metadata, drawn_streams, place_of, records, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEY = "rng.rng_streams"
LENGTH = len(records(1)[0].to_tensor())


def read(path: Path) -> Table:
    (table,) = open_tables(str(path))
    return table


def refusal(path: Path) -> str:
    """Return why row 0 could not be read; row 1 could."""
    table = read(path)
    assert isinstance(table.read(1), Record)
    reason = table.read(0)
    assert isinstance(reason, str)
    return reason


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(records(2), tmp_path / "checkpoint")


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


def test_records_are_read_as_they_were_saved(path: Path) -> None:
    table = read(path)
    assert (table.key, table.count, table.placed) == ("rng", 2, [0, 1])
    assert [table.read(row) for row in table.placed] == records(2)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_class_that_dcp_stores_is_read(protocol: int, tmp_path: Path) -> None:
    channels = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    others = {"image": channels, "half": torch.zeros(2, dtype=torch.bfloat16), "none": None}
    sets = {"list": [1, {"a": torch.zeros(1)}], "text": "text", "tuple": (1, 2)}
    narrow = {"f8": torch.zeros(1, dtype=torch.float8_e4m3fn), "bool": torch.zeros(1).bool()}
    state = {"long": torch.zeros(70000), **others, **sets, **narrow}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    expected = dcp.FileSystemReader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(expected, protocol))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.keys.keys() == expected.state_dict_metadata.keys()
    for key, stored in expected.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            assert f"torch.{checkpoint.keys[key].dtype}" == str(stored.properties.dtype)
            assert checkpoint.keys[key].size == stored.size
        else:
            assert checkpoint.keys[key].dtype is None
        [place] = [found for at, found in expected.storage_data.items() if at.fqn == key]
        (chunk,) = checkpoint.chunks(key)
        assert (chunk.file, chunk.start, chunk.length) == (
            place.relative_path,
            place.offset,
            place.length,
        )


# Nothing is executed.


@pytest.mark.parametrize("call", [os.mkdir, write_file, os.system, exec, open])
def test_a_hostile_metadata_file_is_refused(
    call: Callable[..., Any], path: Path, trap: Path
) -> None:
    name = f"{call.__module__}.{call.__name__}".replace("posix", "(posix|nt)")
    change_metadata(path, lambda m: setattr(m, "planner_data", Payload(trap, call)))
    with pytest.raises(RNGStateError, match=rf"refused: \S+/\.metadata wants {name}"):
        read(path)


def test_getattr_gives_nothing(path: Path) -> None:
    """Some versions of Python store an enum as a call of it, so it cannot be refused by name."""
    system = type("System", (), {"__reduce__": lambda _: (getattr, (Metadata, "__init__"))})()
    change_metadata(path, lambda m: setattr(m, "storage_data", system))
    with pytest.raises(RNGStateError, match="malformed: found Made, expected dict"):
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
    with pytest.raises(RNGStateError, match="found Global, expected Made"):
        read(path)
    assert not hasattr(Metadata, "x")
    pickle.loads(build)  # the control: it would have
    assert Metadata.x == 1  # type: ignore[attr-defined]
    del Metadata.x  # type: ignore[attr-defined]


def put(path: Path, value: Any) -> None:
    """Store something else in the place of row 0."""
    content = io.BytesIO()
    torch.save(value, content)
    file, _, _ = place_of(path, KEY)
    start = file.stat().st_size
    with file.open("ab") as stored:
        stored.write(content.getvalue())

    def move(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if index.offset[0] == 0:
                place.offset, place.length = start, len(content.getvalue())

    change_metadata(path, move)


def test_a_hostile_row_is_refused(path: Path, trap: Path) -> None:
    put(path, [Payload(trap), torch.zeros(LENGTH, dtype=torch.int64)])
    assert "refused: it holds posix.mkdir, expected a tensor" in refusal(path)


NUMBERS = torch.zeros(LENGTH, dtype=torch.int64)
ANOTHER = f"refused: it holds another tensor than int64 ({LENGTH},)"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.nn.Parameter(NUMBERS, requires_grad=False), "refused: it holds torch._utils._reb"),
        ({"a": NUMBERS}, "refused: it holds something else than a tensor"),
        (NUMBERS.view(1, -1), ANOTHER),
        (NUMBERS.double(), "refused: it holds torch.DoubleStorage"),
        (torch.zeros(2 * LENGTH, dtype=torch.int64)[::2], ANOTHER),
        (torch.zeros(LENGTH + 1, dtype=torch.int64)[1:], ANOTHER),
        (torch.zeros(1, dtype=torch.int64).expand(LENGTH), "bytes for"),
        (torch.zeros(LENGTH + 9000, dtype=torch.int64), "bytes for"),
        (NUMBERS.to_sparse(), "bytes for"),
    ],
)
def test_only_a_plain_tensor_is_taken(value: Any, reason: str, path: Path) -> None:
    put(path, value)
    assert reason in refusal(path)


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/hostname", "..", "sub/x", "a\\b"])
def test_a_file_outside_the_checkpoint_is_not_opened(name: str, path: Path) -> None:
    file, _, _ = place_of(path, KEY)
    (path.parent / "outside.distcp").write_bytes(file.read_bytes())

    def move(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if index.offset[0] == 0:
                place.relative_path = name

    change_metadata(path, move)
    assert refusal(path) == f"unreadable: {name} is missing"


# Control codes do not reach the terminal.

EVIL = "\033[31mrng"


def a_key(path: Path) -> None:
    save(records(2), path, EVIL)


def a_file(path: Path) -> None:
    save(records(2), path)
    change_metadata(
        path, lambda m: [setattr(at, "relative_path", EVIL) for at in m.storage_data.values()]
    )


def a_generator(path: Path) -> None:
    save(records(2, lambda row: {EVIL: drawn_streams(row)["python"]}), path)


def a_hash_seed(path: Path) -> None:
    save(records(2, hash_seed=EVIL), path)


def a_mesh(path: Path) -> None:
    save(records(2, mesh=((EVIL, 2),)), path)


@pytest.mark.parametrize("name", [a_key, a_file, a_generator, a_hash_seed, a_mesh])
def test_names_are_shown_without_their_control_codes(
    name: Callable[[Path], None], tmp_path: Path, capsys: Capture
) -> None:
    name(tmp_path)
    for words in (["inspect"], ["diff", tmp_path], ["explain", "--world-size", 3]):
        main([*map(str, words), str(tmp_path)])
        printed = capsys.readouterr()
        assert "\033" not in printed.out + printed.err
        assert "\\x1b[31mrng" in printed.out or words[0] == "diff"


# Other storage writers.


@dataclass
class TheirPlace:
    """Where another storage writer put a part, in its own words."""

    bucket: str


@dataclass
class TheirPlaceInOurWords:
    """The same, as DCP's own writer says it."""

    relative_path: str
    offset: int
    length: int


@dataclass
class TheirMetadata(Metadata):
    """Another writer's, which keeps more."""

    more: int = 3


def change_places(path: Path, change: Callable[[Any], Any]) -> None:
    def each(metadata: Any) -> None:
        places = metadata.storage_data.items()
        metadata.storage_data = {index: change(place) for index, place in places}

    change_metadata(path, each)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (TheirPlace("b"), "a TheirPlace has no relative_path"),
        ("s3://bucket/0", "found str, expected Made"),
    ],
)
def test_another_storage_writers_class_is_named(place: Any, reason: str, path: Path) -> None:
    """It was called an attack."""
    change_places(path, lambda _: place)
    with pytest.raises(RNGStateError, match=rf"\.metadata is malformed: {reason}"):
        read(path)


def test_another_storage_writers_class_is_read_as_data(path: Path) -> None:
    change_places(
        path, lambda place: TheirPlaceInOurWords(place.relative_path, place.offset, place.length)
    )
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(TheirMetadata(**vars(metadata))))
    table = read(path)
    assert [table.read(row) for row in table.placed] == records(2)


# What cannot be read.


def truncate(path: Path, name: str) -> None:
    file = path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


UNREADABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated metadata": (".metadata is damaged or truncated", lambda p: truncate(p, ".metadata")),
    "no metadata": (
        r"no \.metadata in it",
        lambda p: (p / ".metadata").unlink(),
    ),
    "no metadata class": (
        "holds dict, expected DCP's Metadata",
        lambda p: (p / ".metadata").write_bytes(pickle.dumps({})),
    ),
    "no places": (
        "is malformed",
        lambda p: change_metadata(p, lambda m: setattr(m, "storage_data", 3)),
    ),
    "no size": (
        "is malformed: found str, expected integers",
        lambda p: change_metadata(
            p, lambda m: setattr(m.state_dict_metadata[KEY], "size", (2, "13"))
        ),
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_has_one_reason(case: str, path: Path) -> None:
    reason, damage = UNREADABLE[case]
    damage(path)
    with pytest.raises(RNGStateError, match=reason):
        read(path)


NOT_THERE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no file": ("__0_0.distcp is missing", lambda p: (p / "__0_0.distcp").unlink()),
    "empty file": (
        "__0_0.distcp is truncated: 0 bytes",
        lambda p: (p / "__0_0.distcp").write_bytes(b""),
    ),
    "a folder": (
        "__0_0.distcp is missing",
        lambda p: ((p / "__0_0.distcp").unlink(), (p / "__0_0.distcp").mkdir()),
    ),
    "not placed": (
        r"its file (without a name) is missing",
        lambda p: change_metadata(p, lambda m: m.storage_data.clear()),
    ),
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_a_row_that_is_not_there_has_a_reason(case: str, path: Path) -> None:
    reason, damage = NOT_THERE[case]
    damage(path)
    assert reason in str(read(path).read(0))


# Time and memory grow with the bytes that are there.


def nested(depth: int) -> Any:
    """Return a tuple that takes a few bytes and 2**depth steps to print, compare or hash."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


def test_nested_tuples_for_a_size_cost_nothing(path: Path) -> None:
    """The error message printed them, which never ends."""
    change_metadata(path, lambda m: setattr(m.state_dict_metadata[KEY], "size", nested(60)))
    assert (path / ".metadata").stat().st_size < 2000
    with pytest.raises(RNGStateError, match="malformed: found tuple, expected integers"):
        read(path)


def test_nested_tuples_as_a_key_cost_nothing(path: Path) -> None:
    """Python's unpickler hashes them, which never ends."""
    # A tuple of one's own twice, 60 times over; then it is the key of a dict.
    twice = b"q\x00h\x00\x86" * 60
    (path / ".metadata").write_bytes(b"\x80\x02})" + twice + b"Ns.")
    with pytest.raises(RNGStateError, match=r"damaged or truncated .*a tuple as a key"):
        read(path)


def test_a_large_place_in_the_memo_costs_nothing(path: Path) -> None:
    """Python's unpickler allocates memory up to it."""
    (path / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    with pytest.raises(RNGStateError, match="holds NoneType, expected DCP's Metadata"):
        read(path)


@pytest.mark.parametrize("name", ["bits" + "a" * 10**5, "int" + "1" * 10**5 + "!"])
def test_a_long_name_is_refused_before_it_is_looked_at(name: str, path: Path) -> None:
    """One that was named 2,000 times filled the memory, and a pattern took hours to fit."""
    text = b"X%b%b" % (len(name).to_bytes(4, "little"), name.encode())
    once = b"\x80\x04X\x05\x00\x00\x00torchq\x00" + text + b"q\x01\x93"
    (path / ".metadata").write_bytes(once + b"h\x00h\x01\x93" * 2000 + b".")
    with pytest.raises(RNGStateError, match=rf"wants a name of {5 + len(name)} characters"):
        read(path)


def test_a_length_beyond_the_end_is_damage(path: Path) -> None:
    (path / ".metadata").write_bytes(b"\x80\x02X\xff\xff\xff\x7fabc.")
    with pytest.raises(RNGStateError, match="expected 2147483647 bytes in a unicodestring4"):
        read(path)


def test_rows_that_are_only_claimed_are_not_counted_one_by_one(path: Path) -> None:
    def enlarge(metadata: Any) -> None:
        metadata.state_dict_metadata[KEY].size = torch.Size([2**62])

    change_metadata(path, enlarge)
    table = read(path)
    assert (table.count, table.placed) == (2**62 // LENGTH, [0, 1])


def test_the_keys_of_many_ranks_are_gathered_once() -> None:
    """All keys were copied for each rank: 2,000 ranks took 8 s."""

    class Folder:
        where = "many"

    class OneKey:
        files: ClassVar[set[str]] = set()

        def __init__(self, rank: int) -> None:
            self.keys = {str(rank): Stored(None, ())}

    indexes: Any = {rank: OneKey(rank) for rank in range(10000)}
    folder: Any = Folder()
    started = time.process_time()
    assert len(Checkpoint(folder, indexes).keys) == 10000
    assert time.process_time() - started < 0.5


def test_parts_that_lie_over_each_other_are_read_once(path: Path) -> None:
    """A few bytes of metadata could name the same megabytes again and again."""

    def repeat(metadata: Any) -> None:
        stored = metadata.state_dict_metadata[KEY]
        first, place = stored.chunks[0], next(iter(metadata.storage_data.values()))
        stored.chunks = [
            type(first)(torch.Size([row * LENGTH]), first.sizes) for row in range(1000)
        ]
        stored.size = torch.Size([1000 * LENGTH])
        index = type(next(iter(metadata.storage_data)))
        metadata.storage_data = {index(KEY, chunk.offsets): place for chunk in stored.chunks}

    change_metadata(path, repeat)
    table = read(path)
    reasons = [str(table.read(row)) for row in table.placed]
    assert sum("fewer bytes than the parts" in reason for reason in reasons) > 990


def test_chunks_without_dimensions_are_damage(path: Path) -> None:
    def flatten(metadata: Any) -> None:
        for chunk in metadata.state_dict_metadata[KEY].chunks:
            chunk.sizes = chunk.offsets = torch.Size([])

    change_metadata(path, flatten)
    assert read(path).read(0) == "damaged: it has no chunk of its own"


def test_a_chunk_in_two_places_is_refused(path: Path) -> None:
    def share(metadata: Any) -> None:
        metadata.state_dict_metadata[f"other.{KEY}"] = metadata.state_dict_metadata[KEY]

    change_metadata(path, share)
    with pytest.raises(RNGStateError, match="one chunk is in two places"):
        open_tables(str(path))


def archive_of(numbers: torch.Tensor) -> bytes:
    saved = io.BytesIO()
    torch.save(numbers.clone(), saved)
    return saved.getvalue()


def test_every_archive_is_read_as_if_it_were_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is like the last one is not taken apart again."""

    def read(content: bytes, count: int) -> list[int] | str:
        try:
            return [int(number) for number in from_archive(content, count)]
        except ValueError as error:
            return str(error)

    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(2**62, (LENGTH,), generator=generator) for _ in range(2))
    good = archive_of(second)
    damaged = [good, good[:-1], good + b"x", archive_of(second[:-1])]
    end = len(good)
    for place in (*range(0, 800, 7), *range(800, end, 97), *range(end - 1200, end, 5)):
        content = bytearray(good)
        content[place] ^= 1 + place % 255
        damaged.append(bytes(content))
    monkeypatch.setattr(tensors, "_like_the_last", None)
    assert read(archive_of(first), LENGTH) == first.tolist()
    like_the_first = tensors._like_the_last
    assert like_the_first is not None
    assert like_the_first(good) == second.numpy().tobytes()
    for content in damaged:
        for count in (LENGTH, LENGTH - 1):
            monkeypatch.setattr(tensors, "_like_the_last", None)
            expected = read(content, count)
            monkeypatch.setattr(tensors, "_like_the_last", like_the_first)
            assert read(content, count) == expected


def test_a_compressed_archive_is_refused(path: Path) -> None:
    """torch.save never compresses, and a few bytes could stand for all of the memory."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.randint(2**62, (LENGTH,)), plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="refused: it holds something compressed"):
        from_archive(packed.getvalue(), LENGTH)
