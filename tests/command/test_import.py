"""``nemo-rng-dcp import``: what frameworks stored by rank becomes a checkpoint of records.

The files here have the frameworks' shape; tests/frameworks imports what Accelerate, Transformers
and NeMo Automodel write themselves. The shape of Composer's was read off a file that mosaicml
0.32.1 wrote, verl's and miles' off their code.
"""

import io
import json
import os
import random
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nemo_rng_dcp import RNGStateError, RNGStateWarning, StatefulRNG
from nemo_rng_dcp.cli.importing.command import save_records
from nemo_rng_dcp.cli.importing.rank_states import to_records
from nemo_rng_dcp.cli.importing.search import read_states
from nemo_rng_dcp.cli.main import main
from nemo_rng_dcp.record import Record
from tests.support.command import Capture
from tests.support.jobs import job
from tests.support.streams import draw, unmoved, warned

Numbers = list[float]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def automodel() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "random_rng_state": random.getstate(),
        "np_bit_generator": name,
        "np_keys": torch.from_numpy(keys.copy()),  # type: ignore[union-attr]
        "np_position": position,
        "np_has_gauss": has_gauss,
        "np_cached_gaussian": gauss,
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": [],
    }


def accelerate() -> dict[str, Any]:
    return {
        "step": 3,
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }


def transformers() -> dict[str, Any]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return dict(zip(("python", "numpy", "cpu"), states, strict=True))


def verl() -> dict[str, Any]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    names = ("random", "numpy", "cpu")
    return {"lr_scheduler": {"_last_lr": [0.1]}, "rng": dict(zip(names, states, strict=True))}


def composer() -> dict[str, Any]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return dict(zip(("python", "numpy", "torch"), states, strict=True))


@dataclass
class OlderRNGState:
    random_rng_state: Any
    np_rng_state: Any
    torch_rng_state: Any
    cuda_rng_state: Any


OlderRNGState.__module__ = "nemo_automodel.components.training.rng"
OlderRNGState.__qualname__ = "RNGState"


def older_automodel() -> Any:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    return OlderRNGState(*states, [])


