"""The norm of sharded gradients and the hash of sharded states, on any number of processes.

To copy beside ``reduction.py``. ``torch.nn.utils.clip_grad_norm_`` adds up the norms of the shards,
so its result depends on how many there are. For a model that every process has whole it is right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[nn.Parameter], max_norm: float, mesh: DeviceMesh
) -> torch.Tensor:
    """Clip gradients sharded on dim 0 by their norm, summed in an order of its own.

    Each row of a weight is summed by its owner, by halving, and the rows of all weights are
    gathered, one number each. Every rank must call it: one all-gather, and a second one among
    tensor-parallel peers. ``mesh`` is what ``fully_shard`` was given.

    Returns:
        The norm before clipping, a scalar, the same on every rank.
    """
    gradients = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    shard, processes = mesh.ndim - 1, mesh.size(mesh.ndim - 1)
    own, heights, tp = [], [], None
    for gradient in gradients:
        if getattr(gradient.placements[shard], "dim", None) != 0:
            raise ValueError(f"a gradient is {gradient.placements}, expected Shard(0) of {mesh}")
        square = gradient.to_local().float().square()
        own.append(square if square.ndim == 1 else halved(square.flatten(1)))
        # How Shard(0) cuts rows: full pieces, a shorter one, none. Before that, tp may have cut.
        rows = range(gradient.shape[0])
        if _is_split(gradient, mesh):
            tp = gradient.device_mesh.get_group(mesh.ndim)
            if _is_split(gradient, mesh, 0):
                rows = _cut(rows, tp.size())[tp.rank()]
        heights.append([len(part) for part in _cut(rows, processes)])
    by_process = [list(column) for column in zip(*heights, strict=True)]
    flat = torch.cat(own)
    every = flat.new_empty(processes, max(map(sum, by_process)))
    padded = nn.functional.pad(flat, (0, every.shape[1] - len(flat)))
    dist.all_gather(list(every), padded, group=mesh.get_group(shard))
    pieces = [
        row[: sum(lengths)].split(lengths) for row, lengths in zip(every, by_process, strict=True)
    ]
    alike: list[torch.Tensor] = [flat.new_zeros(0)]
    split: list[torch.Tensor] = []
    for gradient, of_weight in zip(gradients, zip(*pieces, strict=True), strict=True):
        (split if _is_split(gradient, mesh) else alike).extend(of_weight)
    total = halved(torch.cat(alike))
    if tp is not None:
        parts = flat.new_empty(tp.size())
        dist.all_gather(list(parts.split(1)), halved(torch.cat(split))[None], group=tp)
        total = total + halved(parts)
    norm = total.sqrt()
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.to_local().mul_(factor)
    return norm


def halved(x: torch.Tensor) -> torch.Tensor:
    """Return the sums over the last dimension by halving: by element, in a fixed order."""
    half = 1 << max(x.shape[-1] - 1, 0).bit_length()
    while half > 1:
        half //= 2
        if x.shape[-1] > half:
            upper = x[..., half:]
            x = x[..., :half].clone()
            x[..., : upper.shape[-1]] += upper
    return x[..., 0] if x.shape[-1] else x.sum(-1)


def states_hash(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a hash of all weights and optimizer states. Every rank must call it.

    It gathers one after the other: for comparing runs, not for every step of a large model.
    """
    found = hashlib.sha256()
    for weight in model.parameters():
        for tensor in (weight.detach(), *optimizer.state.get(weight, {}).values()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found.update(whole.cpu().numpy().tobytes())
    return found.hexdigest()


def _is_split(gradient: DTensor, mesh: DeviceMesh, dim: int | None = None) -> bool:
    """Return whether tensor-parallel peers have parts of it, cut along ``dim`` or any dimension."""
    dims = [getattr(placement, "dim", None) for placement in gradient.placements[mesh.ndim :]]
    return any(found is not None and dim in (None, found) for found in dims)


def _cut(rows: range, processes: int) -> list[range]:
    piece = -(-len(rows) // processes)
    return [rows[piece * number : piece * (number + 1)] for number in range(processes)]
