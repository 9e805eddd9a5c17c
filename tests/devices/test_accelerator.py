"""What an accelerator's streams do in one process.

The tests run where torch has an accelerator: on a GPU where there is one, and everywhere on the
simulated device, through ``test_simulated_device.py``.
"""

import os
import random
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.checkpoint import checkpoint

from nemo_rng_dcp import (
    RNGLoadPlanner,
    RNGStateError,
    RNGStateWarning,
    ScopedRNG,
    StatefulRNG,
    init_all_rng,
    seed_worker,
    tracker_generators,
)
from nemo_rng_dcp.automodel import _get_rng_state, _restore_rng_state
from nemo_rng_dcp.determinism import environment
from nemo_rng_dcp.generators import DeviceWatch, GeneratorSet, device_in_use, own_device
from nemo_rng_dcp.generators.device import default_generator
from nemo_rng_dcp.generators.torch_random import AcceleratorAdapter
from nemo_rng_dcp.record import KEY
from tests.library.test_generators import Counter
from tests.support.devices import AVAILABLE, COUNT, MODULE, TYPE
from tests.support.jobs import job
from tests.support.records import record_of
from tests.support.streams import draw, unmoved, warned
from tests.support.trackers import Tracker

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs an accelerator (see test_simulated_device.py)"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
two_devices = pytest.mark.skipif(COUNT < 2, reason="needs two devices")


@pytest.fixture(autouse=True, scope="module")
def _device_in_use() -> None:
    MODULE.init()  # before conftest's scope, which would warn


@pytest.fixture(autouse=True)
def _first_device_is_current() -> None:
    MODULE.set_device(0)


def draw_on(index: int) -> list[float]:
    return torch.randn(4, device=f"{TYPE}:{index}").tolist()


def in_a_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    [result] = results
    return result


def test_the_seed_reaches_every_device() -> None:
    init_all_rng(5)
    for index in range(COUNT):
        generator = torch.Generator(f"{TYPE}:{index}").manual_seed(5)
        expected = torch.randn(4, device=generator.device, generator=generator)
        assert draw_on(index) == expected.tolist()


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    rng = StatefulRNG(1, ranked=True)
    draw_on(0)
    with unmoved():
        dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = draw_on(0), draw()
    dcp.load({"rng": rng}, checkpoint_id=tmp_path)
    assert (draw_on(0), draw()) == expected


@pytest.mark.parametrize("preserve", [True, False])
def test_a_recomputation_draws_on_the_device_what_the_forward_drew(preserve: bool) -> None:
    outcomes = []
    for checkpointed in (False, True):
        own = torch.Generator(f"{TYPE}:0").manual_seed(2)
        rng = StatefulRNG(1, generators={"own": own})
        weight = torch.ones(4, device=f"{TYPE}:0", requires_grad=True)

        def block(
            x: torch.Tensor, own: torch.Generator = own, weight: torch.Tensor = weight
        ) -> torch.Tensor:
            x = x * torch.randn(4, device=weight.device) * weight
            return x * torch.randn(4, device=weight.device, generator=own) * random.random()

        x = torch.ones(4, device=weight.device)
        options = {"context_fn": rng.recompute, "preserve_rng_state": preserve}
        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=False, **options) if checkpointed else block(x)
        x.sum().backward()
        assert weight.grad is not None
        outcomes.append((weight.grad.tolist(), rng.fingerprint()))
    assert outcomes[0] == outcomes[1]


def test_a_rank_that_a_process_group_numbers_anew_still_has_its_stream(
    fake_group: Callable[[int, int], None],
) -> None:
    rng = StatefulRNG(1)
    rng.load_state_dict(rng.state_dict())
    fake_group(1, 2)
    assert warned(rng.state_dict) == []


def test_the_record_is_on_the_cpu() -> None:
    assert StatefulRNG(1).state_dict()[KEY].device.type == "cpu"


