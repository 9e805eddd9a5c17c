"""Train a small GPT with FSDP2 on any number of processes, with the same losses, bit for bit.

    torchrun --standalone --nproc-per-node 4 scripts/recipes/train_elastic.py --out runs/elastic

Start it again with the same ``--out`` on 8, 4, 2 or 1 processes, and it goes on from the newest
complete checkpoint with the losses and weights that it would have had on any other number of them.
Each process plays an equal share of the ``--logical-ranks``, one micro-batch each.

Promised for the same machine type, software, threads, ``--logical-ranks`` and ``--batch``, on the
CPU with gloo. Not for fused optimizers, SyncBatchNorm, or another tensor-parallel size. It costs
memory for up to log2(k) gradients of the whole model, with k logical ranks a process.

The output folder gets ``checkpoints/``; ``losses-rank<r>.txt`` for each logical rank, a line for
each step with the loss as ``float.hex()``; ``states-rank<r>.txt`` with a hash of all weights and
optimizer states, if asked for; and ``run.json``: what the results of the latest start depend on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sysconfig
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from nemo_rng_dcp import ScopedRNG, StatefulRNG
from nemo_rng_dcp.determinism import environment, set_deterministic
from reduction import reduce_in_order  # two files beside this one: copy all three
from shards import clip_grad_norm_, states_hash

VOCABULARY = 256  # one token per byte
TEXT_BYTES = 2_000_000
LOWER_CASE_PROBABILITY = 0.3


@dataclass(frozen=True)
class Config:
    """What the command line sets: ``--save-every 5`` for ``save_every``."""

    out: Path = Path("runs", "elastic")
    steps: int = 40
    save_every: int = 10
    hash_every: int = 0  # steps; 0: no hash of weights and optimizer states
    keep: int = 2  # checkpoints
    seed: int = 42
    logical_ranks: int = 8
    batch: int = 4  # sequences per logical rank and step
    length: int = 64  # bytes per sequence
    width: int = 64
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1
    learning_rate: float = 3e-3
    max_norm: float = 1.0
    threads: int = 1  # per process: another number is another order of additions
    reduction: str = "ordered"  # or "fsdp2": its own, whose sums depend on the processes


class GPT(nn.Module):
    """Next-byte prediction: int64 tokens ``(batch, length + 1)`` to the mean loss, a scalar."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(config.length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, 4 * width, config.dropout, batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        length = inputs.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.tokens(inputs) + self.positions.weight[:length]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


@dataclass
class AppState:
    """Model, optimizer and step as one entry of the checkpoint."""

    model: GPT
    optimizer: torch.optim.Optimizer
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **states)
        self.step = int(state["step"])


def validate_and_prepare_config(arguments: list[str] | None = None) -> Config:
    """Parse the command line; exit with one line that says what cannot work."""
    parser = argparse.ArgumentParser(description="Train a small GPT on any number of ranks.")
    for field in fields(Config):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    config = Config(**vars(parser.parse_args(arguments)))
    problems = []
    for name, value in asdict(config).items():
        if isinstance(value, int) and value < 1 and name not in ("seed", "hash_every"):
            problems.append(f"--{name.replace('_', '-')} is {value}, expected >= 1")
    if config.reduction not in ("ordered", "fsdp2"):
        problems.append(f"--reduction is {config.reduction}, expected ordered or fsdp2")
    if not problems and config.width % config.heads:
        problems.append(f"--width is {config.width}, expected a multiple of --heads {config.heads}")
    if not 0 <= config.dropout < 1:
        problems.append(f"--dropout is {config.dropout}, expected 0 <= dropout < 1")
    for checkpoint in [] if problems else complete_checkpoints(config.out)[-1:]:
        saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        for name, weight in GPT(config).state_dict().items():
            if (found := getattr(saved.get(f"app.model.{name}"), "size", None)) != weight.shape:
                problems.append(f"{checkpoint} has {name} of {found}, and the model {weight.shape}")
    if problems:
        parser.exit(2, f"{parser.prog}: {problems[0]}\n")
    return config


def setup_distributed() -> DeviceMesh:
    """Create the process group and a one-dimensional device mesh."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("dp",))


def setup_model_and_optimizer(config: Config, mesh: DeviceMesh, rng: StatefulRNG) -> AppState:
    """Build the sharded model and its optimizer."""
    with ScopedRNG(config.seed):  # the same first weights on every process
        model = GPT(config)
    model.to(mesh.device_type)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if config.reduction == "ordered":
        reduce_in_order(model, mesh, rng)
    # Not fused=True: its kernel treats the ends of a shard differently from the rest.
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, foreach=True)
    return AppState(model, optimizer)


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


def read_text() -> bytes:
    """Return the first bytes of the standard library's sources, in the order of their names."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return b"".join(path.read_bytes() for path in sources)[:TEXT_BYTES]


def draw_batch(text: bytes, config: Config, device: str) -> torch.Tensor:
    """Draw random crops (NumPy), some of them in lower case (Python): ``(batch, length + 1)``."""
    crops = []
    for start in np.random.randint(0, len(text) - config.length, size=config.batch):
        crop = text[start : start + config.length + 1]
        if random.random() < LOWER_CASE_PROBABILITY:
            crop = crop.lower()
        crops.append(np.frombuffer(crop, dtype=np.uint8).astype(np.int64))
    return torch.from_numpy(np.stack(crops)).to(device)


def note(out: Path, kind: str, rank: int, step: int, text: str) -> None:
    with (out / f"{kind}-rank{rank}.txt").open("a") as file:
        file.write(f"{step} {text}\n")


def train(config: Config, mesh: DeviceMesh, app: AppState, rng: StatefulRNG) -> None:
    """Go on from the newest checkpoint, if there is one, to the last step."""
    model, optimizer, text = app.model, app.optimizer, read_text()
    state = {"app": app, "rng": rng}
    for newest in complete_checkpoints(config.out)[-1:]:
        dcp.load(state, checkpoint_id=newest)  # on any number of processes, without a planner
    # FSDP2's own reduction averages over the processes.
    parts = config.logical_ranks if config.reduction == "ordered" else len(rng.ranks)
    for step in tqdm(range(app.step, config.steps), unit="step", disable=rng.rank != 0):
        for rank in rng.ranks:
            with rng.as_rank(rank):  # data, dropout and recomputation are this logical rank's
                loss = model(draw_batch(text, config, mesh.device_type))
                (loss / parts).backward()
            note(config.out, "losses", rank, step, loss.item().hex())
        clip_grad_norm_(model.parameters(), config.max_norm, mesh)
        optimizer.step()
        optimizer.zero_grad()
        app.step = step + 1
        if config.hash_every and app.step % config.hash_every == 0:
            note(config.out, "states", rng.rank, step, states_hash(model, optimizer))
        if app.step % config.save_every == 0:
            save_checkpoint(config.out, config.keep, state, app.step)


def main() -> None:
    config = validate_and_prepare_config()
    # torchrun sets OMP_NUM_THREADS=1 for several processes, but not for one.
    torch.set_num_threads(config.threads)
    set_deterministic()  # before CUDA starts: cuBLAS reads its variable only once
    mesh = setup_distributed()
    rng = StatefulRNG(config.seed, ranked=True, logical_ranks=config.logical_ranks)
    config.out.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        run = {**asdict(config), "ranks": dist.get_world_size(), "environment": environment()}
        (config.out / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
    train(config, mesh, setup_model_and_optimizer(config, mesh, rng), rng)
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads abort an interpreter that shuts down before they have ended


if __name__ == "__main__":
    main()
