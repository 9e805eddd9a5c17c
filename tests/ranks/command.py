"""Jobs that write the checkpoints which the command is then asked about."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from ranks import worlds
from ranks.harness import gather
from scripts.demo.rankless import RanklessRNG
from streams import draw, unmoved


def write(file: Path, streams: list[dict[str, str]]) -> None:
    """Keep what the streams of all rows were, every rank having been told the same."""
    assert all(told == streams for told in gather(streams))
    if dist.get_rank() == 0:
        file.write_text(json.dumps(streams))


def check_1_rank_saves(path: Path) -> None:
    def save() -> None:
        rng = StatefulRNG(42, ranked=True)
        draw(2)
        dcp.save({"rng": rng}, checkpoint_id=path)

    worlds.job(1, path, save)


def check_4_ranks_save(path: Path) -> None:
    def save() -> None:
        rng = StatefulRNG(42, ranked=True)
        draw(dist.get_rank() + 1)
        state = {"trainer": {"app": {"rng": rng.state_dict()}}, "weight": torch.ones(3)}
        dcp.save(state, checkpoint_id=path)
        with unmoved():
            streams = rng.fingerprint(gather=True)
        assert streams[dist.get_rank()] == rng.fingerprint()
        assert len({digits for its in streams for digits in its.values()}) == 12
        write(path / "streams.json", streams)

    worlds.job(4, path, save)


def check_4_ranks_that_are_not_ranked_save(path: Path) -> None:
    def save() -> None:
        rng = StatefulRNG(42)
        draw()
        dcp.save({"rng": rng}, checkpoint_id=path)

    worlds.job(4, path, save)


def check_others_save(path: Path) -> None:
    def save() -> None:
        rng = RanklessRNG(42, ranked=True)
        dcp.save({"rng": rng}, checkpoint_id=path / "rank-less")
        own = {f"rng.rank{dist.get_rank()}": rng.state_dict()}
        dcp.save(own, checkpoint_id=path / "rank-named")
        dcp.save({"weight": torch.ones(3)}, checkpoint_id=path / "none")

    worlds.job(4, path, save)


def check_2_and_6_ranks_resume(path: Path) -> None:
    def resume() -> None:
        nested = {"trainer": {"app": {"rng": StatefulRNG(7, ranked=True)}}}
        rng = nested["trainer"]["app"]["rng"]
        state = {"trainer": {"app": {"rng": rng.state_dict()}}}
        planner = RNGLoadPlanner(keys=("trainer.app.rng",))
        saved = path.with_name("4_ranks_save")
        dcp.load(state, checkpoint_id=saved, planner=planner)
        rng.load_state_dict(state["trainer"]["app"]["rng"])
        write(path.with_name(f"resumed-{dist.get_world_size()}.json"), rng.fingerprint(gather=True))

    for size in (2, 6):
        worlds.job(size, path.with_name(f"resume-{size}"), resume)


def check_another_mesh_resumes(path: Path) -> None:
    """The ranks of one tp group share a row, and all rows come back to every rank."""

    def resume() -> None:
        mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
        rng = StatefulRNG(7, mesh=mesh["dp"])
        saved = path.with_name("4_ranks_that_are_not_ranked_save")
        dcp.load({"rng": rng}, checkpoint_id=saved, planner=RNGLoadPlanner())
        with unmoved():
            streams = rng.fingerprint(gather=True)
        assert len(streams) == 3
        write(path.with_name("resumed-mesh.json"), streams)

    worlds.job(6, path, resume)


if __name__ == "__main__":
    worlds.run(dict(globals()))
