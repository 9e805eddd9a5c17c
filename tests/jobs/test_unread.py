"""Loads that read nothing on some ranks, and state dicts that are kept and saved again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from tests.support.jobs import job
from tests.support.streams import draw, warned

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Drawing:
    """An entry that draws while it is loaded, before "rng" is."""

    def state_dict(self) -> dict[str, Any]:
        return {"w": torch.zeros(4)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        draw()


def row_0_alone(path: Path) -> tuple[list[str], bool]:
    rng = StatefulRNG(1, ranked=True)
    if dist.get_rank() == 0:
        dcp.save({"app": Drawing(), "rng": rng}, checkpoint_id=path, no_dist=True)
    dist.barrier()
    texts = warned(lambda: dcp.load({"app": Drawing(), "rng": rng}, checkpoint_id=path))
    return texts, rng.loaded is None


def test_a_rank_whose_row_was_not_saved_says_so_though_the_app_drew(tmp_path: Path) -> None:
    first, (texts, is_none) = job(2, row_0_alone, tmp_path)
    assert first == ([], False)
    [text] = texts
    assert "rank 1: the load restored no random stream" in text
    assert is_none


def keep_and_save_again(path: Path, first: str, with_mesh: bool) -> list[Any]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("tp", "dp"))["dp"] if with_mesh else None
    rng = StatefulRNG(1, ranked=True, mesh=mesh)
    saved: dict[str, Any] = {"w": torch.ones(2)}
    dcp.save(saved | {"rng": rng} if first == "with" else saved, checkpoint_id=path / "first")
    kept = {"rng": rng.state_dict(), "w": torch.zeros(2)}
    expected = draw()
    dcp.load(kept, checkpoint_id=path / "first", planner=RNGLoadPlanner())
    texts = warned(lambda: rng.load_state_dict(kept["rng"]))
    dcp.save(kept, checkpoint_id=path / "again")
    found: list[Any] = [expected, len(texts)]
    for planner in (None, RNGLoadPlanner()):
        draw()
        dcp.load({"rng": rng, "w": torch.zeros(2)}, checkpoint_id=path / "again", planner=planner)
        found.append(draw())
    return found


@pytest.mark.parametrize("first", ["with", "without"])
@pytest.mark.parametrize("with_mesh", [False, True])
def test_a_kept_state_dict_saved_again_has_every_row(
    tmp_path: Path, first: str, with_mesh: bool
) -> None:
    for expected, warnings, *found in job(2, keep_and_save_again, tmp_path, first, with_mesh):
        assert found == [expected, expected]
        assert warnings == (first == "without")
