"""Train a small GPT with FSDP2, be killed, resume bit for bit.

    torchrun --standalone --nproc-per-node 4 --max-restarts 1 scripts/train_fsdp2.py \
        --out runs/gpt --steps 40 --save-every 10 --die-at-step 25 --die-rank 2

Runs on CPU with gloo and on GPUs where there are some. The text is the Python standard library's
own source code. Each rank appends its losses to ``losses-rank<r>.txt`` in the output folder, one
line per step: the step and the loss as ``float.hex()``. With per-rank streams it also appends their
fingerprints to ``streams-rank<r>.jsonl`` whenever they are saved or restored. Rank 0 writes seed,
configuration and environment of the latest start to ``run.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from checkpoints import CheckpointFolder
from gpt import GPT
from leaving import leave_group
from nemo_rng_dcp import RNGLoadPlanner, ScopedRNG, StatefulRNG
from nemo_rng_dcp.determinism import environment, set_deterministic
from rankless import RanklessRNG

TEXT_BYTES = 2_000_000
LOWER_CASE_PROBABILITY = 0.3


@dataclass(frozen=True)
class Config:
    out: Path
    steps: int
    save_every: int
    keep: int
    seed: int
    rng: str
    deterministic: bool
    die_at_step: int | None
    die_rank: int
    batch: int
    length: int
    width: int
    heads: int
    layers: int
    dropout: float
    learning_rate: float


class Distributed(NamedTuple):
    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh


class Training(NamedTuple):
    model: GPT
    optimizer: torch.optim.Optimizer


class AppState:
    """Model, optimizer and step as one entry of the checkpoint."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self.training)
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            *self.training,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.step = int(state_dict["step"])


