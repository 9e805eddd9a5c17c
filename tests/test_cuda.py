"""What only a GPU can show; skipped without one."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_rng_dcp import RNGStateError, ScopedRNG, StatefulRNG, init_all_rng, seed_worker
from nemo_rng_dcp.determinism import CUBLAS_VARIABLE, _Process, environment, set_deterministic
from nemo_rng_dcp.snapshot import _get_rng_state, _restore_rng_state
from streams import draw, unmoved

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def draw_on_gpu() -> list[float]:
    return torch.randn(4, device="cuda").tolist()


def test_the_seed_reaches_the_gpu() -> None:
    init_all_rng(5)
    generator = torch.Generator("cuda").manual_seed(5)
    assert draw_on_gpu() == torch.randn(4, device="cuda", generator=generator).tolist()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    rng = StatefulRNG(1, ranked=True)
    draw_on_gpu()
    with unmoved():
        dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = draw_on_gpu(), draw()
    dcp.load({"rng": rng}, checkpoint_id=tmp_path)
    assert (draw_on_gpu(), draw()) == expected


def test_a_scope_covers_the_gpu() -> None:
    init_all_rng(7)
    expected = draw_on_gpu()
    with unmoved(), ScopedRNG(7):
        assert draw_on_gpu() == expected


def test_the_table_is_small_and_on_the_cpu() -> None:
    table = StatefulRNG(1).state_dict()["cuda"]
    assert table.shape == (1, 3)
    assert table.device.type == "cpu"


def test_a_state_that_the_gpu_refuses_is_named_and_nothing_moves() -> None:
    rng = StatefulRNG(1)
    state = _get_rng_state()
    state.cuda_rng_state = [torch.zeros(7, dtype=torch.uint8)]
    with unmoved(), pytest.raises(RNGStateError, match=r"^cuda: "):
        rng.load_state_dict(state)


def test_rng_state_holds_the_current_device_alone_and_takes_all() -> None:
    init_all_rng(3)
    state = _get_rng_state()
    assert len(state.cuda_rng_state) == 1
    expected = draw_on_gpu()
    _restore_rng_state(state)
    assert draw_on_gpu() == expected
    state.cuda_rng_state = torch.cuda.get_rng_state_all()
    expected = draw_on_gpu()
    _restore_rng_state(state)
    assert draw_on_gpu() == expected


def test_a_forked_worker_has_no_gpu_stream_but_a_scope() -> None:
    """CUDA cannot be used in a forked child; a ScopedRNG there must not try to."""
    draw_on_gpu()
    loader = torch.utils.data.DataLoader(Scoped(), num_workers=1, multiprocessing_context="fork")
    assert len(list(loader)) == 2


class Scoped(torch.utils.data.Dataset[float]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> float:
        if index >= len(self):
            raise IndexError
        with ScopedRNG(index):
            return torch.rand(1).item()


def test_seed_worker_leaves_the_gpu_the_seed_that_torch_gave_it() -> None:
    torch.manual_seed(2**40 + 5)
    expected = draw_on_gpu()
    torch.manual_seed(2**40 + 5)
    seed_worker(0)
    assert draw_on_gpu() == expected


def test_the_environment_names_gpu_and_driver() -> None:
    accelerator = environment()["accelerator"]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    assert (accelerator["type"], accelerator["devices"]) == ("cuda", names)
    assert accelerator["runtime"] == torch.version.cuda
    assert re.match(r"\d+\.\d+", accelerator["driver"])


def test_deterministic_algorithms_on_a_gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_on_gpu()
    monkeypatch.setattr(_Process, "cublas_is_deterministic", False)
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="too late"):
        set_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    with set_deterministic():
        weights = torch.randn(64, 64, device="cuda")
        assert torch.equal(weights @ weights, weights @ weights)
