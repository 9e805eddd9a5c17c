"""Gradients, summed in an order that does not depend on the number of processes.

To copy beside a training loop. A floating-point sum depends on its order. Here the gradients of all
logical ranks are added pairwise, as a tree over the logical ranks 0 to N - 1, whoever computed
them: (0 + 1) + (2 + 3), and so on. A process adds what is complete among its own logical ranks,
and after its last one the partial sums of all processes are exchanged, once.

For FSDP2 and HSDP, also beside tensor parallelism: :func:`reduce_in_order`. For a model that every
process has whole, as with DDP: :class:`WholeGradients`.

Exact for the same N, machine type, software and number of threads. Each logical rank must run one
backward, in order, through each FSDP module once. A process that plays several notices it if not.

Cost for k logical ranks a process, where k is a power of two: the gradients are exchanged once a
step, as bytes the k-th part of what FSDP2 sends if it reduces each micro-batch. A process holds up
to ``log2(k)`` partial sums of the whole gradient, at least one, where FSDP2 holds a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nemo_rng_dcp import StatefulRNG

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


class OrderedSum:
    """The sum of a flat tensor of each logical rank, in their order.

    Attributes:
        bytes_sent: By this process, so far.
        bytes_held: Partial sums that this process held at most when nothing was being added.
    """

    def __init__(self, rng: StatefulRNG) -> None:
        self._rng, self._size = rng, rng.logical_ranks or dist.get_world_size()
        self._tree, self._next = Tree(self._size), rng.ranks[0]
        self.bytes_sent = self.bytes_held = 0

    def add(self, gradient: torch.Tensor) -> dict[Node, torch.Tensor] | None:
        """Add the current logical rank's, in place; after the last one return the partial sums."""
        if self._rng.rank != self._next:
            raise RuntimeError(
                f"a gradient of logical rank {self._rng.rank}, expected {self._next}: run one "
                "backward for each of rng.ranks, in order, through each FSDP module once"
            )
        # Adding 0 turns -0.0 into 0.0: a sum with the zeros of other micro-batches loses the sign.
        self._tree.add((0, self._next), gradient.add_(0.0))
        held = sum(value.nbytes for value in self._tree.sums.values())
        self.bytes_held = max(self.bytes_held, held)
        self._next += 1
        if self._next in self._rng.ranks:
            return None
        sums = self._tree.sums
        self._tree, self._next = Tree(self._size), self._rng.ranks[0]
        return sums

    def total(self, value: torch.Tensor) -> torch.Tensor | None:
        """Add the current logical rank's; after the last one return the sum on every process.

        Every process must call it equally often: two collectives with the last one.
        """
        processes = dist.get_world_size() if dist.is_initialized() else 1
        sums = self.add(nn.functional.pad(value, (0, -len(value) % processes)))
        if sums is None:
            return None
        if processes > 1:
            sums = self.exchange(sums, dist.group.WORLD)  # type: ignore[arg-type]
        (whole,) = sums.values()
        if processes > 1:
            every = whole.new_empty(processes, len(whole))
            dist.all_gather(list(every), whole)
            self.bytes_sent += whole.nbytes * (processes - 1)
            whole = every.flatten()
        return whole[: len(value)]

    def exchange(
        self, sums: dict[Node, torch.Tensor], group: dist.ProcessGroup
    ) -> dict[Node, torch.Tensor]:
        """Return this process's shard of what the group has, of equal shards; one all-to-all."""
        processes = group.size()
        nodes = self._left_with(group, len(self._rng.ranks))
        own = nodes[group.rank()]
        parts = torch.stack([sums[node].view(processes, -1) for node in own], dim=1)
        shard = parts.shape[2]
        received = parts.new_empty(sum(map(len, nodes)) * shard)
        dist.all_to_all_single(
            received,
            parts.flatten(),
            [len(left) * shard for left in nodes],
            [len(own) * shard] * processes,
            group=group,
        )
        self.bytes_sent += parts.nbytes * (processes - 1) // processes
        return self._merged(nodes, received.view(-1, shard))

    def gather(
        self, sums: dict[Node, torch.Tensor], ranks: int, group: dist.ProcessGroup
    ) -> dict[Node, torch.Tensor]:
        """Return what the group has, whose members speak for ``ranks`` logical ranks each."""
        nodes = self._left_with(group, ranks)
        most = max(map(len, nodes))
        own = torch.stack([sums[node] for node in nodes[group.rank()]])
        padded = torch.cat([own, own.new_zeros(most - len(own), own.shape[1])])
        every = padded.new_empty(len(nodes), *padded.shape)
        dist.all_gather(list(every), padded, group=group)
        self.bytes_sent += padded.nbytes * (len(nodes) - 1)
        values = (
            value for left, row in zip(nodes, every, strict=True) for value in row[: len(left)]
        )
        return self._merged(nodes, values)

    def _left_with(self, group: dist.ProcessGroup, ranks: int) -> list[list[Node]]:
        """Return which partial sums each member of a group has, if each speaks for ``ranks``."""
        first = self._rng.ranks[0] // (ranks * group.size()) * ranks * group.size()
        starts = range(first, first + ranks * group.size(), ranks)
        return [partial_sums(range(start, start + ranks), self._size) for start in starts]

    def _merged(
        self, nodes: list[list[Node]], values: Iterable[torch.Tensor]
    ) -> dict[Node, torch.Tensor]:
        tree = Tree(self._size)
        for node, value in zip((node for left in nodes for node in left), values, strict=True):
            tree.add(node, value)
        return tree.sums


