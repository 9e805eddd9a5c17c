"""Where checkpoints are found: beside other folders, in other formats, behind URLs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

from nemo_rng_dcp import StatefulRNG
from nemo_rng_dcp.cli.main import main
from nemo_rng_dcp.cli.reading.folder import Folder
from scripts.demo.rankless import RanklessRNG
from tests.support.command import Capture, ask, ask_json
from tests.support.jobs import job
from tests.support.records import records, save
from tests.support.streams import draw

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Fingerprints = dict[str, str]


def fingerprints(capsys: Capture, where: object) -> list[Fingerprints]:
    """Return what inspect says of the streams of every row."""
    (entry,) = ask_json(capsys, "inspect", where)["entries"]
    return [row["fingerprints"] for row in entry["streams"]]


def rng_after_draws() -> StatefulRNG:
    rng = StatefulRNG(42, ranked=True)
    draw()
    return rng


# Without collectives: each rank writes a .metadata of its own.


def save_alone(path: Path) -> Fingerprints:
    rng = rng_after_draws()
    dcp.save({"rng": rng}, checkpoint_id=path, use_collectives=False)
    return rng.fingerprint()


def load(path: Path) -> Fingerprints:
    rng = StatefulRNG(7, ranked=True)
    dcp.load({"rng": rng}, checkpoint_id=path)
    return rng.fingerprint()


def test_a_checkpoint_without_collectives_is_read(tmp_path: Path, capsys: Capture) -> None:
    saved = job(3, save_alone, tmp_path)
    assert not (tmp_path / ".metadata").exists()
    assert fingerprints(capsys, tmp_path) == saved == job(3, load, tmp_path)
    assert ask(capsys, "diff", tmp_path, tmp_path)[0] == 0
    assert ask(capsys, "explain", tmp_path, "--world-size", 3)[0] == 0


def test_without_collectives_a_new_rank_finds_nothing(tmp_path: Path, capsys: Capture) -> None:
    job(2, save_alone, tmp_path)
    code, text = ask(capsys, "explain", tmp_path, "--world-size", 3)
    assert (code, "not found by rank 2: it was saved with use_collectives=False" in text) == (
        1,
        True,
    )


def save_rank_less_alone(path: Path) -> None:
    dcp.save({"rng": RanklessRNG(42)}, checkpoint_id=path, use_collectives=False)


def test_without_collectives_no_rank_loses_its_own_state(tmp_path: Path, capsys: Capture) -> None:
    job(2, save_rank_less_alone, tmp_path)
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, "rng: one state a rank, each in a .metadata of its own" in text) == (0, True)


# Hugging Face's format.


def save_safetensors(path: Path) -> Fingerprints:
    rng = rng_after_draws()
    writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
    state = {"weight": torch.ones(3), **rng.state_dict()}
    dcp.save(state, storage_writer=writer)
    return rng.fingerprint()


def test_safetensors_are_read(tmp_path: Path, capsys: Capture) -> None:
    saved = job(3, save_safetensors, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 3
    assert fingerprints(capsys, tmp_path) == saved


def write_safetensors(path: Path, head: Any, data: bytes = b"") -> None:
    content = head if isinstance(head, bytes) else json.dumps(head).encode()
    file = len(content).to_bytes(8, "little") + content + data
    (path / "a.safetensors").write_bytes(file)


TENSOR = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"{", "its head is no JSON"),
        (b"[" * 10**5, "its head is no JSON"),
        ([], "malformed: found list, expected dict"),
        ({"rng_streams": {**TENSOR, "shape": [[[1]]]}}, "found list, expected integers"),
        ({"rng_streams": {**TENSOR, "shape": [-1]}}, "found -1, expected integers"),
        ({"rng_streams": {**TENSOR, "data_offsets": [8, 0]}}, "has no place"),
        ({"rng_streams": {"dtype": "I64"}}, "malformed: it has no 'shape'"),
        ({"__metadata__": {"DCP_SHARDING_INFO": "3"}}, "found int, expected dict"),
    ],
)
def test_damaged_safetensors_have_a_reason(
    head: Any, reason: str, tmp_path: Path, capsys: Capture
) -> None:
    write_safetensors(tmp_path, head)
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, reason in text) == (2, True), text


@pytest.mark.parametrize("content", [b"", b"\xff" * 8])
def test_a_truncated_head_has_a_reason(content: bytes, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, "a.safetensors is truncated" in text) == (2, True)


# A folder around the checkpoint.


def test_records_one_level_below_are_found(tmp_path: Path, capsys: Capture) -> None:
    """A framework's root: weights in one folder, records in another, logs beside them."""
    save(records(2), tmp_path / "rng")
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path / "model", no_dist=True)
    (tmp_path / "logs").mkdir()
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, "rng: 2 rows of 2 ranks" in text) == (0, True)
    write_safetensors(tmp_path, {"weight": TENSOR}, bytes(8))
    assert ask(capsys, "inspect", tmp_path)[0] == 0
    assert ask(capsys, "explain", tmp_path, "--world-size", 2)[0] == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".metadata", b"junk"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    ],
)
def test_a_bystander_that_is_damaged_is_no_error(
    name: str, content: bytes, tmp_path: Path, capsys: Capture
) -> None:
    """The folder that is meant has records; without it, the damaged one is named."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(content)
    rng = save(records(2), tmp_path / "rng")
    assert ask(capsys, "inspect", tmp_path)[0] == 0
    rng.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, f"{tmp_path}/model/{name} is " in text) == (2, True)


def test_import_passes_a_damaged_bystander(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "theirs"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / ".metadata").write_bytes(b"junk")
    code, text = ask(capsys, "import", folder, tmp_path / "ours")
    assert (code, f"{folder}/model/.metadata is damaged" in text) == (2, True)
    states = {"rng.0.torch": torch.get_rng_state()}
    dcp.save(states, checkpoint_id=folder / "dcp", no_dist=True)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0


def test_of_two_checkpoints_the_damaged_one_is_named(tmp_path: Path, capsys: Capture) -> None:
    good, bad = save(records(1), tmp_path / "good"), save(records(1), tmp_path / "bad")
    (bad / ".metadata").write_bytes(b"junk")
    code, text = ask(capsys, "diff", good, bad)
    assert (code, f"{bad}/.metadata is damaged" in text) == (2, True)


def test_of_several_checkpoints_one_is_to_be_named(tmp_path: Path, capsys: Capture) -> None:
    for step in ("step-1", "step-2"):
        save(records(1), tmp_path / step)
    code, text = ask(capsys, "inspect", tmp_path)
    assert code == 2
    assert "it holds 2 checkpoints, name one:" in text
    assert text.endswith("step-2")


# URLs.


@pytest.fixture
def memory() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    yield "memory://runs/step-1"
    files.rm("/runs", recursive=True)


def test_a_checkpoint_in_memory_is_read(memory: str, tmp_path: Path, capsys: Capture) -> None:
    """fsspec's own memory, written by DCP's own writer for fsspec."""
    (record,) = records(1)
    state = {"rng": {"rng_streams": record.to_tensor()}}
    dcp.save(state, storage_writer=FsspecWriter(memory), no_dist=True)
    code, text = ask(capsys, "inspect", memory)
    assert (code, "rng: 1 row of 1 rank" in text) == (0, True)
    assert ask(capsys, "diff", memory, save(records(1), tmp_path))[0] == 0
    assert ask(capsys, "explain", memory, "--world-size", 2)[0] == 0
    code, text = ask(capsys, "inspect", "memory://runs")
    assert code == 0, "one level below"
    code, text = ask(capsys, "inspect", "memory://runs/step-2")
    assert (code, "memory://runs/step-2: there is no such folder" in text) == (2, True)


def test_a_url_of_this_machine_is_read(tmp_path: Path, capsys: Capture) -> None:
    path = save(records(2), tmp_path / "checkpoint")
    assert ask(capsys, "diff", path, f"file://{path}")[0] == 0
    (path / "__0_0.distcp").unlink()
    code, text = ask(capsys, "inspect", f"file://{path}")
    assert (code, "unreadable: __0_0.distcp is missing" in text) == (1, True)


def test_what_links_lead_to_is_read_here_and_behind_a_url(tmp_path: Path, capsys: Capture) -> None:
    """Hugging Face's cache has links in the place of files. A pipe is no file: it would hang."""
    path, links = save(records(2), tmp_path / "checkpoint"), tmp_path / "links"
    links.mkdir()
    for file in path.iterdir():
        (links / file.name).symlink_to(file)
    (links / "below").symlink_to(path, target_is_directory=True)
    (links / "nowhere").symlink_to(tmp_path / "nothing")
    os.mkfifo(links / "model.safetensors")
    for where in (str(links), f"file://{links}"):
        assert ask(capsys, "diff", path, where)[0] == 0
        folder = Folder(where)
        assert folder.sizes == {file.name: file.stat().st_size for file in path.iterdir()}
        assert folder.folders == ["below"]


