"""Gradients and their norm, summed in an order that does not depend on the number of processes.

To copy beside a training loop. A floating-point sum depends on its order. Here the gradients of all
logical ranks are added pairwise, as a tree over the logical ranks 0 to N - 1, whoever computed
them: (0 + 1) + (2 + 3), and so on. A process adds what is complete among its own logical ranks,
and after its last one the partial sums of all processes are exchanged, once.

Exact for the same N, machine type, software and number of threads. Each logical rank must run one
backward, in order, and each FSDP module once in it. A process that plays k logical ranks holds up
to ``log2(k) + 1`` partial sums of the full gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

Node = tuple[int, int]
"""A partial sum: (level, i) is that of the logical ranks from ``i << level`` on, ``1 << level``."""


class Tree:
    """Pairwise sums over the leaves 0 to ``size - 1``; a pair is added once it is complete."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.sums: dict[Node, torch.Tensor] = {}

    def add(self, node: Node, value: torch.Tensor) -> None:
        """Add a partial sum, whose memory the tree takes over."""
        level, i = node
        while 1 << level < self._size:
            has_sibling = (i ^ 1) << level < self._size
            if has_sibling and (level, i ^ 1) not in self.sums:
                break
            if has_sibling:
                value = self.sums.pop((level, i ^ 1)).add_(value)  # a + b is b + a, bit for bit
            level, i = level + 1, i >> 1
        self.sums[level, i] = value


@lru_cache
def partial_sums(ranks: range, size: int) -> list[Node]:
    """Return which sums are left when all of ``ranks`` have been added, in their order."""
    tree = Tree(size)
    for rank in ranks:
        tree.add((0, rank), torch.zeros(0))
    return sorted(tree.sums, key=lambda node: node[1] << node[0])


