"""The accelerator of this machine, if it has one."""

from typing import Any

import torch

AVAILABLE = torch.accelerator.is_available()
ACCELERATOR = torch.accelerator.current_accelerator() if AVAILABLE else None
TYPE = "none" if ACCELERATOR is None else ACCELERATOR.type
MODULE: Any = torch.get_device_module(ACCELERATOR) if AVAILABLE else None
COUNT = torch.accelerator.device_count() if AVAILABLE else 0
