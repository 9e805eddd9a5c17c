"""Train with DDP and a DataLoader; a run killed in the middle of an epoch resumes bit for bit.

    torchrun --standalone --nproc-per-node 2 scripts/recipes/train_ddp.py --out runs/ddp

Start it again with the same ``--out``, on any number of ranks, and it goes on from the newest
checkpoint: behind the last batch, or on another number of ranks at the start of that epoch. Three
kinds of random numbers meet here, and the checkpoint has an entry for each:

- The order of the samples: ``DistributedSampler`` makes it from its seed and the epoch.
- Augmentation in DataLoader workers, which ``ResumableLoader`` seeds by epoch and rank.
- Dropout in this process: ``StatefulRNG`` stores its streams.

Tested on CPU with gloo and on one GPU with NCCL. The output folder gets ``checkpoints/``,
``run.json`` and, with a line for each step, ``losses-rank<r>.txt``.
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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from nemo_rng_dcp import ResumableLoader, RNGLoadPlanner, RNGStateError, ScopedRNG, StatefulRNG
from nemo_rng_dcp.determinism import environment, set_deterministic

VOCABULARY = 256  # one token per byte
HIDDEN_BYTES = 0.05


@dataclass(frozen=True)
class Config:
    """What the command line sets: ``--save-every 5`` for ``save_every``."""

    out: Path = Path("runs", "ddp")
    steps: int = 40
    save_every: int = 10
    keep: int = 2  # checkpoints
    seed: int = 42
    samples: int = 400  # in the data set
    batch: int = 8  # samples per rank and step
    workers: int = 2  # per rank; 0: the rank loads its data itself
    length: int = 16  # bytes per sample
    width: int = 64
    dropout: float = 0.1


class Training(NamedTuple):
    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer


def build_model(config: Config) -> nn.Module:
    """Return what tells a crop's last byte from those before: ``(batch, length)`` to logits."""
    return nn.Sequential(
        nn.Embedding(VOCABULARY, config.width),
        nn.Flatten(),
        nn.Linear(config.length * config.width, 4 * config.width),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(4 * config.width, VOCABULARY),
    )


@dataclass
class AppState:
    """Model, optimizer and the place in the training as one entry of the checkpoint."""

    training: Training
    step: int = 0
    epoch: int = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self.training)
        place = torch.tensor([self.step, self.epoch])
        return {"model": model, "optimizer": optimizer, "place": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(*self.training, model_state_dict=model, optim_state_dict=optimizer)
        self.step, self.epoch = state["place"].tolist()


class Crops(Dataset[torch.Tensor]):
    """Crops of the standard library's sources: ``(length + 1,)`` bytes as int64."""

    def __init__(self, samples: int, length: int) -> None:
        self.samples, self.length = samples, length
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        self.text = b"".join(path.read_bytes() for path in sources)[: (samples + 2) * length]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.length + random.randrange(self.length)
        crop = np.frombuffer(self.text, np.uint8, self.length + 1, start).astype(np.int64)
        crop[np.random.random(crop.shape) < HIDDEN_BYTES] = 0
        return torch.from_numpy(crop)


def validate_and_prepare_config(arguments: list[str] | None = None) -> Config:
    """Parse the command line; exit with one line that says what cannot work."""
    parser = argparse.ArgumentParser(description="Train with DDP and a DataLoader.")
    for field in fields(Config):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    config = Config(**vars(parser.parse_args(arguments)))
    problems = []
    for name, value in asdict(config).items():
        least = 0 if name in ("seed", "workers") else 1
        if isinstance(value, int) and value < least:
            problems.append(f"--{name.replace('_', '-')} is {value}, expected >= {least}")
    if not 0 <= config.dropout < 1:
        problems.append(f"--dropout is {config.dropout}, expected 0 <= dropout < 1")
    if config.samples < (least := config.batch * int(os.environ.get("WORLD_SIZE", 1))):
        problems.append(f"--samples is {config.samples}, expected >= {least}: a step of all ranks")
    for checkpoint in [] if problems else complete_checkpoints(config.out)[-1:]:
        saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        for name, weight in build_model(config).state_dict().items():
            if (found := getattr(saved.get(f"app.model.{name}"), "size", None)) != weight.shape:
                problems.append(f"{checkpoint} has {name} of {found}, and the model {weight.shape}")
    if problems:
        parser.exit(2, f"{parser.prog}: {problems[0]}\n")
    return config


def setup_distributed() -> str:
    """Create the process group; return this rank's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return device


def setup_model_and_optimizer(config: Config, device: str) -> Training:
    """Build the model and its optimizer."""
    with ScopedRNG(config.seed):  # leaves the ranks' streams alone
        model = build_model(config).to(device)
    parallel = DistributedDataParallel(model)
    return Training(parallel, torch.optim.AdamW(model.parameters(), lr=3e-3))


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


def setup_loader(config: Config, rng: StatefulRNG) -> ResumableLoader:
    """Return this rank's share of the data."""
    dataset = Crops(config.samples, config.length)
    sampler: DistributedSampler[int] = DistributedSampler(dataset, seed=config.seed, drop_last=True)
    loader = DataLoader(
        dataset, config.batch, sampler=sampler, drop_last=True, num_workers=config.workers
    )
    return ResumableLoader(loader, rng)


def load_newest(config: Config, state: dict[str, Any]) -> None:
    """Load the newest checkpoint, if there is one."""
    for checkpoint in complete_checkpoints(config.out)[-1:]:
        try:
            dcp.load(state, checkpoint_id=checkpoint, planner=RNGLoadPlanner())
        except RNGStateError as error:  # another number of ranks: its batches are other samples
            print(f"this epoch begins anew: {error}")
            rest = {name: entry for name, entry in state.items() if name != "loader"}
            dcp.load(rest, checkpoint_id=checkpoint, planner=RNGLoadPlanner())
            state["loader"].set_epoch(state["app"].epoch)


def train(config: Config, device: str, training: Training, rng: StatefulRNG) -> None:
    """Go on from the newest checkpoint, if there is one, to the last step."""
    model, optimizer = training
    app, loader = AppState(training), setup_loader(config, rng)
    state = {"app": app, "rng": rng, "loader": loader}
    load_newest(config, state)
    rank = dist.get_rank()
    bar = tqdm(total=config.steps, initial=app.step, unit="step", disable=rank != 0)
    if loader.batches:
        bar.set_description(f"skipping {loader.batches} batches")
    with (config.out / f"losses-rank{rank}.txt").open("a", buffering=1) as losses:
        for app.epoch in loader.epochs(config.steps):  # an epoch has a step at least
            for tokens in loader:
                if app.step == config.steps:
                    return
                tokens = tokens.to(device)
                loss = nn.functional.cross_entropy(model(tokens[:, :-1]), tokens[:, -1])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.write(f"{app.step} {float(loss.item()).hex()}\n")
                bar.set_description("training", refresh=False)
                bar.set_postfix(epoch=app.epoch, loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
                app.step += 1
                if app.step % config.save_every == 0:
                    save_checkpoint(config.out, config.keep, state, app.step)


def main() -> None:
    config = validate_and_prepare_config()
    set_deterministic()  # before CUDA starts: cuBLAS reads its variable only once
    device = setup_distributed()
    config.out.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        run = {**asdict(config), "ranks": dist.get_world_size(), "environment": environment()}
        (config.out / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
    training = setup_model_and_optimizer(config, device)
    train(config, device, training, StatefulRNG(config.seed, ranked=True))
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads abort an interpreter that shuts down before they have ended


if __name__ == "__main__":
    main()