def saved(folder: Path, name: str, capture: Callable[[], Any], ranks: int = 2) -> list[Numbers]:
    """Write a file for each rank and return what each drew after that."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    drawn = []
    for rank in range(ranks):
        StatefulRNG(42 + rank)
        draw(rank + 1)
        np.random.standard_normal()
        torch.save(capture(), folder / name.replace("RANK", str(rank)))
        drawn.append(draw())
    return drawn


def read_records(folder: Path) -> list[Record]:
    return to_records(read_states(folder))


def loaded(path: Path) -> tuple[Numbers, int]:
    rng = StatefulRNG(1, ranked=True)
    messages = warned(lambda: rng.load(path))
    return draw(), len(messages)


@pytest.mark.parametrize(
    ("name", "capture"),
    [
        ("rng/rng_global_rank_RANK.pt", automodel),
        ("rng/rng_dp_rank_RANK.pt", automodel),
        ("random_states_RANK.pkl", accelerate),
        ("rng_state_RANK.pth", transformers),
        ("actor/extra_state_world_size_2_rank_RANK.pt", verl),
    ],
)
def test_every_rank_continues_and_more_fork(
    name: str, capture: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = saved(tmp_path / "framework", name, capture)
    assert main(["import", str(tmp_path / "framework"), str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().out
    assert all(Path(name).name.replace("RANK", str(rank)) in printed for rank in range(2))
    assert [numbers for numbers, _ in job(2, loaded, tmp_path / "ours")] == expected
    found = [numbers for numbers, _ in job(3, loaded, tmp_path / "ours")]
    assert found[:2] == expected
    assert found[2] not in expected


def composers_states() -> tuple[list[dict[str, Any]], list[Numbers]]:
    """Return the states of two ranks, and what each drew after that."""
    states, drawn = [], []
    for rank in range(2):
        StatefulRNG(42 + rank)
        np.random.standard_normal()
        states.append(composer())
        drawn.append(draw())
    return states, drawn


@pytest.mark.parametrize("named", ["", "ep0-ba4-rank0.pt"])
def test_composers_file_has_all_ranks(named: str, tmp_path: Path) -> None:
    """As mosaicml 0.32.1 writes it: what its real file has beside the states is here too."""
    states, expected = composers_states()
    beside = {
        "timestamp": {"Timestamp": {"total_wct": timedelta(seconds=1)}},
        "metadata": {"torch_version": torch.__version__},
    }
    torch.save({"state": beside, "rng": states}, tmp_path / "ep0-ba4-rank0.pt")
    save_records(read_records(tmp_path / named), tmp_path / "rng")
    assert [numbers for numbers, _ in job(2, loaded, tmp_path / "rng")] == expected


def test_of_several_of_composers_files_one_must_be_named(tmp_path: Path) -> None:
    for batch in (4, 8):
        torch.save({"rng": composers_states()[0]}, tmp_path / f"ep0-ba{batch}-rank0.pt")
    with pytest.raises(RNGStateError, match=r"2 checkpoints.*/ep0-ba4-rank0\.pt \(Composer\)"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"state": {}}, r"it has no 'rng', but \['state'\]"),
        ({"rng": []}, "found 0 ranks' states, expected one rank's"),
        ([1], "found a list, expected a dict of states"),
    ],
)
def test_of_another_file_the_error_says_what_it_has(
    content: object, reason: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(RNGStateError, match=rf"weights\.pt: {reason}"):
        read_records(tmp_path / "weights.pt")


def test_miles_stores_torch_alone(tmp_path: Path) -> None:
    StatefulRNG(42)
    torch.save({"torch": torch.get_rng_state(), "cuda": []}, tmp_path / "rng_rank_0.pt")
    expected = torch.rand(3).tolist()
    save_records(read_records(tmp_path), tmp_path / "rng")
    with pytest.warns(RNGStateWarning, match="has no python, numpy.*: the stream stays as it is"):
        StatefulRNG(1).load(tmp_path / "rng")
    assert torch.rand(3).tolist() == expected


@pytest.mark.parametrize(
    ("name", "python", "numpy", "torch_"),
    [
        ("rng_rank_00RANK.pt", "python", "numpy", "torch"),  # miles' name
        ("my-rng.RANK.bin", "python_random", "np_state", "torch_cpu"),
        ("random_RANK.pkl", "random", "np", "cpu"),
    ],
)
def test_fields_are_read_whatever_the_file_is_called(
    name: str, python: str, numpy: str, torch_: str, tmp_path: Path
) -> None:
    """Of a file that was named as miles does, only torch's state was read."""

    def capture() -> dict[str, Any]:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        return {"step": 3, **dict(zip((python, numpy, torch_), states, strict=True))}

    expected = saved(tmp_path, name, capture)
    (tmp_path / "rng_plot_3.svg").touch()
    save_records(read_records(tmp_path), tmp_path / "rng")
    assert [numbers for numbers, _ in job(2, loaded, tmp_path / "rng")] == expected


