"""Damaged and hostile files of frameworks: ``import`` and ``inspect`` read them as data.

Nothing in them is executed, no stream moves, and a file that cannot be read is a line on stderr.
``make fuzz`` runs this file for longer: FUZZ_EXAMPLES is the number of cases of each test.
"""

import faulthandler
import io
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import StatefulRNG
from tests.fuzz.test_metadata import CASE_BYTES, CASE_SECONDS, Dice, answer, damage
from tests.support.jobs import JobError, job
from tests.support.streams import unmoved

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
BATCHES = 1 if EXAMPLES < 1000 else 4

EXECUTED: list[str] = []
"""What was called that no data calls."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        EXECUTED.append(f"{event} {arguments}")
        raise RuntimeError("executed")


# What frameworks write.


def capture() -> dict[str, Any]:
    cuda = torch.Generator().manual_seed(7).get_state()[-16:]
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": [cuda],
    }


def transformers(folder: Path) -> None:
    for rank in range(2):
        torch.save(capture(), folder / f"rng_state_{rank}.pth")


def accelerate(folder: Path) -> None:
    names = {"python": "random_state", "numpy": "numpy_random_seed", "cpu": "torch_manual_seed"}
    state = {new: capture()[name] for name, new in names.items()}
    torch.save({"step": 3, **state}, folder / "random_states_0.pkl")


def older_zip_less(folder: Path) -> None:
    """What torch before 1.6 wrote, several pickles one after the other: it is refused."""
    file = folder / "rng_state_0.pth"
    torch.save(capture(), file, _use_new_zipfile_serialization=False)


def composer(folder: Path) -> None:
    torch.save({"state": {}, "rng": [capture()] * 2}, folder / "ep0-ba4-rank0.pt")


def keys_by_rank(folder: Path) -> None:
    """A DCP checkpoint, of which some values are pickles."""
    states = {f"rank_{rank}": capture() for rank in range(2)}
    dcp.save({"rng": states, "weight": torch.ones(3)}, checkpoint_id=folder, no_dist=True)


def one_state_for_all(folder: Path) -> None:
    dcp.save({"rng_state": capture()}, checkpoint_id=folder, no_dist=True)


WRITERS = (transformers, accelerate, older_zip_less, composer, keys_by_rank, one_state_for_all)


# How they are damaged.


def hostile(dice: Dice, trap: Path) -> bytes:
    """Return a piece of a pickle that creates a file where it is executed."""
    call = f"touch {trap}".encode()
    text = b"X" + len(call).to_bytes(4, "little") + call
    pieces = [
        b"cos\nsystem\n" + text + b"\x85R",
        b"(" + text + b"ios\nsystem\n",
        b"cposix\nsystem\n" + text + b"\x85R0",
        b"\x8c\x02os\x8c\x06system\x93" + text + b"\x85R",
        b"csubprocess\ncall\n]" + text + b"a\x85R",
        b"cbuiltins\ngetattr\ncos\npath\nX\x05\x00\x00\x00abcde\x86R",
    ]
    return dice.choice(pieces)


def damage_a_pickle(dice: Dice, content: bytes, trap: Path) -> bytes:
    if dice.random() < 0.5:
        return damage(dice, content)
    # Behind the protocol it is a good pickle that begins with a call.
    place = 2 if dice.random() < 0.5 else dice.randrange(len(content))
    return content[:place] + hostile(dice, trap) + content[place:]


def damage_a_file(dice: Dice, content: bytes, trap: Path) -> bytes:
    """Damage a file, or one of the files in it: a ZIP archive sees that its own bytes changed."""
    if not zipfile.is_zipfile(io.BytesIO(content)) or dice.random() < 0.3:
        return damage_a_pickle(dice, content, trap)
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(new, "w") as archive:
        names = old.namelist()
        [pickled] = [name for name in names if name.endswith("data.pkl")]
        victim = pickled if dice.random() < 0.8 else dice.choice(names)
        for name in names:
            inner = old.read(name)
            archive.writestr(name, damage_a_pickle(dice, inner, trap) if name == victim else inner)
    return new.getvalue()


# The cases.


def run_cases(folder: Path, writer: Callable[[Path], None], first: int, count: int) -> list[int]:
    """Run cases in a process of its own, which ends if one takes too long; return exit codes."""
    faulthandler.register(signal.SIGPROF, chain=True)  # says where it was
    sys.addaudithook(watch)
    folder = folder / str(first)
    theirs, ours, trap = folder / "theirs", folder / "ours", folder / "executed"
    theirs.mkdir(parents=True)
    writer(theirs)
    where = theirs / "ep0-ba4-rank0.pt" if writer is composer else theirs
    good = {file: file.read_bytes() for file in theirs.iterdir()}
    answers = [answer(["import", str(where), str(ours)]), answer(["inspect", str(theirs)])]
    codes = [code for code, _ in answers]
    # Not again in a case, with its little memory.
    StatefulRNG(1).save(folder / "warm")
    StatefulRNG(1).load(folder / "warm")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CASE_BYTES, resource.RLIM_INFINITY))
    for case in range(first, first + count):
        dice = random.Random(case)
        shutil.rmtree(ours, ignore_errors=True)
        for file, content in good.items():
            file.write_bytes(content)
        file = dice.choice(sorted(good))
        file.write_bytes(damage_a_file(dice, good[file], trap))
        found = {file: file.read_bytes() for file in good}
        words = ["import", str(where), str(ours)]
        if writer in (keys_by_rank, one_state_for_all) and dice.random() < 0.5:
            words = ["inspect", str(theirs)]
        print("case", case)
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
        with unmoved():
            code, printed = answer(words)
        signal.setitimer(signal.ITIMER_PROF, 0)
        assert code in (0, 1, 2)
        assert len(printed) < 20000
        # An error that nobody foresaw names no file.
        assert code != 2 or "theirs" in printed, printed
        assert not EXECUTED
        assert not trap.exists()
        assert {file: file.read_bytes() for file in good} == found
        assert set(theirs.iterdir()) == set(good)
        if words[0] == "import":
            assert ours.exists() == (code == 0)
            if code == 0:  # what it writes, a load takes
                StatefulRNG(1).load(ours)
        codes.append(code)
    return codes


GOOD = {older_zip_less: (2, 2), one_state_for_all: (2, 0), keys_by_rank: (0, 0)}
"""What ``import`` and ``inspect`` say of the unharmed files; others are no checkpoint."""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_frameworks_are_data(
    writer: Callable[[Path], None], batch: int, tmp_path: Path
) -> None:
    count = -(-EXAMPLES // BATCHES // len(WRITERS))
    first = batch * count
    arguments = (tmp_path, writer, first, count)
    [codes] = job(1, run_cases, *arguments, group=False, limit=100 + count)
    assert tuple(codes[:2]) == GOOD.get(writer, (0, 2))
    assert {2} <= set(codes[2:])


# The watch is real.


def execute(folder: Path) -> None:
    sys.addaudithook(watch)
    pickle.loads(b"\x80\x02" + hostile(random.Random(0), folder / "executed") + b".")


def test_a_call_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="executed"):
        job(1, execute, tmp_path, group=False)
