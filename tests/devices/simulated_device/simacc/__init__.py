"""``torch.simacc``: a simulated accelerator.

``import torch`` loads it (entry point ``torch.backends``) when this folder's parent is on
``PYTHONPATH``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import torch

FOLDER = Path(__file__).parent
BUILD = FOLDER.parents[3] / "build" / "simacc"  # in the repository, and ignored by git
_queued = []
_lock = threading.RLock()
_done = False


def _build() -> str:
    """Compile the extension if its library is older than its source; return the library's path."""
    tag = f"torch{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"
    build = BUILD / tag
    library = build / "libsimacc.so"
    source = FOLDER / "simacc.cpp"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        import subprocess

        root = Path(torch.__file__).parent
        build.mkdir(parents=True, exist_ok=True)
        partial = build / f"partial-{os.getpid()}.so"
        command = [
            "g++",
            "-std=c++20",
            "-O0",
            "-fPIC",
            "-shared",
            "-w",
            "-DAT_PER_OPERATOR_HEADERS",
        ]
        command.append(str(source))
        command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        command += [f"-L{root}/lib", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.replace(library)
    return str(library)


def is_available() -> bool:
    return True


def device_count() -> int:
    return _C.device_count()


def get_device_properties(device=None) -> SimpleNamespace:
    index = current_device() if device is None else _index(device)
    return SimpleNamespace(name=f"Simulated {index}", driver_version="1.2")


def is_initialized() -> bool:
    return _C.is_initialized()


def _is_in_bad_fork() -> bool:
    return _C.is_in_bad_fork()


def _lazy_init() -> None:
    global _done
    with _lock:
        if is_initialized() and _done:
            return
        if _is_in_bad_fork():
            raise RuntimeError("Cannot re-initialize simacc in forked subprocess. Use 'spawn'.")
        _C.init()
        _done = True
        while _queued:
            _queued.pop(0)()


init = _lazy_init


def _lazy_call(call) -> None:
    with _lock:
        if is_initialized() and _done:
            call()
        else:
            _queued.append(call)


def current_device() -> int:
    _lazy_init()
    return _C.get_device()


def set_device(device) -> None:
    index = _index(device)
    if index is not None:
        _C.set_device(index)


def _exchange_device(index: int) -> int:
    before = _C.get_device()
    if index >= 0:
        _C.set_device(index)
    return before


_maybe_exchange_device = _exchange_device


class device:
    """Context manager: the current device inside."""

    def __init__(self, device) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._before = _exchange_device(-1 if self._index is None else self._index)

    def __exit__(self, *_: object) -> None:
        _exchange_device(self._before)


def synchronize(device=None) -> None:
    pass


def current_stream(device=None) -> torch.Stream:
    return torch.accelerator.current_stream(device)


def stream(stream) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()  # there is one a device


Stream, Event = torch.Stream, torch.Event


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


def _index(device) -> int | None:
    return device if isinstance(device, int) else torch.device(device).index


def get_rng_state(device="simacc") -> torch.Tensor:
    _lazy_init()
    index = _index(device)
    return _generators[_C.get_device() if index is None else index].get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state(new_state: torch.Tensor, device="simacc") -> None:
    if not is_initialized():
        new_state = new_state.clone()
    index = _index(device)
    _lazy_call(
        lambda: _generators[_C.get_device() if index is None else index].set_state(new_state)
    )


def set_rng_state_all(new_states) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def manual_seed(seed: int) -> None:
    _lazy_call(lambda: _generators[_C.get_device()].manual_seed(int(seed)))


def manual_seed_all(seed: int) -> None:
    _lazy_call(lambda: [generator.manual_seed(int(seed)) for generator in _generators])


def initial_seed() -> int:
    return _generators[_C.get_device()].initial_seed()


def has_context(index: int) -> bool:
    """Whether something was allocated or drawn on a device: CUDA would have a primary context."""
    return _C.has_context(index)


def _autoload() -> None:
    """The entry point: importing this module has done it."""


torch.ops.load_library(_build())
_C = torch.ops.simacc
_generators = [_C.default_generator(index) for index in range(_C.device_count())]
default_generators = tuple(_generators)
torch.utils.rename_privateuse1_backend("simacc")
torch._register_device_module("simacc", sys.modules[__name__])
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