def test_a_state_is_not_left_out_in_silence(tmp_path: Path) -> None:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state()}
    torch.save({**state, "builtin": random.getstate()}, tmp_path / "rng_rank_0.pt")
    with pytest.raises(RNGStateError, match=r"no state of python, but \['builtin'\]"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("file", "verdict"),
    [
        ("mp_rank_00/model_optim_rng.pt", "Megatron's, one state for each pipeline and tensor"),
        ("rng.pt", "it names no rank: one process's state, or one for all ranks"),
    ],
)
def test_what_is_no_ranks_own_is_named(file: str, verdict: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    torch.save(transformers(), tmp_path / file)
    with pytest.raises(RNGStateError, match=rf"Found \S+/{file}: {verdict}"):
        read_records(tmp_path)


def test_one_process_of_transformers(tmp_path: Path) -> None:
    expected = saved(tmp_path, "rng_state.pth", transformers, ranks=1)
    assert read_states(tmp_path).ranks[0].place == "rng_state.pth"
    save_records(read_records(tmp_path), tmp_path / "rng")
    StatefulRNG(1).load(tmp_path / "rng")
    assert draw() == expected[0]


def test_automodels_older_dataclass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.save looks the class up where the pickle will say that it is.
    module = types.ModuleType(OlderRNGState.__module__)
    module.RNGState = OlderRNGState  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nemo_automodel", types.ModuleType("nemo_automodel"))
        patch.setitem(sys.modules, OlderRNGState.__module__, module)
        expected = saved(tmp_path, "rng_dp_rank_RANK.pt", older_automodel)
    records = read_records(tmp_path)
    save_records(records, tmp_path / "rng")
    assert [numbers for numbers, _ in job(2, loaded, tmp_path / "rng")] == expected


def test_what_a_record_says_of_the_job(tmp_path: Path) -> None:
    saved(tmp_path, "random_states_RANK.pkl", accelerate, ranks=3)
    records = read_records(tmp_path)
    assert [(record.row, record.rows, record.world_size) for record in records] == [
        (0, 3, 3),
        (1, 3, 3),
        (2, 3, 3),
    ]
    assert {record.seed for record in records} == {42}
    assert {record.ranked for record in records} == {True}
    file = tmp_path / "random_states_1.pkl"
    assert records[1].taken_at == file.stat().st_mtime_ns


def test_ranks_that_are_alike_are_not_ranked(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(transformers(), tmp_path / f"rng_state_{rank}.pth")
    assert [record.ranked for record in read_records(tmp_path)] == [False, False]


def cuda(seed: int, drawn: int) -> torch.Tensor:
    """Return the state of a CUDA generator: its seed, and how much was drawn since."""
    state = seed.to_bytes(8, "little") + drawn.to_bytes(8, "little")
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def drawn_of(records: list[Record]) -> list[int]:
    """Return how much was drawn from each row's CUDA stream."""
    return [int.from_bytes(record.streams["cuda"].state[8:], "little") for record in records]


@pytest.mark.parametrize("naming", ["rng_state_{}.pth", "rng_dp_rank_{}.pt"])
def test_the_device_that_was_used_is_the_ranks(
    naming: str, tmp_path: Path, capsys: Capture
) -> None:
    """Two nodes of two ranks, on machines with four devices: rank 2 had device 0."""
    for rank in range(4):
        devices = [cuda(rank, 4000 + rank if device == rank % 2 else 0) for device in range(4)]
        torch.save({**transformers(), "cuda": devices}, tmp_path / naming.format(rank))
    records = read_records(tmp_path)
    assert drawn_of(records) == [4000, 4001, 4002, 4003]
    assert records[0].streams["cuda"].kind == "torch.cuda"
    assert main(["import", str(tmp_path), str(tmp_path / "out")]) == 0
    assert "note" not in capsys.readouterr().out


def test_devices_that_are_alike_are_one_stream(tmp_path: Path) -> None:
    torch.save({**transformers(), "cuda": [cuda(7, 0)] * 2}, tmp_path / "rng_state_0.pth")
    assert drawn_of(read_records(tmp_path)) == [0]


@pytest.mark.parametrize(
    "devices", [[cuda(1, 5), cuda(1, 6), cuda(1, 0)], [cuda(7, 0), cuda(8, 0)]], ids=["two", "none"]
)
def test_which_of_several_devices_was_the_ranks_is_not_guessed(
    devices: list[torch.Tensor], tmp_path: Path
) -> None:
    torch.save({**transformers(), "cuda": devices}, tmp_path / "rng_state_0.pth")
    reason = (
        rf"rng_state_0\.pth: cuda: of the states of {len(devices)} devices 2 may be this rank's"
    )
    with pytest.raises(RNGStateError, match=reason):
        read_records(tmp_path)


def test_what_is_not_read_of_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {**accelerate(), "torch_xpu_manual_seed": [torch.zeros(16, dtype=torch.uint8)]}
    torch.save(state, tmp_path / "random_states_0.pkl")
    assert read_states(tmp_path).unread == ("torch_xpu_manual_seed",)
    assert main(["import", str(tmp_path), str(tmp_path / "out")]) == 0
    assert "note: not read: torch_xpu_manual_seed" in capsys.readouterr().out


def test_a_state_that_torch_would_not_take_is_refused(tmp_path: Path) -> None:
    torch.save(
        {**transformers(), "cpu": torch.zeros(7, dtype=torch.uint8)}, tmp_path / "rng_state.pth"
    )
    with pytest.raises(RNGStateError, match=r"torch: the state is malformed.*\(7,\)"):
        read_records(tmp_path)


@pytest.mark.parametrize("folder", ["", "s3://bucket/run"])
def test_only_a_folder_of_this_machine_is_imported(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", folder, str(tmp_path)]) == 2
    assert "expected a folder of this machine" in capsys.readouterr().err


def test_a_url_is_written_to(tmp_path: Path) -> None:
    expected = saved(tmp_path, "random_states_RANK.pkl", accelerate)
    url = f"file://{tmp_path}/out"
    assert main(["import", str(tmp_path), url]) == 0
    assert [numbers for numbers, _ in job(2, loaded, tmp_path / "out")] == expected


def test_letters_that_stdout_has_not_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, printed = tmp_path / "stép", io.BytesIO()
    saved(folder, "random_states_RANK.pkl", accelerate)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(["import", str(folder), str(tmp_path / "out")]) == 0
    assert b"st\\xe9p: Accelerate, 2 ranks" in printed.getvalue()


def test_a_missing_rank_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, "rng_state_RANK.pth", transformers, ranks=4)
    (tmp_path / "rng_state_1.pth").unlink()
    with pytest.raises(RNGStateError, match=r"the states of rank 1 are missing.* 3 of 4 ranks"):
        read_records(tmp_path)


def test_the_last_rank_of_verl_is_missed_too(tmp_path: Path) -> None:
    saved(tmp_path, "extra_state_world_size_4_rank_RANK.pt", verl, ranks=3)
    with pytest.raises(RNGStateError, match="the states of rank 3 are missing"):
        read_records(tmp_path)


def test_ranks_of_different_jobs_are_an_error(tmp_path: Path) -> None:
    saved(tmp_path, "rng_state_RANK.pth", transformers)
    cuda = torch.zeros(16, dtype=torch.uint8)
    torch.save({**transformers(), "cuda": cuda}, tmp_path / "rng_state_1.pth")
    with pytest.raises(RNGStateError, match=r"rank 1 has states of .*'cuda': 16"):
        read_records(tmp_path)


class RunsACommand:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {Marker.path}",)


class Marker:
    path = ""


def test_code_in_a_file_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    Marker.path = str(tmp_path / "was-run")
    saved(tmp_path, "rng_state_RANK.pth", transformers)
    torch.save({**transformers(), "extra": RunsACommand()}, tmp_path / "rng_state_1.pth")
    with pytest.raises(RNGStateError, match=r"rng_state_1\.pth: refused: it names posix\.system"):
        read_records(tmp_path)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"junk" * 999,
        # zipfile then seeks to a place before the file: "Invalid argument" was all that was said.
        lambda content: content[:40] + content[60:],
    ],
)
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    saved(tmp_path, "rng_state_RANK.pth", transformers)
    file = tmp_path / "rng_state_0.pth"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RNGStateError, match=r"rng_state_0\.pth: damaged, or not written by torch"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([1], "found a list, expected a dict of states"),
        ({**transformers(), "python": (3, (), None)}, "python: the state is malformed"),
        ({"cpu": 1}, r"it has no state of python, numpy, torch, but \['cpu'\]"),
        ({**transformers(), "random": random.getstate()}, "random is not its only state of python"),
    ],
)
def test_another_content_is_named(state: Any, reason: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "rng_state.pth")
    with unmoved(), pytest.raises(RNGStateError, match=rf"rng_state\.pth: {reason}"):
        read_records(tmp_path)


