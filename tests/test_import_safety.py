"""``import`` executes nothing, in what it reads and where it writes, and takes little memory."""

import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from asking import Capture, ask
from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.cli.main import main
from streams import draw

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


@pytest.mark.parametrize("name", [".metadata", "__0.metadata"])
def test_code_in_the_folder_to_write_to_is_refused_by_name(
    name: str, folder: Path, trap: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "ours"
    out.mkdir()
    (out / name).write_bytes(pickle.dumps(Payload(trap)))
    code, text = ask(capsys, "import", folder, out)
    assert (code, text) == (
        2,
        f"nemo-rng-dcp: nothing was saved to {out}: refused: {out}/{name} wants posix.system, "
        "which DCP never stores there. Nothing in it was executed; do not load this checkpoint.",
    )
    assert [file.name for file in out.iterdir()] == [name]


def test_an_earlier_record_is_not_unpickled(folder: Path, trap: Path, tmp_path: Path) -> None:
    """Of names that DCP does store, a pickle can make a call of a method."""
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    file = tmp_path / "ours" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = "HERE"
    method = b"cbuiltins\ngetattr\ncpathlib\nPosixPath\nX%b%b\x85RX\x05\x00\x00\x00touch\x86R"
    method %= (len(str(trap)).to_bytes(4, "little"), str(trap).encode())
    # An object whose state gives it a __setstate__ is then given the state 0: touch(0) is called.
    call = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81}X\x0c\x00\x00\x00"
    call += b"__setstate__" + method + b"sbK\x00b"
    hostile = pickle.dumps(metadata, 2).replace(b"X\x04\x00\x00\x00HERE", call)
    file.write_bytes(hostile)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    assert not trap.exists()
    pickle.loads(hostile)  # the control: this is what DCP does
    trap.unlink()


def test_junk_in_the_folder_to_write_to_is_one_line(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "ours"
    out.mkdir()
    (out / ".metadata").write_bytes(b"junk")
    code, text = ask(capsys, "import", folder, out)
    assert (code, f"saved to {out}: {out}/.metadata is damaged or truncated" in text) == (2, True)
    assert "Traceback" not in text


def test_a_checkpoint_of_other_things_is_not_replaced(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "ours"
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=out)
    code, text = ask(capsys, "import", folder, out)
    assert (code, "holds a checkpoint of other things (weight, for one)" in text) == (2, True)
    loaded = {"weight": torch.zeros(3)}
    dcp.load(loaded, checkpoint_id=out)
    assert loaded["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_earlier_record_is_replaced(scheme: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    StatefulRNG(7).save(out)
    (out / "below").mkdir()
    (out / "below" / ".metadata").write_bytes(b"not of this checkpoint")
    StatefulRNG(42)
    torch.save(states(), folder / "rng_state_0.pth")
    expected = draw()
    assert main(["import", str(folder), f"{scheme}{out}"]) == 0
    StatefulRNG(1).load(out)
    assert draw() == expected
