"""Train with HSDP and tensor parallelism on a mesh of (replicate, shard, tp).

    torchrun --standalone --nproc-per-node 8 scripts/recipes/train_hsdp_tp.py \\
        --replicate 2 --tp 2 --out runs/hsdp_tp

Start it again with the same ``--out``, also with another ``--replicate``, ``--tp`` or number of
ranks, and it goes on from the newest complete checkpoint. Two kinds of dropout need two kinds of
streams:

- Tensor-parallel peers hold copies of the residual stream. Dropout there must hit the same elements
  on all of them, so they share the global streams: one row for each (replicate, shard).
- Between the column-wise and the row-wise layer each peer has features of its own. Dropout there
  draws from a generator that differs on every rank: a second entry of the checkpoint.

Runs on CPU with gloo; on GPUs untested. The output folder gets ``checkpoints/``, ``run.json``, and
``losses-rank<r>.txt`` with a line for each step: the loss as ``float.hex()``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tqdm import tqdm

from nemo_rng_dcp import RNGLoadPlanner, ScopedRNG, StatefulRNG, derive_seed
from nemo_rng_dcp.determinism import environment, set_deterministic

FLIP_PROBABILITY = 0.3


@dataclass(frozen=True)
class Config:
    """What the command line sets: ``--save-every 5`` for ``save_every``."""

    out: Path = Path("runs", "hsdp_tp")
    replicate: int = 1  # copies of the sharded model
    tp: int = 1  # ranks that split a layer
    steps: int = 20
    save_every: int = 5
    keep: int = 2  # checkpoints
    seed: int = 42
    batch: int = 8  # samples per data-parallel rank and step
    width: int = 32
    layers: int = 2
    dropout: float = 0.1
    learning_rate: float = 3e-3


class Training(NamedTuple):
    model: MLP
    optimizer: torch.optim.Optimizer
    dropout: torch.Generator  # for sharded activations


class Block(nn.Module):
    """A residual feed-forward block whose hidden features are split among tp ranks."""

    def __init__(self, config: Config, generator: torch.Generator | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.keep = 1 - config.dropout
        self.generator = generator
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(
            self.up(self.norm(x))
        )  # sharded: each tp rank has features of its own
        hidden = hidden * torch.empty_like(hidden).bernoulli_(self.keep, generator=self.generator)
        return x + self.dropout(self.down(hidden / self.keep))  # replicated: alike on tp peers


class MLP(nn.Module):
    """Blocks between features ``(batch, width)`` and their mean squared error, a scalar."""

    def __init__(self, config: Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, generator) for _ in range(config.layers))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.mse_loss(x, target)


@dataclass
class AppState:
    """Model, optimizer and step as one entry of the checkpoint."""

    training: Training
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self.training[:2])
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(*self.training[:2], model_state_dict=model, optim_state_dict=optimizer)
        self.step = int(state["step"])


def validate_and_prepare_config(arguments: list[str] | None = None) -> Config:
    """Parse the command line; exit with one line that says what cannot work."""
    parser = argparse.ArgumentParser(description="Train with HSDP and tensor parallelism.")
    for field in fields(Config):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    config = Config(**vars(parser.parse_args(arguments)))
    problems = []
    for name, value in asdict(config).items():
        if isinstance(value, int) and value < 1 and name != "seed":
            problems.append(f"--{name.replace('_', '-')} is {value}, expected >= 1")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if not problems and ranks % (config.replicate * config.tp):
        shape = f"--replicate {config.replicate} x --tp {config.tp}"
        problems.append(f"the job has {ranks} ranks, expected a multiple of {shape}")
    if not problems and 4 * config.width % config.tp:
        problems.append(f"--tp is {config.tp}, expected a divisor of 4 x --width {config.width}")
    if not 0 <= config.dropout < 1:
        problems.append(f"--dropout is {config.dropout}, expected 0 <= dropout < 1")
    for checkpoint in [] if problems else complete_checkpoints(config.out)[-1:]:
        saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        for name, weight in MLP(config).state_dict().items():
            if (found := getattr(saved.get(f"app.model.{name}"), "size", None)) != weight.shape:
                problems.append(f"{checkpoint} has {name} of {found}, and the model {weight.shape}")
    if problems:
        parser.exit(2, f"{parser.prog}: {problems[0]}\n")
    return config


def setup_distributed(config: Config) -> DeviceMesh:
    """Create the process group and the mesh; what --replicate and --tp leave is sharded over."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    shard = dist.get_world_size() // (config.replicate * config.tp)
    shape, names = (config.replicate, shard, config.tp), ("replicate", "shard", "tp")
    return init_device_mesh(device, shape, mesh_dim_names=names)