def validate_and_prepare_config(arguments: list[str] | None = None) -> Config:
    """Parse the command line, refuse what cannot work, create the output folder."""
    parser = argparse.ArgumentParser(description="Train a small GPT with FSDP2.")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints to keep")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--rng",
        choices=("per-rank", "rank-less"),
        default="per-rank",
        help="what goes into the checkpoint: StatefulRNG, or the common mistake",
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="deterministic algorithms only; may be slower"
    )
    parser.add_argument("--die-at-step", type=int, help="SIGKILL a rank when it first gets here")
    parser.add_argument("--die-rank", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step")
    parser.add_argument("--length", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    config = Config(**vars(parser.parse_args(arguments)))

    for name in ("steps", "save_every", "keep", "batch", "length", "width", "heads", "layers"):
        if getattr(config, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(config, name)}, expected >= 1")
    if config.width % config.heads:
        parser.error(f"--width {config.width} is no multiple of --heads {config.heads}")
    if not 0 <= config.dropout < 1:
        parser.error(f"--dropout is {config.dropout}, expected 0 <= dropout < 1")
    config.out.mkdir(parents=True, exist_ok=True)
    return config


def setup_distributed() -> Distributed:
    """Create the process group and a one-dimensional device mesh."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    return Distributed(dist.get_rank(), dist.get_world_size(), device, mesh)


def write_run_json(config: Config, distributed: Distributed) -> None:
    """Write down what the results depend on, beside them. Rank 0 calls it."""
    run = {
        "seed": config.seed,
        "world_size": distributed.world_size,
        "config": asdict(config),
        "environment": environment(),
    }
    (config.out / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")


def setup_model_and_optimizer(config: Config, distributed: Distributed) -> Training:
    """Build the sharded model and its optimizer."""
    # FSDP2 keeps each rank's part of the rank's own parameters, so every rank must start from the
    # same ones: one seed for all, in a scope that leaves the ranks' streams alone.
    with ScopedRNG(config.seed):
        model = GPT(config.length, config.width, config.heads, config.layers, config.dropout)
    model.to(distributed.device)
    for block in model.blocks:
        fully_shard(block, mesh=distributed.mesh)
    fully_shard(model, mesh=distributed.mesh)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=config.learning_rate))


def read_text() -> bytes:
    """Return the first bytes of the standard library's sources, in the order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= TEXT_BYTES:
            break
    return bytes(text[:TEXT_BYTES])


def draw_batch(text: bytes, config: Config, device: torch.device) -> torch.Tensor:
    """Draw random crops (NumPy), some of them in lower case (Python): ``(batch, length + 1)``."""
    crops = []
    for start in np.random.randint(0, len(text) - config.length, size=config.batch):
        crop = text[start : start + config.length + 1]
        if random.random() < LOWER_CASE_PROBABILITY:
            crop = crop.lower()
        crops.append(np.frombuffer(crop, dtype=np.uint8).astype(np.int64))
    return torch.from_numpy(np.stack(crops)).to(device)


def die_once(config: Config, rank: int, step: int) -> None:
    """Kill this process without warning, but only in the first run that gets here."""
    marker = config.out / "died"
    if step == config.die_at_step and rank == config.die_rank and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def note_streams(
    config: Config, rank: int, rng: StatefulRNG | RanklessRNG, event: str, step: int
) -> None:
    """Append the fingerprints of this rank's streams to its file."""
    if isinstance(rng, StatefulRNG):
        note = {"event": event, "step": step, "streams": rng.fingerprint()}
        with (config.out / f"streams-rank{rank}.jsonl").open("a") as notes:
            notes.write(json.dumps(note) + "\n")


def show_progress(config: Config, step: int, loss: float, started: float, first: int) -> None:
    """Print one line for the step: overwritten on a terminal, every tenth one elsewhere."""
    terminal = sys.stdout.isatty()
    if not terminal and (step + 1) % 10 and step + 1 != config.steps:
        return
    pace = (time.monotonic() - started) / (step + 1 - first)
    left = pace * (config.steps - step - 1)
    end = "\r" if terminal and step + 1 != config.steps else "\n"
    line = f"step {step + 1}/{config.steps}  loss {loss:.4f}  {pace:.2f} s/step  {left:.0f} s left"
    print(line, end=end, flush=True)


def main() -> None:
    config = validate_and_prepare_config()
    # Before the process group, which initialises CUDA: cuBLAS reads its variable only once.
    set_deterministic(config.deterministic)
    distributed = setup_distributed()
    if distributed.rank == 0:
        write_run_json(config, distributed)
    training = setup_model_and_optimizer(config, distributed)
    rng: StatefulRNG | RanklessRNG
    if config.rng == "per-rank":
        rng, planner = StatefulRNG(config.seed, ranked=True), RNGLoadPlanner()
    else:
        rng, planner = RanklessRNG(config.seed, ranked=True), None
    app = AppState(training)
    state = {"app": app, "rng": rng}

    checkpoints = CheckpointFolder(config.out / "checkpoints", config.keep)
    newest = checkpoints.newest()
    if newest is not None:
        dcp.load(state, checkpoint_id=newest, planner=planner)
        note_streams(config, distributed.rank, rng, "restored", app.step)
        if distributed.rank == 0:
            print(f"resumed from {newest.name}", flush=True)

    text = read_text()
    # After everything that could draw between the load and the first step: an entry loaded after
    # "rng", a warm-up, or in a job with a DataLoader the fresh iterator of the interrupted epoch
    # and the batches it skips (README, "In the middle of an epoch"). Each would move the streams.
    if newest is not None and isinstance(rng, StatefulRNG):
        rng.rewind()
    first, started = app.step, time.monotonic()
    with (config.out / f"losses-rank{distributed.rank}.txt").open("a", buffering=1) as losses:
        for step in range(first, config.steps):
            die_once(config, distributed.rank, step)
            loss = training.model(draw_batch(text, config, distributed.device))
            loss.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
            losses.write(f"{step} {loss.item().hex()}\n")
            if distributed.rank == 0:
                show_progress(config, step, loss.item(), started, first)
            app.step = step + 1
            if app.step % config.save_every == 0:
                checkpoints.save(state, app.step)
                note_streams(config, distributed.rank, rng, "saved", app.step)
    leave_group()


if __name__ == "__main__":
    main()