def test_a_trackers_states_and_its_graph_safe_generators_come_back(tmp_path: Path) -> None:
    """What Megatron-Core and Transformer Engine keep for a device, drawn from as they do."""
    graph_safe = torch.Generator(f"{TYPE}:0").manual_seed(3)
    tracker = Tracker(model_parallel_rng=MODULE.get_rng_state(0), expert_parallel_rng=graph_safe)

    def drawn() -> list[list[float]]:
        outside = MODULE.get_rng_state(0)
        MODULE.set_rng_state(tracker.states["model-parallel-rng"], 0)
        forked = draw_on(0)
        tracker.states["model-parallel-rng"] = MODULE.get_rng_state(0)
        MODULE.set_rng_state(outside, 0)
        kept = torch.randn(4, device=f"{TYPE}:0", generator=tracker.states["expert-parallel-rng"])
        return [forked, kept.tolist(), draw_on(0)]

    rng = StatefulRNG(None, generators=tracker_generators(tracker))
    kinds = {stream.kind for stream in record_of(rng.state_dict()).streams.values()}
    assert f"torch.{TYPE}" in kinds
    [of_cpu] = tracker_generators(Tracker(data_rng=torch.get_rng_state())).values()
    assert of_cpu.kind == "torch.cpu"
    drawn()
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = drawn()
    dcp.load({"rng": rng}, checkpoint_id=tmp_path)
    assert drawn() == expected
    assert tracker.states["expert-parallel-rng"] is graph_safe


@two_devices
def test_another_thread_saves_and_loads_the_same_device(tmp_path: Path) -> None:
    """The current device is per thread, and a new thread's is the first one."""
    MODULE.set_device(1)
    rng = StatefulRNG(1)
    draw_on(1)
    in_a_thread(lambda: dcp.save({"rng": rng}, checkpoint_id=tmp_path))
    expected = draw_on(1)
    other = draw_on(0)
    init_all_rng(2)
    draw_on(0)
    following = torch.Generator(f"{TYPE}:0")
    following.set_state(MODULE.get_rng_state(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RNGStateWarning)
        in_a_thread(lambda: dcp.load({"rng": rng}, checkpoint_id=tmp_path))
    assert draw_on(1) == expected
    assert draw_on(0) == torch.randn(4, device=f"{TYPE}:0", generator=following).tolist() != other


@two_devices
def test_a_device_chosen_later_is_left_alone_and_named(tmp_path: Path) -> None:
    rng = StatefulRNG(1)
    state = rng.state_dict()
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = draw_on(0)
    MODULE.set_device(1)
    draw_on(1)
    other = MODULE.get_rng_state(1)
    both = rf"stream of {TYPE}:0, but {TYPE}:1 is"
    with pytest.warns(RNGStateWarning, match=both):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path)
    assert draw_on(0) == expected
    rng.rewind()
    assert draw_on(0) == expected
    with pytest.warns(RNGStateWarning, match=both) as caught:
        rng.state_dict()
    assert caught[0].filename == __file__
    for loaded in (state, _get_rng_state()):
        with pytest.warns(RNGStateWarning, match=both) as caught:
            rng.load_state_dict(loaded)
        assert caught[0].filename == __file__
    assert torch.equal(MODULE.get_rng_state(1), other)


@two_devices
def test_a_device_can_be_named() -> None:
    for device in (1, f"{TYPE}:1", torch.device(TYPE, 1)):
        rng = StatefulRNG(1, device=device)
        assert rng.device == torch.device(TYPE, 1)
    assert StatefulRNG(1, device=TYPE).device == torch.device(TYPE, 0)
    MODULE.set_device(1)
    draw_on(1)
    state = rng.state_dict()
    expected = draw_on(1)
    rng.load_state_dict(state)
    assert draw_on(1) == expected


@two_devices
def test_a_fork_seeds_the_ranks_own_device_and_no_other() -> None:
    MODULE.set_device(0)
    following = MODULE.get_rng_state(0)
    AcceleratorAdapter(torch.device(TYPE, 1)).seed(2**63 + 5)
    generator = torch.Generator(f"{TYPE}:1").manual_seed(2**63 + 5)
    assert draw_on(1) == torch.randn(4, device=generator.device, generator=generator).tolist()
    assert torch.equal(MODULE.get_rng_state(0), following)


def test_a_rank_on_the_cpu_stores_no_devices_stream() -> None:
    rng = StatefulRNG(1, device="cpu")
    assert rng.device is None
    assert list(rng.fingerprint()) == ["python", "numpy", "torch"]
    assert warned(rng.state_dict) == []


def test_the_only_device_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for device in (0, TYPE, f"{TYPE}:0"):
        assert own_device(device) == torch.device(TYPE, 0)
    message = f"^device is '{TYPE}:1', but this process has 1 of type {TYPE}: expected one of its"
    with pytest.raises(ValueError, match=message):
        own_device(f"{TYPE}:1")


