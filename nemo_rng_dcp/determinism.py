"""What streams alone do not decide: deterministic algorithms, and what a result depends on."""

from __future__ import annotations

import os
import platform
import warnings
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import collect_env

from nemo_rng_dcp.generators import own_device

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")
"""The two values with which cuBLAS is deterministic; torch accepts no other."""


class _Settings(NamedTuple):
    """Everything that the switch changes."""

    algorithms: bool
    warn_only: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    cublas: str | None

    @classmethod
    def current(cls) -> _Settings:
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            os.environ.get(CUBLAS_VARIABLE),
        )

    def apply(self) -> None:
        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.warn_only)
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        _set_cublas(self.cublas)


class _Process:
    """What this process has to remember, since it cannot be asked for."""

    switched_on_from: _Settings | None = None
    """The settings before the first switching on that was not undone."""

    cublas_is_deterministic = False
    """cuBLAS took up a deterministic value, after which the variable's removal changes nothing."""


class set_deterministic:
    """Switch torch's deterministic algorithms on, or back to what was there before.

    Takes effect when it is called, and may be a context manager too: on exit everything is as it
    was before the call. Switching on sets ``torch.use_deterministic_algorithms(True)``,
    ``torch.backends.cudnn.deterministic``, no ``torch.backends.cudnn.benchmark``, and
    ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` unless the variable has a suitable value. cuBLAS reads that
    variable once, so call this before anything uses the GPU.

    Every rank calls it for itself; it does not communicate.

    Args:
        enabled: ``False`` puts back what was there before the first call with ``True``, however
            often that was called, and does nothing if there was none. So
            ``set_deterministic(flag)`` may stand at the start of any job.
        warn_only: An operation that has no deterministic implementation warns instead of raising.

    Raises:
        RuntimeError: CUDA is initialised, and ``CUBLAS_WORKSPACE_CONFIG`` did not have a suitable
            value by then. Nothing was changed. (With ``warn_only`` that is a warning as well, and
            everything but the variable is switched.)
        TypeError: An argument is no bool. Nothing was changed.

    Example:
        >>> with set_deterministic(warn_only=True):
        ...     torch.are_deterministic_algorithms_enabled()
        True
        >>> torch.are_deterministic_algorithms_enabled()
        False
    """

    def __init__(self, enabled: bool = True, *, warn_only: bool = False) -> None:
        for name, value in (("enabled", enabled), ("warn_only", warn_only)):
            if not isinstance(value, bool):
                raise TypeError(
                    f"{name} is {value!r} ({type(value).__name__}), expected True or False"
                )
        self._before = _Settings.current(), _Process.switched_on_from
        if enabled:
            _switch_on(warn_only)
        elif _Process.switched_on_from is not None:
            _Process.switched_on_from.apply()
            _Process.switched_on_from = None

    def __enter__(self) -> None:
        """Do nothing: the settings changed when the object was made."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        settings, _Process.switched_on_from = self._before
        settings.apply()


def environment() -> dict[str, Any]:
    """Return what a result depends on besides the code, the data and the seeds.

    Any rank may call it; it does not communicate. It initialises the accelerator if there is one:
    call it after :class:`set_deterministic`.

    Returns:
        A dict that JSON can hold, with ``None`` for what is unset or unknown:

        - ``python``, ``numpy``, ``torch``: versions; ``platform``: system and machine.
        - ``threads``: how many share one CPU operation (``intra_op``), how many operations run at a
          time (``inter_op``), and the variables ``OMP_NUM_THREADS`` and ``MKL_NUM_THREADS``.
        - ``accelerator``: ``None``, or a dict of its ``type``, its ``runtime`` (CUDA or ROCm),
          ``driver`` and ``cudnn`` versions, and the names of the visible ``devices``.
        - ``float32``: how exactly ``cuda_matmul``, ``cudnn_conv``, ``cudnn_rnn`` and ``cpu_matmul``
          multiply: "ieee", "tf32", "bf16", or "none" where nobody chose and it is as "ieee".
        - ``NCCL``: its variables (``NCCL_...``) that are set.
        - ``PYTHONHASHSEED``: the variable.
        - ``determinism``: ``algorithms``, ``warn_only``, ``cudnn_deterministic``,
          ``cudnn_benchmark``, and the variable ``CUBLAS_WORKSPACE_CONFIG``.

    Example:
        >>> environment()["determinism"]["algorithms"]
        False
    """
    settings = _Settings.current()._asdict()
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "threads": {
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
            **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        },
        "accelerator": _describe_accelerator(),
        "float32": _float32_precision(),
        "NCCL": {name: os.environ[name] for name in sorted(os.environ) if name[:5] == "NCCL_"},
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED"),
        "determinism": {CUBLAS_VARIABLE: settings.pop("cublas"), **settings},
    }


def _switch_on(warn_only: bool) -> None:
    before = _Settings.current()
    cublas = before.cublas
    if cublas not in CUBLAS_DETERMINISTIC:
        if _cublas_may_have_started() and not _Process.cublas_is_deterministic:
            message = (
                f"CUDA is initialised already and {CUBLAS_VARIABLE} is {cublas!r}: too late to set "
                "it, cuBLAS may have read it. Call set_deterministic() before anything uses the "
                f"GPU, or start the job with {CUBLAS_VARIABLE}={CUBLAS_DETERMINISTIC[0]}"
            )
            if not warn_only:
                raise RuntimeError(message)
            # Left as it is: torch asks the variable whether cuBLAS is deterministic.
            warnings.warn(message, stacklevel=3)
        else:
            cublas = CUBLAS_DETERMINISTIC[0]
    _Process.switched_on_from = _Process.switched_on_from or before
    _Settings(True, warn_only, True, False, cublas).apply()


def _set_cublas(value: str | None) -> None:
    if os.environ.get(CUBLAS_VARIABLE) in CUBLAS_DETERMINISTIC and _cublas_may_have_started():
        _Process.cublas_is_deterministic = True
    if value is None:
        os.environ.pop(CUBLAS_VARIABLE, None)
    else:
        os.environ[CUBLAS_VARIABLE] = value


def _cublas_may_have_started() -> bool:
    # ROCm calls itself CUDA as well, and has no cuBLAS.
    cuda: Any = torch.cuda
    return bool(cuda.is_initialized()) and torch.version.hip is None


def _float32_precision() -> dict[str, str]:
    # The older flags (allow_tf32) raise in a job that has set one of these.
    backends: Any = torch.backends
    return {
        "cuda_matmul": backends.cuda.matmul.fp32_precision,
        "cudnn_conv": backends.cudnn.conv.fp32_precision,
        "cudnn_rnn": backends.cudnn.rnn.fp32_precision,
        "cpu_matmul": backends.mkldnn.matmul.fp32_precision,
    }


def _describe_accelerator() -> dict[str, Any] | None:
    device = own_device()
    if device is None:
        return None
    module: Any = torch.get_device_module()
    count = torch.accelerator.device_count()
    names = [device.type] * count
    driver = None
    if hasattr(module, "get_device_properties"):
        properties = [module.get_device_properties(index) for index in range(count)]
        names = [str(device.name) for device in properties]
        driver = getattr(properties[0], "driver_version", None)
    if device.type == "cuda" and torch.version.hip is None:
        driver = collect_env.get_nvidia_driver_version(collect_env.run)  # type: ignore[no-untyped-call]
    return {
        "type": device.type,
        "runtime": torch.version.hip or torch.version.cuda,
        "driver": driver,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "devices": names,
    }
