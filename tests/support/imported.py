"""What the fork server imports: torch, and what nearly every test or rank needs beside it.

Not nemo_rng_dcp: the server can have another path than the test, and thus another copy of it.
"""

import gc
import importlib
import os
import traceback
from contextlib import suppress
from types import SimpleNamespace

from tests.support.pages import collapse

PROCESS = os.getpid()

# What is imported stays. To look for garbage meanwhile takes a fifth of the time.
gc.disable()
# DCP's first save and load import all but the first two.
for name in (
    "pytest",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "fsspec",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "torch.utils.serialization",
):
    with suppress(ImportError):
        importlib.import_module(name)
# As long as no GPU is used, each of these formats the stack at every seed, to tell it if the seed
# fails on a GPU. Three milliseconds a seed are a twentieth of the suite's time.
for device in ("cuda", "xpu", "mtia"):
    names = {**vars(traceback), "format_stack": list}
    importlib.import_module(f"torch.{device}").traceback = SimpleNamespace(**names)
gc.freeze()
collapse()
gc.enable()
