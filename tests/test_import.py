"""``nemo-rng-dcp import``: frameworks' RNG files, one for each rank, become a checkpoint."""

import json
import os
import random
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import job
from nemo_rng_dcp import RNGStateError, RNGStateWarning, StatefulRNG
from nemo_rng_dcp.cli.checkpoint import open_checkpoint
from nemo_rng_dcp.cli.main import main
from nemo_rng_dcp.cli.per_rank import read_records, save_records
from streams import draw, unmoved

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


def loaded(path: Path) -> tuple[Numbers, int]:
    rng = StatefulRNG(1, ranked=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RNGStateWarning)
        rng.load(path)
    return draw(), len(caught)


@pytest.mark.parametrize(
    ("name", "capture"),
    [
        ("rng/rng_global_rank_RANK.pt", automodel),
        ("rng/rng_dp_rank_RANK.pt", automodel),
        ("random_states_RANK.pkl", accelerate),
        ("rng_state_RANK.pth", transformers),
    ],
)
def test_every_rank_continues_and_more_fork(
    name: str, capture: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = saved(tmp_path / "theirs", name, capture)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().out
    assert all(Path(name).name.replace("RANK", str(rank)) in printed for rank in range(2))
    assert [numbers for numbers, _ in job(2, loaded, tmp_path / "ours")] == expected
    found = [numbers for numbers, _ in job(3, loaded, tmp_path / "ours")]
    assert found[:2] == expected
    assert found[2] not in expected


def test_one_process_of_transformers(tmp_path: Path) -> None:
    expected = saved(tmp_path, "rng_state.pth", transformers, ranks=1)
    files, records = read_records(tmp_path)
    assert files.names == {0: "rng_state.pth"}
    save_records(records, tmp_path / "rng")
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
    _, records = read_records(tmp_path)
    save_records(records, tmp_path / "rng")
    assert [numbers for numbers, _ in job(2, loaded, tmp_path / "rng")] == expected


def test_what_a_record_says_of_the_job(tmp_path: Path) -> None:
    saved(tmp_path, "random_states_RANK.pkl", accelerate, ranks=3)
    _, records = read_records(tmp_path)
    assert [(its.row, its.rows, its.world_size) for its in records] == [
        (0, 3, 3),
        (1, 3, 3),
        (2, 3, 3),
    ]
    assert {its.seed for its in records} == {42}
    assert {its.ranked for its in records} == {True}
    file = tmp_path / "random_states_1.pkl"
    assert records[1].taken_at == file.stat().st_mtime_ns


def test_ranks_that_are_alike_are_not_ranked(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(transformers(), tmp_path / f"rng_state_{rank}.pth")
    assert [its.ranked for its in read_records(tmp_path)[1]] == [False, False]


def test_of_several_devices_a_rank_has_its_own(tmp_path: Path) -> None:
    devices = [torch.full((16,), device, dtype=torch.uint8) for device in range(2)]
    for rank in range(4):
        torch.save({**transformers(), "cuda": devices}, tmp_path / f"rng_state_{rank}.pth")
    _, records = read_records(tmp_path)
    assert [its.streams["cuda"].state for its in records] == [bytes([d] * 16) for d in (0, 1, 0, 1)]
    assert records[0].streams["cuda"].kind == "torch.cuda"


def test_a_missing_rank_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, "rng_state_RANK.pth", transformers, ranks=4)
    (tmp_path / "rng_state_1.pth").unlink()
    with pytest.raises(RNGStateError, match="the files of rank 1 are missing"):
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


@pytest.mark.parametrize("content", [b"", b"junk" * 999])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    saved(tmp_path, "rng_state_RANK.pth", transformers)
    (tmp_path / "rng_state_0.pth").write_bytes(content)
    with pytest.raises(RNGStateError, match=r"rng_state_0\.pth: damaged, or not written by torch"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([1], "found a list, expected a dict of states"),
        ({"python": (3, (), None)}, "python: .* is malformed"),
        ({"cpu": 1}, "python: the RNGState has no random_rng_state"),
    ],
)
def test_another_content_is_named(state: Any, said: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "rng_state.pth")
    with unmoved(), pytest.raises(RNGStateError, match=rf"rng_state\.pth: {said}"):
        read_records(tmp_path)


def test_without_such_files_the_error_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(RNGStateError, match=r"no RNG files .*random_states_0\.pkl \(Accelerate\)"):
        read_records(tmp_path)


def test_of_several_frameworks_one_must_be_named(tmp_path: Path) -> None:
    saved(tmp_path / "a", "rng_state_RANK.pth", transformers)
    saved(tmp_path / "b", "random_states_RANK.pkl", accelerate)
    with pytest.raises(RNGStateError, match=r"several .*/a \(Transformers\), .*/b \(Accelerate\)"):
        read_records(tmp_path)
    assert len(read_records(tmp_path / "b")[1]) == 2


def test_json_names_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, "rng_state_RANK.pth", transformers)
    arguments = ["import", str(tmp_path), str(tmp_path / "rng"), "--json", "--rows", "1"]
    with unmoved():
        assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["framework"] == "Transformers"
    [row] = found["rows"]
    assert (row["row"], row["file"]) == (1, "rng_state_1.pth")
    assert row["streams"].keys() == {"python", "numpy", "torch"}


def test_inspect_names_such_files_where_no_checkpoint_is(tmp_path: Path) -> None:
    saved(tmp_path, "rng/rng_global_rank_RANK.pt", automodel)
    with pytest.raises(RNGStateError, match="/rng: RNG files of NeMo Automodel, `import` reads"):
        open_checkpoint(str(tmp_path))