def by_rank() -> dict[str, Any]:
    return {"rng": {f"rank_{dist.get_rank()}": composer()}}


def as_composer() -> dict[str, Any]:
    """As mosaicml 0.32.1 hands it to dcp.save: rank 0 stores the list of all ranks' states."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, composer())
    return {"rng": states} if dist.get_rank() == 0 else {}


def flat() -> dict[str, Any]:
    rank = dist.get_rank()
    return {
        f"random_state_{rank}": random.getstate(),
        f"numpy_random_state_{rank}": np.random.get_state(),
        f"torch_rng_state_{rank}": torch.get_rng_state(),
    }


def saved_keys(path: Path, capture: Callable[[], dict[str, Any]]) -> Numbers:
    """Write a DCP checkpoint with a rank's state under keys of its own; return what it draws."""
    StatefulRNG(42, ranked=True)
    draw(dist.get_rank() + 1)
    weights = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (dist.get_world_size(),)))
    dcp.save({**capture(), "weights": weights}, checkpoint_id=path)
    return draw()


@pytest.mark.parametrize(
    ("capture", "framework", "place"),
    [
        (by_rank, "rank-named keys", "rng.rank_1"),
        (as_composer, "rank-named keys", "rng.1"),
        (flat, "rank-named keys", "numpy_random_state_1"),
    ],
)
def test_rank_named_keys(
    capture: Callable[[], Any], framework: str, place: str, tmp_path: Path, capsys: Capture
) -> None:
    expected = job(2, saved_keys, tmp_path / "step-3" / "dcp", capture)
    with unmoved():
        arguments = ["import", str(tmp_path / "step-3"), str(tmp_path / "ours"), "--json"]
        assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["framework"], found["folder"]) == (framework, str(tmp_path / "step-3" / "dcp"))
    assert [row["file"] for row in found["rows"]][1] == place
    assert [numbers for numbers, _ in job(2, loaded, tmp_path / "ours")] == expected
    assert [numbers for numbers, _ in job(3, loaded, tmp_path / "ours")][:2] == expected