@pytest.mark.parametrize("device", [99, f"{TYPE}:99", "meta", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device: Any) -> None:
    with unmoved(), pytest.raises(ValueError, match=r"^device is .*(expected|names no device)"):
        StatefulRNG(1, device=device)


def test_a_checkpoint_without_the_device_warns(tmp_path: Path) -> None:
    dcp.save({"rng": StatefulRNG(1, device="cpu")}, checkpoint_id=tmp_path)
    expected = draw()
    rng = StatefulRNG(2)
    draw_on(0)
    device = MODULE.get_rng_state(0)
    with pytest.warns(RNGStateWarning, match=f"has no {TYPE}: the stream stays as it is"):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner())
    assert draw() == expected
    assert torch.equal(MODULE.get_rng_state(0), device)


def test_a_checkpoint_with_the_device_warns_on_the_cpu(tmp_path: Path) -> None:
    dcp.save({"rng": StatefulRNG(1)}, checkpoint_id=tmp_path)
    expected = draw()
    rng = StatefulRNG(2, device="cpu")
    with pytest.warns(RNGStateWarning, match=f"has {TYPE}, which this job does not have: ignored"):
        dcp.load({"rng": rng}, checkpoint_id=tmp_path, planner=RNGLoadPlanner())
    assert draw() == expected


@pytest.mark.parametrize("index", range(COUNT))
def test_a_devices_own_generator_is_refused(index: int) -> None:
    own = {"own": MODULE.default_generators[index]}
    for argument in ("generators", "shared_generators"):
        with unmoved(), pytest.raises(ValueError, match=f"^own is the same generator as {TYPE}:"):
            StatefulRNG(1, device=index, **{argument: own})


@two_devices
def test_a_device_that_hides_its_generator_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Apple's mps does."""
    monkeypatch.delattr(MODULE, "default_generators")
    rng = StatefulRNG(1, generators={"own": torch.Generator(TYPE)}, device=TYPE)
    assert set(record_of(rng.state_dict()).streams) == {"python", "numpy", "torch", TYPE, "own"}


def test_an_accelerator_that_has_one_device_and_tells_little_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Apple's mps knows no current device, is in use from the start, and its module takes none."""
    with monkeypatch.context() as patch:
        for name in ("current_device", "is_initialized", "_is_in_bad_fork", "default_generators"):
            patch.delattr(MODULE, name)
        assert device_in_use() == own_device() == own_device(TYPE) == torch.device(TYPE)
        assert default_generator(torch.device(TYPE)) is None
    get, put = MODULE.get_rng_state, MODULE.set_rng_state
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "get_rng_state", lambda: get(0))
        patch.setattr(MODULE, "set_rng_state", lambda state: put(state, 0))
        adapter = AcceleratorAdapter(torch.device(TYPE))
        state = adapter.get()
        draw_on(0)
        adapter.set(adapter.unpack(adapter.pack(state)))
    assert torch.equal(get(0), state)


@two_devices
def test_generators_on_another_device_come_back(tmp_path: Path) -> None:
    own = torch.Generator(f"{TYPE}:1").manual_seed(3)
    generators = {"own": own, "of_device_1": MODULE.default_generators[1]}
    rng = StatefulRNG(1, generators=generators)

    def numbers() -> list[float]:
        return [*torch.randn(2, device=own.device, generator=own).tolist(), *draw_on(1)]

    numbers()
    dcp.save({"rng": rng}, checkpoint_id=tmp_path)
    expected = numbers()
    numbers()
    dcp.load({"rng": rng}, checkpoint_id=tmp_path)
    assert numbers() == expected


def test_a_state_that_the_device_refuses_is_named_and_nothing_moves() -> None:
    rng = StatefulRNG(1)
    state = _get_rng_state()
    state.cuda_rng_state = [torch.zeros(7, dtype=torch.uint8)]
    with unmoved(), pytest.raises(RNGStateError, match=f"^{TYPE}: "):
        rng.load_state_dict(state)


def test_a_device_that_fails_is_named_and_everything_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = StatefulRNG(1)
    state = rng.state_dict()
    draw()
    draw_on(0)
    set_rng_state, calls = MODULE.set_rng_state, []

    def failing_once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("device-side assert")
        set_rng_state(*args)

    monkeypatch.setattr(MODULE, "set_rng_state", failing_once)
    with unmoved(), pytest.raises(RNGStateError, match=f"^{TYPE}: .*device-side assert") as error:
        rng.load_state_dict(state)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_a_device_that_cannot_be_put_back_is_named_and_the_others_are_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*args: Any) -> None:
        raise RuntimeError("device-side assert")

    before = torch.get_rng_state()
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            RNGStateError, match=rf"^{TYPE}: .*\(RuntimeError: device-side as.*\. Its"
        ) as error,
        ScopedRNG(1),
    ):
        patch.setattr(MODULE, "set_rng_state", failing)
    assert "set_bit_generator" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_rng_state_holds_the_current_device_alone_and_takes_all() -> None:
    init_all_rng(3)
    state = _get_rng_state()
    assert len(state.cuda_rng_state) == 1
    expected = draw_on(0)
    _restore_rng_state(state)
    assert draw_on(0) == expected
    state.cuda_rng_state = MODULE.get_rng_state_all()
    expected = draw_on(0)
    _restore_rng_state(state)
    assert draw_on(0) == expected
    state.cuda_rng_state *= 5
    with unmoved(), pytest.raises(RNGStateError, match="Keep the one of this rank's device"):
        _restore_rng_state(state)