@pytest.mark.parametrize("name", ["a::b", "~", "~root", "file:a", "a*[b]?", "a%20b", " a", "a\\b"])
def test_a_path_is_taken_as_it_is(
    name: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec takes some of these for addresses of several parts, patterns or somebody's home."""
    save(records(1), tmp_path / name / name)
    monkeypatch.chdir(tmp_path)
    code, text = ask(capsys, "inspect", name)
    assert (code, "rng: 1 row of 1 rank" in text) == (0, True)


def test_a_file_is_no_folder(tmp_path: Path, capsys: Capture) -> None:
    file = save(records(1), tmp_path) / ".metadata"
    for where in (str(file), f"file://{file}"):
        code, text = ask(capsys, "inspect", where)
        assert code == 2
        assert text == f"nemo-rng-dcp: {where}: a file, expected the folder of a checkpoint"


def test_a_url_nobody_knows_is_one_line(capsys: Capture) -> None:
    code, text = ask(capsys, "inspect", "nowhere://bucket/folder")
    assert code == 2
    assert "nowhere://bucket/folder: ValueError: Protocol not known: nowhere" in text


# A real object store on loopback.


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of moto's S3 server, which speaks HTTP on a port of its own."""
    server_module = pytest.importorskip("moto.server", reason="pip install -e '.[object-store]'")
    s3fs = pytest.importorskip("s3fs", reason="pip install -e '.[object-store]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("runs")
    yield "s3://runs"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_checkpoint_in_an_object_store_is_read(
    bucket: str, tmp_path: Path, capsys: Capture
) -> None:
    (record,) = records(1)
    state = {"rng": {"rng_streams": record.to_tensor()}}
    dcp.save(state, storage_writer=FsspecWriter(f"{bucket}/step-1"), no_dist=True)
    code, text = ask(capsys, "inspect", f"{bucket}/step-1")
    assert (code, "rng: 1 row of 1 rank" in text) == (0, True)
    assert ask(capsys, "inspect", f"{bucket}/step-1/")[0] == 0
    assert ask(capsys, "diff", f"{bucket}/step-1", save(records(1), tmp_path))[0] == 0
    code, text = ask(capsys, "inspect", f"{bucket}/step-2")
    assert (code, "s3://runs/step-2: there is no such folder" in text) == (2, True)
    code, text = ask(capsys, "inspect", "s3://no-such-bucket/step-1")
    assert code == 2