def test_a_list_of_devices_under_a_rank_named_key(tmp_path: Path) -> None:
    """DCP takes it apart: a key for each device."""
    drawn = [[5, 0], [0, 6], [7, 0]]
    devices = [[cuda(1, words) for words in of_rank] for of_rank in drawn]
    states = {f"rank{rank}": {**composer(), "cuda": devices[rank]} for rank in range(3)}
    dcp.save({"rng": states}, checkpoint_id=tmp_path)
    assert drawn_of(read_records(tmp_path)) == [5, 6, 7]


def no_key_of_rank_1() -> dict[str, Any]:
    return by_rank() if dist.get_rank() == 0 else {}


def the_same_keys() -> dict[str, Any]:
    return {"fsdp_checkpoint": {"rng": composer()}}


def as_megatron() -> dict[str, Any]:
    state = io.BytesIO()
    torch.save([automodel()], state)
    return {f"rng_state/shard_0.{dist.get_rank()}_1.2": state}


class Opaque:
    """Something that only its own code can make."""


def an_object() -> dict[str, Any]:
    return {f"rng.{dist.get_rank()}": {**composer(), "python": Opaque()}}


def words_alone() -> dict[str, Any]:
    """Whether a Gaussian was cached is not in it: a restored stream might not be the same."""
    _, words, _ = random.getstate()
    return {f"rng.{dist.get_rank()}.python": torch.tensor(words)}


def two_names() -> dict[str, Any]:
    states = {"python": random.getstate(), "random": random.getstate()}
    return {f"rng.{dist.get_rank()}": states}


def two_devices_0() -> dict[str, Any]:
    states = {"cuda.0": torch.zeros(16, dtype=torch.uint8), "cuda_state.0": random.getstate()}
    return {f"rng.{dist.get_rank()}.{name}": state for name, state in states.items()}


def a_device_beside() -> dict[str, Any]:
    state = torch.zeros(16, dtype=torch.uint8)
    return {f"rng.{dist.get_rank()}.{name}": state for name in ("cuda", "cuda.0", "torch")}


