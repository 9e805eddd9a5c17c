"""Train a policy by GRPO with DDP; a run killed between rollout and update resumes bit for bit.

    torchrun --standalone --nproc-per-node 2 scripts/recipes/train_grpo.py --out runs/grpo

The policy is given a target and learns to write digits with that sum. Start it again with the same
``--out``, on any number of ranks that divides ``--groups``, and it goes on from the newest complete
checkpoint. Beside model, optimizer and streams, it has the rollout that the next update trains on,
because rollouts cost most, and the reference: a CPU copy of the weights from before training.
On CPU with gloo; on GPUs untested. Besides, ``--out`` gets ``run.json``, ``losses-rank<r>.txt`` and
``rollouts-rank<r>.txt``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nemo_rng_dcp import RNGLoadPlanner, ScopedRNG, StatefulRNG
from nemo_rng_dcp.determinism import environment, set_deterministic

DIGITS = 10


@dataclass(frozen=True)
class Config:
    """What the command line sets: ``--save-every 5`` for ``save_every``."""

    out: Path = Path("runs", "grpo")
    steps: int = 40
    save_every: int = 10
    keep: int = 2  # checkpoints
    seed: int = 42
    groups: int = 12  # targets per step, of all ranks
    rollouts: int = 8  # per group
    length: int = 4  # digits per rollout
    width: int = 32
    dropout: float = 0.1
    kl: float = 0.05  # weight of the KL term


class Training(NamedTuple):
    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    reference: dict[str, torch.Tensor]  # on CPU: the model's state dict before training


class Policy(nn.Module):
    """Targets ``(rows, 1)`` and ``t`` digits to the logits of ``t + 1``: ``(rows, t + 1, 10)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.targets = nn.Embedding(9 * config.length + 1, config.width)
        self.digits = nn.Embedding(DIGITS, config.width)
        self.memory = nn.GRU(config.width, config.width, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, DIGITS)

    def forward(self, target: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        x, _ = self.memory(torch.cat([self.targets(target), self.digits(digits)], dim=1))
        return self.head(self.dropout(x))


@dataclass
class AppState:
    """What is trained, what it is compared with and what comes next, as one entry."""

    training: Training
    mesh: DeviceMesh
    rollout: torch.Tensor  # of this rank
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self.training[:2])
        return {
            "model": model,
            "optimizer": optimizer,
            "reference": self.training.reference,  # DCP loads into these tensors
            "rollout": DTensor.from_local(self.rollout, self.mesh, [Shard(0)]),
            "step": torch.tensor(self.step),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(*self.training[:2], model_state_dict=model, optim_state_dict=optimizer)
        self.rollout = state["rollout"].to_local()
        self.step = int(state["step"])


def validate_and_prepare_config(arguments: list[str] | None = None) -> Config:
    """Parse the command line; exit with one line that says what cannot work."""
    parser = argparse.ArgumentParser(description="Train a policy by GRPO with DDP.")
    for field in fields(Config):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        parser.add_argument(option, type=type(default), default=default, help=f"default {default}")
    config = Config(**vars(parser.parse_args(arguments)))
    problems = []
    for name, value in asdict(config).items():
        if isinstance(value, int) and value < 1 and name != "seed":
            problems.append(f"--{name.replace('_', '-')} is {value}, expected >= 1")
    if not 0 <= config.dropout < 1:
        problems.append(f"--dropout is {config.dropout}, expected 0 <= dropout < 1")
    if config.groups % (ranks := int(os.environ.get("WORLD_SIZE", 1))):
        problems.append(f"--groups is {config.groups}, expected a multiple of {ranks} ranks")
    for checkpoint in [] if problems else complete_checkpoints(config.out)[-1:]:
        saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        for name, weight in Policy(config).state_dict().items():
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


def setup_model_and_optimizer(config: Config, mesh: DeviceMesh) -> Training:
    """Build the model, its optimizer, and the reference: before any checkpoint is loaded."""
    with ScopedRNG(config.seed):  # the same weights on all ranks
        policy = Policy(config).to(mesh.device_type)
    reference = {name: weight.to("cpu", copy=True) for name, weight in policy.state_dict().items()}
    if mesh.device_type == "cuda":
        reference = {name: weight.pin_memory() for name, weight in reference.items()}
    model = DistributedDataParallel(policy)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=1e-2), reference)


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


