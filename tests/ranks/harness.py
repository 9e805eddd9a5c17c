"""What scripts of checks share."""

import types

import torch.distributed as dist


def checks_of(module: types.ModuleType) -> list[str]:
    return [name for name in vars(module) if name.startswith("check_")]


def gather(value: object) -> list[object]:
    """Return every rank's value, in the order of the ranks."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
