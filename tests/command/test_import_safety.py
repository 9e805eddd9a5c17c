"""``import`` executes nothing, in what it reads and where it writes, and takes little memory."""

import contextlib
import copy
import faulthandler
import io
import os
import pickle
import random
import resource
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.cli.main import main
from tests.support.command import Capture, ask
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def states() -> dict[str, Any]:
    """Return a file's content as Transformers writes it."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A framework's checkpoint of one rank."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(states(), folder / "rng_state_0.pth")
    return folder


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come into being."""
    file = tmp_path / "executed"
    yield file
    assert not file.exists()


# Where it writes.


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def an_earlier_record(out: Path, trap: Path) -> None:
    StatefulRNG(7).save(out)


def a_hostile_record(out: Path, trap: Path) -> None:
    """Of names that DCP does store, a pickle can make a call of a method."""
    StatefulRNG(7).save(out)
    metadata = pickle.loads((out / ".metadata").read_bytes())
    metadata.planner_data = "HERE"
    method = b"cbuiltins\ngetattr\ncpathlib\nPosixPath\nX%b%b\x85RX\x05\x00\x00\x00touch\x86R"
    method %= (len(str(trap)).to_bytes(4, "little"), str(trap).encode())
    # An object whose state gives it a __setstate__ is then given the state 0: touch(0) is called.
    call = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81}X\x0c\x00\x00\x00"
    call += b"__setstate__" + method + b"sbK\x00b"
    hostile = pickle.dumps(metadata, 2).replace(b"X\x04\x00\x00\x00HERE", call)
    (out / ".metadata").write_bytes(hostile)
    pickle.loads(hostile)  # the control: this is what DCP does
    trap.unlink()


def code(out: Path, trap: Path) -> None:
    out.mkdir()
    (out / ".metadata").write_bytes(pickle.dumps(Payload(trap)))


def code_of_a_rank(out: Path, trap: Path) -> None:
    out.mkdir()
    (out / "__0.metadata").write_bytes(pickle.dumps(Payload(trap)))


def a_checkpoint_of_other_things(out: Path, trap: Path) -> None:
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=out)


def a_folder(out: Path, trap: Path) -> None:
    (out / "below").mkdir(parents=True)


def a_file(out: Path, trap: Path) -> None:
    out.write_bytes(b"notes")


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    "put",
    [
        an_earlier_record,
        a_hostile_record,
        code,
        code_of_a_rank,
        a_checkpoint_of_other_things,
        a_folder,
        a_file,
    ],
)
def test_what_is_there_is_neither_read_nor_replaced(
    put: Callable[[Path, Path], None],
    scheme: str,
    folder: Path,
    trap: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    out = tmp_path / "ours"
    put(out, trap)
    before = contents(out)
    exit_code, text = ask(capsys, "import", folder, f"{scheme}{out}")
    assert (exit_code, text) == (
        2,
        f"nemo-rng-dcp: {scheme}{out}: it is there already, expected a new folder or an empty one",
    )
    assert contents(out) == before


def contents(out: Path) -> dict[Path, bytes | None]:
    return {file: None if file.is_dir() else file.read_bytes() for file in [out, *out.rglob("*")]}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_empty_folder_is_written_to(scheme: str, folder: Path, tmp_path: Path) -> None:
    StatefulRNG(42)
    torch.save(states(), folder / "rng_state_0.pth")
    expected = draw()
    (tmp_path / "ours").mkdir()
    assert main(["import", str(folder), f"{scheme}{tmp_path}/ours"]) == 0
    StatefulRNG(1).load(tmp_path / "ours")
    assert draw() == expected


# Time and memory grow with the bytes that are there.


LITTLE_MEMORY = 2**26


def reason(folder: Path) -> str:
    """Return why ``import`` stops, in a process with little memory."""
    [text] = job(1, import_in_little_memory, folder, group=False)
    return text


def import_in_little_memory(folder: Path) -> str:
    # Its thread begins with memory of its own, at times after what is used was counted.
    faulthandler.cancel_dump_traceback_later()
    faulthandler.register(signal.SIGALRM, chain=True)  # says where it was
    signal.alarm(30)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LITTLE_MEMORY, resource.RLIM_INFINITY))
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        assert main(["import", str(folder), str(folder / "out")]) == 2
    assert not (folder / "out").exists()
    return printed.getvalue()


