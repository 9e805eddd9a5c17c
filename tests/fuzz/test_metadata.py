"""Damaged and hostile checkpoints: the command always answers, soon, and in little memory.

``make fuzz`` runs this file for longer: FUZZ_EXAMPLES is the number of cases of each test.
"""

import contextlib
import faulthandler
import io
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rng_dcp.cli.main import main
from tests.support.jobs import JobError, job
from tests.support.records import change_metadata, records, save

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
BATCHES = 4
CASE_SECONDS = 2
"""CPU time for one case: hundreds of times what the unharmed checkpoint takes."""
CASE_BYTES = 2**28
"""Memory for one case, beside what the process has when it begins."""

Dice = random.Random


# How files are damaged.


def flip(dice: Dice, content: bytearray) -> None:
    for _ in range(dice.randint(1, 4)):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def overwrite(dice: Dice, content: bytearray) -> None:
    """Put opcodes and large numbers of pickles where others were."""
    start = dice.randrange(len(content))
    pieces = [
        b"r\xff\xff\xff\x7f",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x96\x00\x00\x00\x00\x01\x00\x00\x00",
        b"\x8b\xff\xff\xff\x7f",
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        b"X\xff\xff\xff\x7f",
        b"cos\nsystem\n",
        b"2" * 50,
        b"h\x00\x86q\x00" * 40,
        b"}(" * 30,
        b"\x80\x04",
        b"R",
        b"b",
        b"0",
        b"\xff" * 8,
    ]
    piece = dice.choice(pieces)
    content[start : start + dice.choice([0, len(piece)])] = piece


