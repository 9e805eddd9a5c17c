import json
import os
import platform
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import collect_env

from nemo_rng_dcp import determinism
from nemo_rng_dcp.determinism import CUBLAS_VARIABLE, environment, set_deterministic
from tests.support.jobs import JobError, job

ON = {
    "algorithms": True,
    "warn_only": False,
    "cudnn_deterministic": True,
    "cudnn_benchmark": False,
    CUBLAS_VARIABLE: ":4096:8",
}


def settings() -> dict[str, Any]:
    found = environment()["determinism"]
    assert found[CUBLAS_VARIABLE] == os.environ.get(CUBLAS_VARIABLE)
    return found


@pytest.fixture(autouse=True)
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Settings that differ from the switch's in every respect; afterwards they must be back."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    # On a machine with a GPU another test may have initialised it.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    found = settings()
    assert not [name for name in ON if name != "warn_only" and found[name] == ON[name]]
    yield found
    assert settings() == found, "a test left the switch on"


GPU = SimpleNamespace(name="H200")


def put_twice() -> None:
    """An operation that torch has no deterministic implementation of."""
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_a_call_switches_on_and_false_undoes_all_of_it(before: dict[str, Any]) -> None:
    put_twice()
    set_deterministic()
    assert settings() == ON
    with pytest.raises(RuntimeError, match="deterministic"):
        put_twice()
    set_deterministic(False)
    assert settings() == before
    put_twice()


def test_warn_only(before: dict[str, Any]) -> None:
    set_deterministic(warn_only=True)
    assert settings() == {**ON, "warn_only": True}
    with pytest.warns(UserWarning, match="deterministic"):
        put_twice()
    set_deterministic(False)


def test_false_undoes_any_number_of_calls_and_is_harmless_alone(before: dict[str, Any]) -> None:
    for enabled in (False, True, True, False):
        set_deterministic(enabled)
    assert settings() == before
    set_deterministic(False)
    assert settings() == before


def test_false_keeps_what_was_not_switched_on_here() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        own = settings()
        set_deterministic(False)
        assert settings() == own
        set_deterministic()
        assert settings() == ON
        set_deterministic(False)
        assert settings() == own
    finally:
        torch.use_deterministic_algorithms(False)


def test_as_a_context_manager_it_ends_with_the_block(before: dict[str, Any]) -> None:
    with set_deterministic():
        assert settings() == ON
    assert settings() == before
    with pytest.raises(KeyError), set_deterministic():
        raise KeyError
    assert settings() == before


def test_blocks_and_calls_nest(before: dict[str, Any]) -> None:
    with set_deterministic():
        with set_deterministic(warn_only=True):
            assert settings() == {**ON, "warn_only": True}
            with set_deterministic(False):
                assert settings() == before
            assert settings() == {**ON, "warn_only": True}
        assert settings() == ON
        set_deterministic(False)
        assert settings() == before
        set_deterministic()
    assert settings() == before
    set_deterministic(False)
    assert settings() == before

    set_deterministic()
    with set_deterministic(False):
        assert settings() == before
    assert settings() == ON
    set_deterministic(False)


@pytest.mark.parametrize("value", [":4096:8", ":16:8", ":0:0"])
def test_the_variable_stays_if_it_is_suitable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(CUBLAS_VARIABLE, value)
        with set_deterministic():
            assert os.environ[CUBLAS_VARIABLE] == (":4096:8" if value == ":0:0" else value)
        assert os.environ[CUBLAS_VARIABLE] == value


@pytest.fixture
def initialised_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.usefixtures("initialised_cuda")
@pytest.mark.parametrize("value", [None, ":0:0"])
def test_too_late_is_an_error_and_nothing_changes(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if value is not None:
            patch.setenv(CUBLAS_VARIABLE, value)
        found = settings()
        said = f"{CUBLAS_VARIABLE} is {value!r}: too late .* with {CUBLAS_VARIABLE}=:4096:8$"
        with pytest.raises(RuntimeError, match=said):
            set_deterministic()
        assert settings() == found
        set_deterministic(False)
        assert settings() == found


@pytest.mark.usefixtures("initialised_cuda")
def test_too_late_is_a_warning_with_warn_only() -> None:
    """The variable stays, for torch takes it for the truth about cuBLAS."""
    with pytest.warns(UserWarning, match="too late"), set_deterministic(warn_only=True):
        assert settings() == {**ON, "warn_only": True, CUBLAS_VARIABLE: None}


@pytest.mark.usefixtures("initialised_cuda")
def test_the_warning_names_the_line_that_switched() -> None:
    with pytest.warns(UserWarning, match="too late") as caught, set_deterministic(warn_only=True):
        pass
    assert caught[0].filename == __file__


# cuBLAS with a suitable variable is remembered for the rest of a process: these have their own.


def start_cuda() -> None:
    torch.cuda.is_initialized = lambda: True
    torch.version.hip = None


def switch_with_a_suitable_variable() -> None:
    start_cuda()
    os.environ[CUBLAS_VARIABLE] = ":16:8"
    with set_deterministic():
        assert settings() == {**ON, CUBLAS_VARIABLE: ":16:8"}


def test_it_is_not_too_late_with_a_suitable_variable() -> None:
    job(1, switch_with_a_suitable_variable, group=False)


def switch_twice() -> None:
    with set_deterministic():
        start_cuda()
    assert CUBLAS_VARIABLE not in os.environ
    with set_deterministic():
        assert settings() == ON


def test_it_is_not_too_late_a_second_time() -> None:
    """cuBLAS that started inside a block stays deterministic after it."""
    job(1, switch_twice, group=False)


@pytest.mark.parametrize("wrong", [1, 0, None, "yes"])
def test_arguments_are_bools(wrong: Any, before: dict[str, Any]) -> None:
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=re.escape(f"enabled is {wrong!r} ({kind}), expected")):
        set_deterministic(wrong)
    with pytest.raises(TypeError, match=re.escape(f"warn_only is {wrong!r} ({kind}), expected")):
        set_deterministic(warn_only=wrong)
    assert settings() == before