def a_device_before() -> dict[str, Any]:
    state = torch.zeros(16, dtype=torch.uint8)
    return {f"rng.{dist.get_rank()}.{name}": state for name in ("cuda.0", "cuda_all", "torch")}


def in_two_parts() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = distribute_tensor(torch.get_rng_state(), mesh, [Shard(0)])
    return {"rng.0.torch": state, "rng.1.torch": state}


def unknown_names() -> dict[str, Any]:
    return {f"rng.{dist.get_rank()}.state": torch.get_rng_state()}


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (no_key_of_rank_1, "the states of rank 1 are missing"),
        (the_same_keys, "one state for all ranks, though 2 or more wrote this checkpoint"),
        (as_megatron, r"found rng_state/shard_0\.0_1\.2: Megatron's, one state for each pipeline"),
        (an_object, r"rng\.0\.python: refused: it names tests\.command\.test_import\.Opaque"),
        (words_alone, r"rng\.0: python: .* expected \(3, \(\.\.\.\), gauss_next\)"),
        (two_names, r"rng\.0\.random is not rank 0's only state of python"),
        (two_devices_0, r"rng\.0: cuda: the state is malformed: expected a uint8 tensor"),
        (a_device_beside, r"rng\.0\.cuda\.0 is not rank 0's only state of cuda"),
        (a_device_before, r"rng\.0\.cuda_all is not rank 0's only state of cuda"),
        (in_two_parts, r"rng\.0\.torch is in 2 parts, expected one"),
        (unknown_names, r"rng\.0\.state does not say whether it is python, numpy, torch or cuda"),
    ],
)
def test_keys_that_cannot_be_read_are_named(
    capture: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    job(2, saved_keys, tmp_path, capture)
    with unmoved(), pytest.raises(RNGStateError, match=reason):
        read_records(tmp_path)


def test_a_truncated_key_is_named(tmp_path: Path) -> None:
    dcp.save({"rng": {"0": composer()}}, checkpoint_id=tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(RNGStateError, match=r"rng\.0\.numpy: __0_0\.distcp is truncated"):
        read_records(tmp_path)


def test_without_such_files_the_error_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(RNGStateError, match=r"no RNG files .*random_states_0\.pkl \(Accelerate\)"):
        read_records(tmp_path)


def test_of_several_frameworks_one_must_be_named(tmp_path: Path) -> None:
    saved(tmp_path / "a", "rng_state_RANK.pth", transformers)
    saved(tmp_path / "b", "random_states_RANK.pkl", accelerate)
    with pytest.raises(
        RNGStateError, match=r"2 checkpoints.*/a/\S+ \(Transformers\), .*/b/\S+ \(Acc"
    ):
        read_records(tmp_path)
    assert len(read_records(tmp_path / "b")) == 2


def test_json_names_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, "rng_state_RANK.pth", transformers)
    arguments = ["import", str(tmp_path), str(tmp_path / "rng"), "--json", "--rows", "1"]
    with unmoved():
        assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["framework"] == "Transformers"
    [row] = found["rows"]
    assert (row["row"], row["file"]) == (1, "rng_state_1.pth")
    assert row["fingerprints"].keys() == {"python", "numpy", "torch"}


def test_inspect_says_whose_megatrons_shards_are(tmp_path: Path, capsys: Capture) -> None:
    """Their numbers are coordinates: it said that ranks have no state, and that import reads it."""
    job(2, saved_keys, tmp_path, as_megatron)
    main(["inspect", str(tmp_path)])
    text = " ".join(capsys.readouterr().out.split())
    assert "note: found rng_state/shard_0.0_1.2: Megatron's, one state for each pipeline" in text
    assert "import` does not read it" in text
    assert "lost" not in text


def test_inspect_says_that_import_reads_rank_named_keys(tmp_path: Path, capsys: Capture) -> None:
    job(2, saved_keys, tmp_path, by_rank)
    main(["inspect", str(tmp_path)])
    assert "`nemo-rng-dcp import` reads such keys" in " ".join(capsys.readouterr().out.split())