@torch.no_grad()
def roll_out(config: Config, policy: nn.Module) -> torch.Tensor:
    """Draw targets, and digits from the policy: int64 ``(rows, 1 + length)``."""
    groups, device = config.groups // dist.get_world_size(), next(policy.parameters()).device
    targets = torch.randint(9 * config.length + 1, (groups, 1), device=device)
    rollout = targets.repeat_interleave(config.rollouts, dim=0)
    policy.eval()
    for _ in range(config.length):
        probabilities = policy(rollout[:, :1], rollout[:, 1:])[:, -1].softmax(dim=-1)
        rollout = torch.cat([rollout, torch.multinomial(probabilities, 1)], dim=1)
    policy.train()
    return rollout


def log_probabilities(policy: nn.Module, rollout: torch.Tensor) -> torch.Tensor:
    """Return those of the digits in a rollout: ``(rows, length)``."""
    logits = policy(rollout[:, :1], rollout[:, 1:-1])
    return logits.log_softmax(dim=-1).gather(2, rollout[:, 1:, None])[..., 0]


def loss_and_reward(config: Config, training: Training, rollout: torch.Tensor) -> torch.Tensor:
    """Return the policy loss with its KL term, and the mean reward: ``(2,)``."""
    policy = training.model.module.eval()
    with torch.no_grad():
        old = log_probabilities(policy, rollout)
        trained = {name: weight.clone() for name, weight in policy.state_dict().items()}
        policy.load_state_dict(training.reference)
        reference = log_probabilities(policy, rollout)
        policy.load_state_dict(trained)
        rewards = -(rollout[:, 1:].sum(dim=1) - rollout[:, 0]).abs().float()
        advantage = rewards.view(-1, config.rollouts)  # a row for each group
        advantage = advantage - advantage.mean(dim=1, keepdim=True)
        advantage /= advantage.std(dim=1, keepdim=True, correction=0) + 1e-4
    new = log_probabilities(training.model.train(), rollout)  # with dropout
    kl = (reference - new).exp() - (reference - new) - 1
    loss = config.kl * kl - (new - old).exp() * advantage.view(-1, 1)
    return torch.stack([loss.mean(), rewards.mean()])


def train(config: Config, mesh: DeviceMesh, training: Training, rng: StatefulRNG) -> None:
    """Go on from the newest checkpoint, if there is one, to the last step."""
    model, optimizer = training[:2]
    app = AppState(training, mesh, roll_out(config, model.module))
    state = {"app": app, "rng": rng}
    for newest in complete_checkpoints(config.out)[-1:]:
        dcp.load(state, checkpoint_id=newest, planner=RNGLoadPlanner())
    rank = dist.get_rank()
    bar = tqdm(total=config.steps, initial=app.step, unit="step", disable=rank != 0)
    with (
        (config.out / f"losses-rank{rank}.txt").open("a", buffering=1) as losses,
        (config.out / f"rollouts-rank{rank}.txt").open("a", buffering=1) as rollouts,
    ):
        while app.step < config.steps:
            rollouts.write(f"{app.step} {app.rollout.flatten().tolist()}\n")
            loss, reward = loss_and_reward(config, training, app.rollout)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.write(f"{app.step} {float(loss.item()).hex()}\n")
            bar.set_postfix(reward=f"{reward.item():.2f}", refresh=False)
            bar.update()
            app.step += 1
            app.rollout = roll_out(config, model.module)
            if app.step % config.save_every == 0:
                save_checkpoint(config.out, config.keep, state, app.step)


def main() -> None:
    config = validate_and_prepare_config()
    set_deterministic()  # before CUDA starts: cuBLAS reads its variable only once
    mesh = setup_distributed()
    config.out.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        run = {**asdict(config), "ranks": dist.get_world_size(), "environment": environment()}
        (config.out / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
    training = setup_model_and_optimizer(config, mesh)
    train(config, mesh, training, StatefulRNG(config.seed, ranked=True))
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads abort an interpreter that shuts down before they have ended


if __name__ == "__main__":
    main()