def cut(dice: Dice, content: bytearray) -> None:
    start = dice.randrange(len(content))
    del content[start : start + dice.randint(1, 1 + len(content) // 3)]


def repeat(dice: Dice, content: bytearray) -> None:
    start = dice.randrange(len(content))
    piece = content[start : start + dice.randint(1, 200)]
    content[start:start] = piece * dice.randint(1, 20)


DAMAGE = [flip, overwrite, cut, repeat]


def damage(dice: Dice, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(dice.randint(1, 3)):
        if damaged:
            dice.choice(DAMAGE)(dice, damaged)
    return bytes(damaged)


# What a good pickle can say that is not so.


def nested(depth: int) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


LIES: list[Callable[[Dice], Any]] = [
    lambda dice: dice.choice([-1, 0, 1, 2**31, 2**62, 2**63, 2**200]),
    lambda dice: torch.Size([dice.choice([0, 1, 7, 2**40, 2**62])] * dice.randint(0, 3)),
    lambda dice: nested(dice.randint(1, 80)),
    lambda dice: "name" * dice.choice([0, 1, 10**4]),
    lambda dice: "\033[31m\n",
    lambda dice: [None] * dice.choice([0, 1, 10**4]),
    lambda dice: {},
    lambda dice: None,
]


def lie(dice: Dice, metadata: Any) -> None:
    """Change what a checkpoint says of itself in a few places."""
    for _ in range(dice.randint(1, 3)):
        try:
            stored = dice.choice(list(metadata.state_dict_metadata.values()))
            place = dice.choice(list(metadata.storage_data.values()))
            chunk = dice.choice(stored.chunks)
            index = dice.choice(list(metadata.storage_data))
            things = [
                (metadata, ["state_dict_metadata", "storage_data", "planner_data"]),
                (stored, ["size", "chunks", "properties"]),
                (place, ["relative_path", "offset", "length"]),
                (chunk, ["offsets", "sizes"]),
            ]
            thing, names = dice.choice(things)
            if dice.random() < 0.2:
                metadata.state_dict_metadata[f"{dice.random()}.rng_streams"] = stored
            elif dice.random() < 0.2:
                stored.chunks = stored.chunks * dice.choice([0, 2, 1000])
            elif dice.random() < 0.1:
                object.__setattr__(index, "offset", dice.choice(LIES)(dice))
            else:
                setattr(thing, dice.choice(names), dice.choice(LIES)(dice))
        except (AttributeError, LookupError, TypeError):
            return  # an earlier lie has left nothing to lie about


# The cases.


def base_checkpoints(folder: Path) -> list[Path]:
    """Return files that say what is in a checkpoint of 3 rows, each in a form of its own."""
    files = []
    for protocol in (2, 4, 5):
        path = save(records(3), folder / f"protocol-{protocol}", "app.rng")
        metadata = pickle.loads((path / ".metadata").read_bytes())
        (path / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
        files.append(path / ".metadata")
    return files


def write_damaged(dice: Dice, file: Path, good: bytes) -> None:
    file.write_bytes(damage(dice, good))


def write_lies(dice: Dice, file: Path, good: bytes) -> None:
    file.write_bytes(good)
    change_metadata(file.parent, lambda metadata: lie(dice, metadata))


def write_damaged_rows(dice: Dice, file: Path, good: bytes) -> None:
    rows = file.with_name("__0_0.distcp")
    keep = rows.with_suffix(".kept")
    if not keep.exists():
        keep.write_bytes(rows.read_bytes())
    rows.write_bytes(damage(dice, keep.read_bytes()))


def write_damaged_safetensors(dice: Dice, file: Path, good: bytes) -> None:
    """The same rows in the other format; its head is JSON."""
    file.unlink(missing_ok=True)
    tensors = [record.to_tensor() for record in records(3)]
    length = 8 * len(tensors[0])
    for row, tensor in enumerate(tensors):
        head = (
            b'{"__metadata__":{"DCP_SHARDING_INFO":"{\\"rng_streams\\":{\\"saved_offsets\\":[%d]}}"'
            b'},"rng_streams":{"dtype":"I64","shape":[%d],"data_offsets":[0,%d]}}'
        ) % (row * length // 8, length // 8, length)
        if row == 1:
            head = damage(dice, head)
        size = dice.choice([len(head)] * 9 + [0, 2**62]) if row == 1 else len(head)
        content = size.to_bytes(8, "little") + head + tensor.numpy().tobytes()
        file.with_name(f"shard-{row}.safetensors").write_bytes(content)


def answer(words: list[str]) -> tuple[int, str]:
    """Return the command's exit code and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(words)
    return code, out.getvalue()


def limit_time(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CASE_BYTES, resource.RLIM_INFINITY))


def run_cases(folder: Path, write: Callable[..., None], first: int, count: int) -> None:
    """Run cases in a process of its own, which ends if one takes too long."""
    faulthandler.register(signal.SIGPROF, chain=True)  # says where it was
    folder = folder / str(first)
    files = base_checkpoints(folder)
    good = {file: file.read_bytes() for file in files}
    assert answer(["inspect", str(files[0].parent)])[0] == 0
    assert answer(["explain", str(files[0].parent), "--world-size", "5"])[0] == 0
    limit_memory()
    for case in range(first, first + count):
        dice = random.Random(case)
        file = dice.choice(files)
        write(dice, file, good[file])
        where = str(file.parent)
        words = [["inspect", where], ["diff", where, where]]
        words.append(["explain", where, "--world-size", "5"])
        print("case", case)
        # A lie can make a file of millions of bytes; Python 3.10 reads them slowly.
        limit_time(CASE_SECONDS + (file.stat().st_size if file.exists() else 0) / 4_000_000)
        code, printed = answer(dice.choice(words))
        limit_time(0)
        assert code in (0, 1, 2)
        assert len(printed) < 20000 + 20 * file.parent.joinpath("__0_0.distcp").stat().st_size


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize(
    "write", [write_damaged, write_lies, write_damaged_rows, write_damaged_safetensors]
)
def test_the_command_always_answers(write: Callable[..., None], batch: int, tmp_path: Path) -> None:
    count = -(-EXAMPLES // BATCHES)
    job(1, run_cases, tmp_path, write, batch * count, count, group=False, limit=100 + count)


# The limits are real.


def hang_while_answering(folder: Path) -> None:
    limit_time(0.1)
    hash(nested(60))


def allocate(folder: Path) -> None:
    limit_memory()
    pickle.loads(b"\x80\x02Nr\xff\xff\xff\x7f.")


@pytest.mark.parametrize(
    ("function", "end"), [(hang_while_answering, "SIGPROF"), (allocate, "MemoryError")]
)
def test_a_case_that_takes_too_much_is_noticed(
    function: Callable[..., None], end: str, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=end):
        job(1, function, tmp_path, group=False)