class OrderedReduceScatter(OrderedSum):
    """Takes the place of FSDP2's reduce-scatter in one FSDP module.

    With HSDP, ``replicas`` is the group along which the module is replicated.
    """

    def __init__(self, rng: StatefulRNG, replicas: dist.ProcessGroup | None = None) -> None:
        super().__init__(rng)
        self._replicas = replicas

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
        sums = self.add(input_tensor)  # kept, not copied: allocate() gives new memory each time
        if sums is None:
            output_tensor.zero_()
            return
        total = self.exchange(sums, group)
        if self._replicas is not None:
            total = self.gather(total, group.size() * len(self._rng.ranks), self._replicas)
        (whole,) = total.values()
        # With HSDP FSDP2's all-reduce then adds zeros to the total of replica 0.
        is_first = self._replicas is None or self._replicas.rank() == 0
        output_tensor.copy_(whole) if is_first else output_tensor.zero_()

    def alone(self, gradient: torch.Tensor) -> None:
        """Do the same in place, as the all-reduce hook: one process needs no reduce-scatter."""
        sums = self.add(gradient.clone())
        if sums is None:
            gradient.zero_()
        else:
            (whole,) = sums.values()
            gradient.copy_(whole)


def reduce_in_order(
    model: nn.Module, mesh: DeviceMesh, rng: StatefulRNG
) -> list[OrderedReduceScatter]:
    """Have every FSDP module of ``model`` sum its gradients in the order of the logical ranks.

    Call it after ``fully_shard``, on every rank. Gradients are summed, not averaged: divide the
    loss.

    Args:
        model: The model; all its weights are in FSDP modules.
        mesh: What ``fully_shard`` was given: one dimension, or two with HSDP.
        rng: The streams of the logical ranks. Beside tensor parallelism its ``mesh`` is this one.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and not isinstance(weight, DTensor):
            raise ValueError(f"{name} is in no FSDP module, so nothing would sum its gradients")
    if rng.logical_ranks is None:
        raise ValueError("the order is that of logical ranks: StatefulRNG(logical_ranks=N)")
    place, share = 0, rng.logical_ranks // mesh.size()
    for size, coordinate in zip(mesh.shape, mesh.get_coordinate() or (), strict=True):
        place = place * size + coordinate
    if rng.ranks != range(place * share, (place + 1) * share):
        raise ValueError(
            f"this process is number {place} of {mesh.size()} in {mesh} and plays {rng.ranks} of "
            f"{rng.logical_ranks} logical ranks: give that mesh to StatefulRNG, too"
        )
    replicas = mesh.get_group(0) if mesh.ndim == 2 and mesh.size(0) > 1 else None
    shards = mesh.size(mesh.ndim - 1)
    if replicas is not None and shards == 1:
        raise ValueError(
            "with one shard, FSDP2 sums over the replicas before anyone can choose an order: "
            "shard over all processes, mesh (1, n) or (n,); the result is the same, bit for bit"
        )
    reductions = []
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        reduction = OrderedReduceScatter(rng, replicas)
        module.set_gradient_divide_factor(1.0)
        # One layout of the flat gradient in all micro-batches, whichever parameters they use. An
        # older torch, such as 2.9, has it for models that use all of them each time.
        if hasattr(module, "set_reduce_scatter_unused_params"):
            module.set_reduce_scatter_unused_params(True, recurse=False)
        if shards > 1:
            module.set_custom_reduce_scatter(reduction)  # type: ignore[arg-type]
        else:
            module.set_all_reduce_hook(reduction.alone)
        reductions.append(reduction)
    return reductions


class WholeGradients(OrderedSum):
    """Takes the place of DDP for a model that every process has whole.

    Call :meth:`collect` after each backward, inside ``as_rank``. Not as a hook of DDP: that leaves
    the gradients of weights alone which the last micro-batch did not use.

    Args:
        model: The model, with the same weights on every process; not wrapped.
        rng: The streams of the logical ranks.
    """

    def __init__(self, model: nn.Module, rng: StatefulRNG) -> None:
        super().__init__(rng)
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]

    def collect(self) -> None:
        """Take the gradients away; after the last logical rank's, put the sum of all there.

        Every process must call it equally often.
        """
        pieces = [
            (torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in self._weights
        ]
        total = self.total(torch.cat(pieces))
        for weight in self._weights:
            weight.grad = None
        if total is None:
            return
        split = total.split([len(piece) for piece in pieces])
        for weight, gradient in zip(self._weights, split, strict=True):
            weight.grad = gradient.view_as(weight)
