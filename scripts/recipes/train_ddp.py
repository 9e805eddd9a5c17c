"""Train with DDP and a DataLoader; a run killed in the middle of an epoch resumes bit for bit.

    torchrun --standalone --nproc-per-node 2 scripts/recipes/train_ddp.py --out runs/ddp

Start it again with the same ``--out``, on any number of ranks, and it goes on from the newest
complete checkpoint, in the middle of an epoch too. Three kinds of random numbers meet here:

- The order of the samples: ``DistributedSampler`` makes it from seed and epoch.
- Augmentation, in DataLoader workers: ``seed_worker`` seeds them from the loader's generator, whose
  seed is derived from epoch and rank. Skipping the trained batches brings them back to their place.
- Dropout, in this process: its streams are in the checkpoint.

Runs on CPU with gloo, and on GPUs where there are some. The output folder gets ``checkpoints/``;
``losses-rank<r>.txt``, a line for each step with the loss as ``float.hex()``; and ``run.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from nemo_rng_dcp import RNGLoadPlanner, ScopedRNG, StatefulRNG, derive_seed, seed_worker
from nemo_rng_dcp.determinism import environment, set_deterministic

VOCABULARY = 256  # one token per byte
LOWER_CASE_PROBABILITY = 0.3
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
    learning_rate: float = 3e-3

    def problem(self) -> str | None:
        """Return what cannot work, if anything."""
        for name in ("steps", "save_every", "keep", "batch", "length", "width"):
            if getattr(self, name) < 1:
                return f"--{name.replace('_', '-')} is {getattr(self, name)}, expected >= 1"
        if not 0 <= self.dropout < 1:
            return f"--dropout is {self.dropout}, expected 0 <= dropout < 1"
        if self.workers < 0:
            return f"--workers is {self.workers}, expected >= 0"
        batch = self.batch * int(os.environ.get("WORLD_SIZE", 1))
        if self.samples < batch:
            return f"--samples is {self.samples}, expected at least one batch of all ranks, {batch}"
        with torch.device("meta"):
            model = build_model(self).state_dict()
        for checkpoint in complete_checkpoints(self.out)[-1:]:
            saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
            for name, weight in model.items():
                found = getattr(saved.get(f"app.model.{name}"), "size", None)
                if found != weight.shape:
                    return f"{checkpoint} has {name} of {found}, and the model {weight.shape}"
        return None


class Distributed(NamedTuple):
    rank: int
    world_size: int
    device: torch.device


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


class AppState:
    """Model, optimizer and the place in the data as one entry of the checkpoint."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.step = 0
        self.epoch = 0
        self.samples = 0  # trained in this epoch, by all ranks

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self.training)
        place = torch.tensor([self.step, self.epoch, self.samples])
        return {"model": model, "optimizer": optimizer, "place": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            *self.training, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.step, self.epoch, self.samples = state["place"].tolist()


class Crops(Dataset[torch.Tensor]):
    """Crops of the standard library's sources, some in lower case, a few bytes of each hidden."""

    def __init__(self, config: Config) -> None:
        self.config = config
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        self.text = b"".join(path.read_bytes() for path in sources)

    def __len__(self) -> int:
        return self.config.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.config.length % (len(self.text) - self.config.length)
        crop = self.text[start : start + self.config.length + 1]
        if random.random() < LOWER_CASE_PROBABILITY:
            crop = crop.lower()
        tokens = np.frombuffer(crop, dtype=np.uint8).astype(np.int64)
        tokens[np.random.random(tokens.shape) < HIDDEN_BYTES] = 0
        return torch.from_numpy(tokens)


def validate_and_prepare_config(arguments: list[str] | None = None) -> Config:
    """Parse the command line; exit with one line that says what cannot work."""
    parser = argparse.ArgumentParser(description="Train with DDP and a DataLoader.")
    for field in fields(Config):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    config = Config(**vars(parser.parse_args(arguments)))
    if problem := config.problem():
        parser.exit(2, f"{parser.prog}: {problem}\n")
    return config


def setup_distributed() -> Distributed:
    """Create the process group."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return Distributed(dist.get_rank(), dist.get_world_size(), device)


def setup_model_and_optimizer(config: Config, distributed: Distributed) -> Training:
    """Build the model and its optimizer."""
    with ScopedRNG(config.seed):  # leaves the ranks' streams alone
        model = build_model(config).to(distributed.device)
    devices = [distributed.device] if distributed.device.type == "cuda" else None
    parallel = DistributedDataParallel(model, device_ids=devices)
    return Training(parallel, torch.optim.AdamW(model.parameters(), lr=config.learning_rate))


def complete_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints that can be loaded, oldest first.

    DCP writes ``.metadata`` last, when the data of every rank is stored. So this file marks a
    complete checkpoint, in an object store too, where a folder cannot be renamed.
    """
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


def batches_of(
    epoch: int, config: Config, distributed: Distributed, dataset: Crops
) -> Iterator[torch.Tensor]:
    """Return this rank's batches of an epoch: the same ones each time it is called."""
    sampler = DistributedSampler(dataset, distributed.world_size, distributed.rank, drop_last=True)
    sampler.set_epoch(epoch)
    # Its own generator, or the iterator would draw the workers' seeds from the stream of dropout.
    generator = torch.Generator()
    generator.manual_seed(derive_seed(config.seed, "workers", epoch, distributed.rank))
    loader = DataLoader(
        dataset,
        config.batch,
        sampler=sampler,
        drop_last=True,
        num_workers=config.workers,
        worker_init_fn=seed_worker,
        generator=generator,
    )
    return iter(loader)


def train(config: Config, distributed: Distributed, training: Training, rng: StatefulRNG) -> None:
    """Go on from the newest checkpoint, if there is one, to the last step."""
    (model, optimizer), app, dataset = training, AppState(training), Crops(config)
    state = {"app": app, "rng": rng}
    newest = complete_checkpoints(config.out)[-1:]
    for checkpoint in newest:
        dcp.load(state, checkpoint_id=checkpoint, planner=RNGLoadPlanner())
    per_step = config.batch * distributed.world_size
    bar = tqdm(total=config.steps, initial=app.step, unit="step", disable=distributed.rank != 0)
    with (config.out / f"losses-rank{distributed.rank}.txt").open("a", buffering=1) as losses, bar:
        while app.step < config.steps:
            batches = batches_of(app.epoch, config, distributed, dataset)
            # A step trains the same samples on any number of ranks. If the place is no multiple of
            # today's step, fewer samples than one step has are trained twice.
            for _ in zip(range(app.samples // per_step), batches, strict=False):
                pass
            if newest:
                rng.rewind()  # without workers, skipping has drawn from this process's streams
                newest = []
            for tokens in batches:
                tokens = tokens.to(distributed.device)
                loss = F.cross_entropy(model(tokens[:, :-1]), tokens[:, -1])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.write(f"{app.step} {loss.item().hex()}\n")
                bar.set_postfix(epoch=app.epoch, loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
                app.step += 1
                app.samples += per_step
                if app.step % config.save_every == 0:
                    save_checkpoint(config.out, config.keep, state, app.step)
                if app.step == config.steps:
                    return
            app.epoch, app.samples = app.epoch + 1, 0


def main() -> None:
    config = validate_and_prepare_config()
    set_deterministic()  # before CUDA starts: cuBLAS reads its variable only once
    distributed = setup_distributed()
    config.out.mkdir(parents=True, exist_ok=True)
    if distributed.rank == 0:
        run = {"world_size": dist.get_world_size(), "environment": environment()}
        run["config"] = asdict(config)
        (config.out / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
    training = setup_model_and_optimizer(config, distributed)
    train(config, distributed, training, StatefulRNG(config.seed, ranked=True))
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads abort an interpreter that shuts down before they have ended


if __name__ == "__main__":
    main()