def test_an_rng_state_of_a_machine_without_the_device_warns() -> None:
    state = _get_rng_state()
    state.cuda_rng_state = []
    expected = draw()
    draw_on(0)
    device = MODULE.get_rng_state(0)
    for restore in (StatefulRNG(1).load_state_dict, _restore_rng_state):
        MODULE.set_rng_state(device, 0)
        with pytest.warns(RNGStateWarning, match=f"no accelerator's stream: that of {TYPE}:0"):
            restore(state)
        assert draw() == expected
        assert torch.equal(MODULE.get_rng_state(0), device)


def test_an_rng_state_with_a_device_warns_on_the_cpu() -> None:
    state = _get_rng_state()
    expected = draw()
    rng = StatefulRNG(1, device="cpu")
    with pytest.warns(RNGStateWarning, match="stream, which this rank does not have"):
        rng.load_state_dict(state)
    assert draw() == expected


def test_a_scope_covers_the_device() -> None:
    init_all_rng(7)
    expected = draw_on(0)
    with unmoved(), ScopedRNG(7):
        assert draw_on(0) == expected


@two_devices
def test_a_scope_covers_the_device_that_is_current_on_entry_and_no_other() -> None:
    init_all_rng(7)
    expected = draw_on(0)
    init_all_rng(3)
    on_1 = draw_on(1), draw_on(1)
    init_all_rng(3)
    with unmoved(), ScopedRNG(7):
        MODULE.set_device(1)
        assert draw_on(1) == on_1[0]
        assert draw_on(0) == expected
        MODULE.set_device(0)
    assert draw_on(1) == on_1[1]
    with unmoved():
        with ScopedRNG(7):
            draw_on(0)
            MODULE.set_device(1)
        MODULE.set_device(0)


def test_scopes_that_end_in_another_order_give_the_device_its_stream_back() -> None:
    init_all_rng(1)
    expected = draw_on(0)
    init_all_rng(1)
    outer, inner = ScopedRNG(7).__enter__(), ScopedRNG(8).__enter__()
    assert len(warned(lambda: outer.__exit__(None, None, None))) == 1
    draw_on(0)
    inner.__exit__(None, None, None)
    assert draw_on(0) == expected


@two_devices
def test_scopes_of_two_devices_that_end_in_another_order_give_back_each_its_own() -> None:
    init_all_rng(1)
    expected = draw_on(0), draw_on(1)
    init_all_rng(1)
    outer = ScopedRNG(7).__enter__()
    MODULE.set_device(1)
    inner = ScopedRNG(8).__enter__()
    draw_on(0)
    assert len(warned(lambda: outer.__exit__(None, None, None))) == 1
    assert draw_on(0) == expected[0]
    inner.__exit__(None, None, None)
    assert draw_on(1) == expected[1]


@two_devices
def test_inside_a_scope_of_another_device_the_jobs_own_goes_on() -> None:
    rng = StatefulRNG(1)
    before = rng.fingerprint()
    with ScopedRNG(7):
        draw_on(0)
        assert rng.fingerprint() == before
    MODULE.set_device(1)
    with ScopedRNG(7):
        draw()
        draw_on(1)
        assert rng.fingerprint() == before
        draw_on(0)
        after = rng.fingerprint()
    assert [name for name in before if before[name] != after[name]] == [TYPE]


class Asking(Counter):
    """While it takes a state, it asks for the streams of another job, as a handler may."""

    def __init__(self, other: StatefulRNG) -> None:
        super().__init__(7)
        self.other, self.found = other, list[dict[str, str]]()

    def set(self, state: int) -> None:
        self.found.append(self.other.fingerprint())
        super().set(state)


@two_devices
def test_inside_a_load_another_device_has_its_own_stream() -> None:
    other = StatefulRNG(None, device=1)
    asking = Asking(other)
    rng = StatefulRNG(1, device=0, generators={"asking": asking})
    state = rng.state_dict()
    draw()
    draw_on(0)
    for _ in range(2):
        draw_on(1)
    expected = other.fingerprint()
    rng.load_state_dict(state)
    assert asking.found == [expected]