class OrderedReduceScatter:
    """Takes the place of FSDP2's reduce-scatter in one FSDP module.

    Args:
        ranks: The logical ranks that this process plays, as ``rng.ranks``.
        size: How many logical ranks there are.
        current: Returns the one whose backward runs, as ``rng.rank``.
        replicas: With HSDP, the group along which the module is replicated.
    """

    def __init__(
        self,
        ranks: range,
        size: int,
        current: Callable[[], int],
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        self._ranks, self._size, self._current, self._replicas = ranks, size, current, replicas
        self._tree, self._next = Tree(size), ranks[0]
        self.bytes_sent = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Put this process's shard of the sum into the output; zeros before the last rank's."""
        sums = self._collect(
            input_tensor
        )  # kept, not copied: allocate() gives new memory each time
        if sums is None:
            output_tensor.zero_()
            return
        processes, shard, k = group.size(), output_tensor.numel(), len(self._ranks)
        first = self._ranks[0] - group.rank() * k
        nodes = [self._left_with(first, process) for process in range(processes)]
        own = nodes[group.rank()]
        parts = torch.stack([sums[node].view(processes, shard) for node in own], dim=1).flatten()
        received = parts.new_empty(sum(map(len, nodes)) * shard)
        dist.all_to_all_single(
            received,
            parts,
            [len(left) * shard for left in nodes],
            [len(own) * shard] * processes,
            group=group,
        )
        self.bytes_sent += parts.nbytes * (processes - 1) // processes
        total = self._merged(nodes, received.view(-1, shard))
        if self._replicas is not None:
            total = self._across_replicas(total, processes * k)
        (whole,) = total.values()
        output_tensor.copy_(whole)

    def alone(self, gradient: torch.Tensor) -> None:
        """Do the same in place, as the all-reduce hook: one process needs no reduce-scatter."""
        sums = self._collect(gradient.clone())
        if sums is None:
            gradient.zero_()
        else:
            (whole,) = sums.values()
            gradient.copy_(whole)

    def _collect(self, gradient: torch.Tensor) -> dict[Node, torch.Tensor] | None:
        """Add a logical rank's gradient; return the partial sums if it is this process's last."""
        if self._current() != self._next:
            raise RuntimeError(
                f"a gradient of logical rank {self._current()}, expected {self._next}: run one "
                "backward for each of rng.ranks, in order, through each FSDP module once"
            )
        # Adding 0 turns -0.0 into 0.0: a sum with the zeros of other micro-batches loses the sign.
        self._tree.add((0, self._next), gradient.add_(0.0))
        self._next += 1
        if self._next in self._ranks:
            return None
        sums, self._tree, self._next = self._tree.sums, Tree(self._size), self._ranks[0]
        return sums

    def _left_with(self, first: int, process: int, k: int | None = None) -> list[Node]:
        k = len(self._ranks) if k is None else k
        return partial_sums(range(first + process * k, first + process * k + k), self._size)

    def _merged(
        self, nodes: list[list[Node]], values: Iterable[torch.Tensor]
    ) -> dict[Node, torch.Tensor]:
        tree = Tree(self._size)
        for node, value in zip((node for left in nodes for node in left), values, strict=True):
            tree.add(node, value)
        return tree.sums

    def _across_replicas(
        self, sums: dict[Node, torch.Tensor], ranks: int
    ) -> dict[Node, torch.Tensor]:
        """Add up what the replicas have; each plays ``ranks`` logical ranks in a row."""
        assert self._replicas is not None
        nodes = [self._left_with(0, replica, ranks) for replica in range(self._replicas.size())]
        most = max(map(len, nodes))
        own = torch.stack([sums[node] for node in nodes[self._replicas.rank()]])
        padded = torch.cat([own, own.new_zeros(most - len(own), own.shape[1])])
        every = padded.new_empty(len(nodes), *padded.shape)
        dist.all_gather(list(every), padded, group=self._replicas)
        self.bytes_sent += padded.nbytes * (len(nodes) - 1)
        values = (
            value for left, row in zip(nodes, every, strict=True) for value in row[: len(left)]
        )
        total = self._merged(nodes, values)
        if self._replicas.rank() == 0:
            return total
        # FSDP2's all-reduce then adds zeros to the total of replica 0.
        return {node: torch.zeros_like(value) for node, value in total.items()}


def reduce_in_order(
    model: nn.Module, ranks: range, size: int, current: Callable[[], int]
) -> list[OrderedReduceScatter]:
    """Have every FSDP module of ``model`` sum its gradients in the order of the logical ranks.

    Call it after ``fully_shard``, on every rank. Gradients are summed, not averaged: divide the
    loss. Arguments as for :class:`OrderedReduceScatter`.
    """
    reductions = []
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        mesh = next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
        replicas = mesh.get_group(0) if mesh.ndim == 2 else None
        reduction = OrderedReduceScatter(ranks, size, current, replicas)
        module.set_gradient_divide_factor(1.0)
        # One layout of the flat gradient in all micro-batches, whichever parameters they use.
        module.set_reduce_scatter_unused_params(True, recurse=False)
        if mesh.size(mesh.ndim - 1) > 1:
            module.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]
        else:
            module.set_all_reduce_hook(reduction.alone)
        reductions.append(reduction)
    return reductions


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip gradients sharded on dim 0 by their norm, summed in an order of its own.

    ``torch.nn.utils.clip_grad_norm_`` adds up the norms of the shards, so it depends on their
    number. Here each row of a weight is summed by its owner, by halving, and the rows of all
    weights are gathered, one number each. Every rank must call it: one all-gather.

    Returns:
        The norm before clipping, a scalar, the same on every rank.
    """
    gradients = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    mesh = gradients[0].device_mesh
    shard = mesh.ndim - 1  # before it, with HSDP, the replicas
    processes = mesh.size(shard)
    local = [gradient.to_local().float().square() for gradient in gradients]
    own = torch.cat([square if square.ndim == 1 else halved(square.flatten(1)) for square in local])
    # How Shard(0) cuts rows: full pieces, a shorter one, none.
    rows = [[len(part) for part in _cut(gradient.shape[0], processes)] for gradient in gradients]
    by_process = [list(column) for column in zip(*rows, strict=True)]
    most = max(map(sum, by_process))
    every = own.new_empty(processes, most)
    padded = nn.functional.pad(own, (0, most - len(own)))
    dist.all_gather(list(every), padded, group=mesh.get_group(shard))
    pieces = [
        row[: sum(lengths)].split(lengths) for row, lengths in zip(every, by_process, strict=True)
    ]
    in_order = [piece for of_weight in zip(*pieces, strict=True) for piece in of_weight]
    norm = halved(torch.cat(in_order)).sqrt()
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
    return x[..., 0]


def _cut(rows: int, processes: int) -> list[range]:
    piece = -(-rows // processes)
    return [range(rows)[piece * number : piece * (number + 1)] for number in range(processes)]