def test_a_large_number_in_a_files_name_costs_nothing(tmp_path: Path) -> None:
    """A set of all ranks up to it was built."""
    torch.save({"rng": states()}, tmp_path / "extra_state_world_size_99999999_rank_0.pt")
    assert "rank 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 are missing" in reason(tmp_path)


def nested(depth: int) -> Any:
    """Return a tuple that takes a few bytes and 2**depth steps to print, compare or hash."""
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


MANY = torch.zeros(1, dtype=torch.uint8).expand(10**11)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("cpu", MANY),
        ("cuda", MANY),
        ("cuda", [MANY]),
        ("cuda", nested(60)),
        ("numpy", ("MT19937", MANY, 0, 0, 0.0)),
        ("numpy", nested(60)),
    ],
)
def test_a_state_of_too_many_numbers_costs_nothing(name: str, state: Any, folder: Path) -> None:
    """Bytes that stand for many times as many: a tensor repeats them, or a tuple itself."""
    torch.save({**states(), name: state}, folder / "rng_state_0.pth")
    assert (folder / "rng_state_0.pth").stat().st_size < 30000
    assert "the state is malformed: it has more than 65536 numbers" in reason(folder)


@pytest.mark.parametrize("depth", [25, 60])
def test_nested_tuples_as_a_key_cost_nothing(depth: int, folder: Path) -> None:
    """torch's unpickler hashed them for ever, and an error that printed them took 560 MB."""
    file, plain = folder / "rng_state_0.pth", io.BytesIO()
    torch.save({}, plain)
    twice = b"".join(b"h%c\x86q%c" % (number, number + 1) for number in range(depth))
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            hostile = b"\x80\x02})q\x00" + twice + b"K\x01s."
            new.writestr(name, hostile if name.endswith("data.pkl") else old.read(name))
    assert file.stat().st_size < 1100
    started = time.process_time()
    assert "rng_state_0.pth: damaged, or not written by torch.save" in reason(folder)
    assert time.process_time() - started < 5


def test_a_compressed_file_is_refused(folder: Path) -> None:
    """torch inflates it: 500 kB took 764 MB."""
    zeros = torch.zeros(2 * LITTLE_MEMORY, dtype=torch.uint8)
    file, plain = folder / "rng_state_0.pth", io.BytesIO()
    torch.save({**states(), "zeros": zeros}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert file.stat().st_size < 2**18
    assert "rng_state_0.pth: refused: it holds something compressed" in reason(folder)


def test_entries_that_lie_over_each_other_are_refused(folder: Path) -> None:
    """The same bytes under a thousand names."""
    file, plain = folder / "rng_state_0.pth", io.BytesIO()
    size = LITTLE_MEMORY // 500
    zeros = {str(number): torch.zeros(size, dtype=torch.uint8) for number in range(1000)}
    torch.save({**states(), **zeros}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w") as new:
        once = None
        for entry in old.infolist():
            if entry.file_size < size:
                new.writestr(entry.filename, old.read(entry))
            elif once is None:
                new.writestr(entry.filename, old.read(entry))
                once = new.getinfo(entry.filename)
            else:
                new.filelist.append(copy.copy(once))
                new.filelist[-1].filename = new.filelist[-1].orig_filename = entry.filename
    assert file.stat().st_size < 2**20
    assert "rng_state_0.pth: refused: it holds more bytes than the file has" in reason(folder)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """To open it waits for ever."""
    os.mkfifo(tmp_path / "rng_state_0.pth")
    assert "no RNG files of a rank in it" in reason(tmp_path)


# Names that a file has.


def test_names_do_not_reach_the_terminal_as_control_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "\033[31mtheirs", tmp_path / "\033[31mours"
    folder.mkdir()
    unknown = torch.zeros(16, dtype=torch.uint8)
    state = {"rng": {**states(), "\033[31mxpu": unknown}}
    torch.save(state, folder / "\033[31m.pt")
    assert main(["import", str(folder / "\033[31m.pt"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "\033" not in printed
    assert "note: not read: \\x1b[31mxpu\n" in printed


def test_a_field_without_a_name_is_noted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a TypeError, after everything was written."""
    unknown = torch.zeros(16, dtype=torch.uint8)
    torch.save({**states(), 7: unknown, "xpu": unknown}, folder / "rng_state_0.pth")
    assert main(["import", str(folder), str(tmp_path / "out")]) == 0
    assert "note: not read: 7, xpu\n" in capsys.readouterr().out