def setup_model_and_optimizer(config: Config, mesh: DeviceMesh) -> Training:
    """Build the model, split over tp ranks, then sharded and replicated; and its optimizer."""
    generator = torch.Generator(mesh.device_type)
    generator.manual_seed(derive_seed(config.seed, "sharded dropout", dist.get_rank()))
    with ScopedRNG(config.seed):  # the same weights on all ranks
        model = MLP(config, generator).to(mesh.device_type)
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["replicate", "shard"])
    fully_shard(model, mesh=mesh["replicate", "shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    return Training(model, optimizer, generator)


def complete_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints that can be loaded, oldest first."""
    # DCP writes .metadata last: it publishes a checkpoint, also where a folder cannot be renamed.
    return sorted(metadata.parent for metadata in out.glob("checkpoints/step-*/.metadata"))


def save_checkpoint(out: Path, keep: int, state: dict[str, Any], step: int) -> None:
    """Write a checkpoint, then remove all but the newest ``keep``. Every rank must call it."""
    path = out / "checkpoints" / f"step-{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)  # what a killed save left there
    dist.barrier()
    dcp.save(state, checkpoint_id=path)
    if dist.get_rank() == 0:
        for old in set(path.parent.glob("step-*")) - set(complete_checkpoints(out)[-keep:]):
            shutil.rmtree(old)


def draw_batch(config: Config, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw features (NumPy), all negated at times (Python), and what to make of them."""
    x = np.random.standard_normal((config.batch, config.width)).astype(np.float32)
    features = torch.from_numpy(-x if random.random() < FLIP_PROBABILITY else x).to(device)
    return features, features.roll(1, dims=1).sin()


def train(config: Config, mesh: DeviceMesh, training: Training) -> None:
    """Go on from the newest checkpoint, if there is one, to the last step."""
    model, optimizer, generator = training
    everywhere = StatefulRNG(
        config.seed,
        mesh=mesh,
        generators={"sharded_dropout": generator},
        global_generators=False,
    )
    rng = StatefulRNG(config.seed, ranked=True, mesh=mesh["replicate", "shard"])
    app = AppState(training)
    state = {"app": app, "dropout_rng": everywhere, "rng": rng}
    for newest in complete_checkpoints(config.out)[-1:]:
        dcp.load(state, checkpoint_id=newest, planner=RNGLoadPlanner())
    rank = dist.get_rank()
    bar = tqdm(total=config.steps, initial=app.step, unit="step", disable=rank != 0)
    with (config.out / f"losses-rank{rank}.txt").open("a", buffering=1) as losses:
        for step in range(app.step, config.steps):
            loss = model(*draw_batch(config, mesh.device_type))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.write(f"{step} {loss.item().hex()}\n")
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            app.step = step + 1
            if app.step % config.save_every == 0:
                rng.verify_shared()  # a checkpoint has one row for all tp peers
                save_checkpoint(config.out, config.keep, state, app.step)


def main() -> None:
    config = validate_and_prepare_config()
    set_deterministic()  # before CUDA starts: cuBLAS reads its variable only once
    mesh = setup_distributed(config)
    config.out.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        run = {**asdict(config), "ranks": dist.get_world_size(), "environment": environment()}
        (config.out / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
    training = setup_model_and_optimizer(config, mesh)
    train(config, mesh, training)
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads abort an interpreter that shuts down before they have ended


if __name__ == "__main__":
    main()