def test_the_environment_is_plain_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    found = environment()
    assert json.loads(json.dumps(found)) == found
    versions = [found[name] for name in ("python", "numpy", "torch")]
    assert versions == [platform.python_version(), np.__version__, torch.__version__]
    assert type(found["torch"]) is str
    assert found["platform"] == platform.platform()
    assert found["PYTHONHASHSEED"] == "7"
    assert (found["accelerator"] is None) == (not torch.accelerator.is_available())
    monkeypatch.delenv("PYTHONHASHSEED")
    assert environment()["PYTHONHASHSEED"] is None


@pytest.mark.parametrize(
    ("hip", "module", "expected"),
    [
        (None, {"get_device_properties": lambda index: GPU}, ("13.0", "570.1", ["H200"] * 2)),
        ("6.4", {"get_device_properties": lambda index: GPU}, ("6.4", None, ["H200"] * 2)),
        ("6.4", {}, ("6.4", None, ["cuda"] * 2)),
    ],
)
def test_the_environment_names_gpus_and_their_driver(
    hip: str | None, module: dict[str, Any], expected: tuple[Any, ...], monkeypatch: Any
) -> None:
    """torch's properties of a GPU do not tell the driver; NVIDIA's tool does."""
    with monkeypatch.context() as patch:
        patch.setattr(determinism, "own_device", lambda: torch.device("cuda", 0))
        patch.setattr(torch, "get_device_module", lambda: SimpleNamespace(**module))
        patch.setattr(torch.accelerator, "device_count", lambda: 2)
        patch.setattr(torch.version, "hip", hip)
        patch.setattr(torch.version, "cuda", None if hip else "13.0")
        by_the_tool = lambda run: run("echo 570.1")[1]  # noqa: E731
        patch.setattr(collect_env, "get_nvidia_driver_version", by_the_tool)
        found = environment()["accelerator"]
    assert (found["type"], *(found[name] for name in ("runtime", "driver", "devices"))) == (
        "cuda",
        *expected,
    )


def threads_after(intra: int, inter: int) -> Any:
    torch.set_num_threads(intra)
    torch.set_num_interop_threads(inter)  # once in a process
    return environment()["threads"]


def test_the_environment_names_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    expected = {"intra_op": 3, "inter_op": 5, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": None}
    assert job(1, threads_after, 3, 5, group=False) == [expected]
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    assert environment()["threads"]["MKL_NUM_THREADS"] == "7"


def test_the_environment_names_what_nccl_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NCCL_")]:
        monkeypatch.delenv(name)
    assert environment()["NCCL"] == {}
    monkeypatch.setenv("NCCL_PROTO", "Simple")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert environment()["NCCL"] == {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


def precision_after(statements: list[str]) -> dict[str, str]:
    for statement in statements:
        exec(statement, {"torch": torch})
    found: dict[str, str] = environment()["float32"]
    return found


def float32_after(*statements: str) -> dict[str, str]:
    """In a process of its own: torch refuses to answer where settings were mixed."""
    return job(1, precision_after, list(statements), group=False)[0]


@pytest.mark.parametrize(
    ("statement", "changed"),
    [
        ("torch.set_float32_matmul_precision('high')", {"cuda_matmul": "tf32"}),
        (
            "torch.set_float32_matmul_precision('medium')",
            {"cuda_matmul": "tf32", "cpu_matmul": "bf16"},
        ),
        ("torch.backends.cuda.matmul.allow_tf32 = True", {"cuda_matmul": "tf32"}),
    ],
)
def test_the_environment_names_the_precision_of_products(
    statement: str, changed: dict[str, str]
) -> None:
    before, after = float32_after(), float32_after(statement)
    assert {name: after[name] for name in changed} == changed
    assert not changed.items() & before.items()


def test_the_environment_names_the_precision_of_cudnn() -> None:
    before = float32_after()
    after = float32_after("torch.backends.cudnn.allow_tf32 = False")
    assert [name for name in before if before[name] == "tf32"] == ["cudnn_conv", "cudnn_rnn"]
    assert "tf32" not in after.values()


def test_the_environment_names_the_precision_where_the_older_flags_raise() -> None:
    mixed = [
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    ]
    found = {"cuda_matmul": "tf32", "cudnn_rnn": "ieee", "cpu_matmul": "bf16"}
    assert float32_after(*mixed) == {**found, "cudnn_conv": "tf32"}
    with pytest.raises(JobError, match="mix"):
        float32_after(*mixed, "torch.get_float32_matmul_precision()")