def test_a_stream_that_other_code_replaced_is_said_but_not_before_a_load() -> None:
    generators = GeneratorSet(torch.device(TYPE, 0))

    def states(cpu: int, device: int) -> dict[int, dict[str, Any]]:
        generators.restore({}, {"torch": cpu, TYPE: device})
        return {0: generators.take()}

    def said(cpu: int, device: int, speaks: bool = True) -> list[str]:
        now = states(cpu, device)
        return [
            re.findall(r"another stream \((.*?)\)", message)[0]
            for message in warned(lambda: watch.warn_if_reseeded(now, speaks=speaks))
        ]

    watch = DeviceWatch(torch.device(TYPE, 0), states(1, 1))
    assert said(1, 2) == []
    assert said(1, 2) == ["seed 2, after 1"]
    assert said(1, 3, speaks=False) == said(1, 3) == []
    assert said(5, 5) == [], "torch.manual_seed"
    watch.note_seeds(states(6, 7))
    assert said(6, 8) == ["seed 8, after 7"]


def in_a_forked_child(function: Callable[[], str]) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, function().encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


def test_a_scope_can_be_left_in_a_forked_child() -> None:
    before = torch.get_rng_state()

    def leave() -> str:
        scope.__exit__(None, None, None)
        return str(torch.equal(torch.get_rng_state(), before))

    with ScopedRNG(1) as scope:
        assert in_a_forked_child(leave) == "True"


def test_a_forked_child_has_no_device() -> None:
    names = in_a_forked_child(lambda: " ".join(StatefulRNG(1).fingerprint()))
    assert names == "python numpy torch"


class Scoped(torch.utils.data.Dataset[bool]):
    """Samples with a scope each; says whether the process has initialised the accelerator."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        with ScopedRNG(index):
            torch.rand(1)
        return bool(MODULE.is_initialized())


def workers_that_initialise_it(context: str) -> list[bool]:
    loader = torch.utils.data.DataLoader(
        Scoped(), num_workers=1, multiprocessing_context=context, worker_init_fn=seed_worker
    )
    return [bool(batch.any()) for batch in loader]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_of_a_process_that_uses_the_device_does_not(context: str) -> None:
    assert workers_that_initialise_it(context) == [False, False]


def unused_device() -> list[bool]:
    """In a process that has not used its accelerator: what initialises it."""
    initialised = [bool(MODULE.is_initialized())]
    with ScopedRNG(1):
        torch.rand(1)
    seed_worker(0)
    init_all_rng(1)
    initialised += [*workers_that_initialise_it("fork"), bool(MODULE.is_initialized())]
    StatefulRNG(1)
    return [*initialised, bool(MODULE.is_initialized())]


def test_a_scope_and_seed_worker_never_initialise_the_device() -> None:
    assert job(1, unused_device, group=False) == [[False, False, False, False, True]]


def first_used_in_a_scope() -> tuple[str, str]:
    with pytest.warns(RNGStateWarning) as caught, ScopedRNG(1):
        draw_on(0)
    with warnings.catch_warnings(), unmoved():
        warnings.simplefilter("error")
        with ScopedRNG(1):
            draw_on(0)
    return str(caught[0].message), caught[0].filename


def test_a_scope_warns_of_a_device_that_is_first_used_inside() -> None:
    [(message, file)] = job(1, first_used_in_a_scope, group=False)
    assert file == __file__
    assert re.match(rf"{TYPE} was first used inside a ScopedRNG", message)


def test_seed_worker_leaves_the_device_the_seed_that_torch_gave_it() -> None:
    torch.manual_seed(2**40 + 5)
    expected = draw_on(0)
    torch.manual_seed(2**40 + 5)
    seed_worker(0)
    assert draw_on(0) == expected


def test_the_environment_names_the_devices() -> None:
    accelerator = environment()["accelerator"]
    assert accelerator.keys() == {"type", "runtime", "driver", "cudnn", "devices"}
    assert accelerator["type"] == TYPE
    assert len(accelerator["devices"]) == COUNT
    if TYPE == "simacc":
        assert accelerator["devices"] == [f"Simulated {index}" for index in range(COUNT)]
        assert accelerator["driver"] == "1.2"
    assert environment()["float32"].keys() == {
        "cuda_matmul",
        "cudnn_conv",
        "cudnn_rnn",
        "cpu_matmul",
    }
