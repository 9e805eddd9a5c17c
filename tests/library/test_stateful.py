"""StatefulRNG in one process: without a process group, or as one rank of a fake one."""

import copy
import hashlib
import pickle
import platform
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from nemo_rng_dcp import (
    RNGStateError,
    RNGStateWarning,
    StatefulRNG,
    init_all_rng,
)
from nemo_rng_dcp.automodel import _get_rng_state
from nemo_rng_dcp.generators.numpy_random import NumPyAdapter
from nemo_rng_dcp.record import KEY
from nemo_rng_dcp.versions import version_text
from tests.support.records import State, altered, record_of, with_number, with_stream
from tests.support.streams import draw, states, unmoved, warned


def test_stateful_rng_is_stateful_and_goes_through_dcp_in_automodel() -> None:
    assert isinstance(StatefulRNG(1), Stateful)
    assert StatefulRNG.use_distributed_checkpointing is True


def test_construction_seeds_and_keeps_what_it_was_given() -> None:
    rng = StatefulRNG(np.int64(11), ranked=True)
    found = draw()
    init_all_rng(11)
    assert draw() == found
    assert (rng.seed, rng.ranked, type(rng.seed)) == (11, True, int)
    assert rng.loaded is None


def test_without_a_seed_the_streams_are_taken_as_they_are() -> None:
    init_all_rng(3)
    draw()
    with unmoved():
        rng = StatefulRNG(None)
    assert rng.seed is None
    state = rng.state_dict()
    assert record_of(state).seed is None
    expected = draw()
    # A job with a seed takes it too, and the other way round, without a word on seeds.
    assert warned(lambda: StatefulRNG(5).load_state_dict(state)) == []
    assert draw() == expected
    state = StatefulRNG(5).state_dict()
    expected = draw()
    assert warned(lambda: rng.load_state_dict(state)) == []
    assert draw() == expected


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_without_a_group_a_round_trip_is_exact(tmp_path: Path) -> None:
    rng = StatefulRNG(1, ranked=True)
    draw(5)
    state = {"rng": rng, "weight": torch.ones(3)}
    with unmoved():
        dcp.save(state, checkpoint_id=tmp_path)
    expected = draw(700)  # across several regenerations of every block
    dcp.load(state, checkpoint_id=tmp_path)
    assert draw(700) == expected


def test_gaussians_that_are_cached_come_back_bit_for_bit() -> None:
    rng = StatefulRNG(1)
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.randn(1)
    assert random.getstate()[2] is not None
    assert np.random.get_state(legacy=False)["has_gauss"] == 1
    state = rng.state_dict()
    expected = (random.gauss(0, 1), np.random.standard_normal(), torch.randn(1))
    draw(3)
    rng.load_state_dict(state)
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.randn(1)) == expected


def test_the_record_is_one_plain_tensor_that_says_what_it_holds() -> None:
    before = time.time_ns()
    rng = StatefulRNG(7, ranked=True, shared_generators={"order": random.Random(1)})
    state = rng.state_dict()
    assert list(state) == ["rng_streams"]
    assert (state[KEY].dtype, state[KEY].ndim) == (torch.int64, 1)
    record = record_of(state)
    assert (record.row, record.rows, record.world_size, record.resizes) == (0, 1, 1, 0)
    assert (record.seed, record.ranked, record.mesh) == (7, True, None)
    assert before <= record.taken_at <= time.time_ns()
    assert (record.library_version, record.version_skew()) == (1000, [])
    kinds = {name: (stream.kind, stream.shared) for name, stream in record.streams.items()}
    assert (
        kinds.items()
        >= {
            "python": ("python", False),
            "numpy": ("numpy", False),
            "torch": ("torch.cpu", False),
            "order": ("python", True),
        }.items()
    )


def test_state_dict_moves_nothing_and_is_a_copy() -> None:
    rng = StatefulRNG(1)
    with unmoved():
        first, second = record_of(rng.state_dict()), record_of(rng.state_dict())
        assert first.streams == second.streams
        assert first.taken_at < second.taken_at
        rng.state_dict()[KEY].zero_()


def test_rewind_goes_back_to_the_last_load_as_often_as_asked() -> None:
    rng = StatefulRNG(1)
    with unmoved(), pytest.raises(RuntimeError, match="nothing was loaded"):
        rng.rewind()
    state = rng.state_dict()
    expected = draw()
    rng.load_state_dict(state)
    state[KEY].zero_()  # what was loaded is not borrowed from the caller
    for _ in range(2):
        draw(2)
        rng.rewind()
        assert draw() == expected


def test_rewind_goes_back_to_a_load_before_the_process_group(
    fake_group: Callable[[int, int], None],
) -> None:
    rng = StatefulRNG(1)
    rng.load_state_dict(rng.state_dict())
    expected = draw()
    fake_group(1, 2)
    rng.state_dict()
    rng.rewind()
    assert draw() == expected


@pytest.mark.parametrize(("rank", "world_size"), [(0, 2), (3, 4), (4095, 4096)])
def test_in_a_group_a_table_is_one_record_per_rank(
    rank: int, world_size: int, fake_group: Callable[[int, int], None]
) -> None:
    fake_group(rank, world_size)
    rng = StatefulRNG(1, ranked=True)
    state = rng.state_dict()
    table = state[KEY]
    assert isinstance(table, DTensor)
    assert table.placements == (Shard(0),)
    assert table.shape == (world_size * table.to_local().numel(),)
    record = record_of(state)
    assert (record.row, record.rows, record.world_size) == (rank, world_size, world_size)
    expected = draw()
    rng.load_state_dict(state)
    assert draw() == expected


def test_a_stream_seeded_for_another_rank_is_refused(
    fake_group: Callable[[int, int], None],
) -> None:
    early = StatefulRNG(1, ranked=True)
    fake_group(2, 4)
    with unmoved(), pytest.raises(RuntimeError, match=r"seeded for row 0.*after init_process"):
        early.state_dict()
    assert StatefulRNG(1).state_dict()  # with ranked=False the rank plays no part in the seed


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_a_device_is_refused_where_there_is_none(device: Any) -> None:
    message = f"^device is '{device}', but this process has no accelerator: expected .* 'cpu'"
    with unmoved(), pytest.raises(ValueError, match=message):
        StatefulRNG(1, device=device)


def test_what_was_not_seeded_may_be_constructed_before_the_group(
    fake_group: Callable[[int, int], None],
) -> None:
    own = random.Random(1)
    early = StatefulRNG(1, ranked=True, generators={"own": own}, global_generators=False)
    fake_group(2, 4)
    assert record_of(early.state_dict()).row == 2


def test_a_process_that_lost_its_group_does_not_store_itself_as_rank_0(
    fake_group: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    rng = StatefulRNG(1, ranked=True)
    with unmoved(), pytest.raises(RuntimeError, match="call init_process_group"):
        rng.state_dict()
    fake_group(2, 4)
    assert rng.state_dict()


def test_another_bit_generator_of_numpy_is_refused_by_name() -> None:
    rng = StatefulRNG(1)
    state = rng.state_dict()
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        python, torch_state = random.getstate(), torch.get_rng_state()
        message = r"^numpy: .*PCG64.*: np\.random\.set_bit_generator\(np\.random\.MT19937\(\)\)$"
        for use in (
            rng.state_dict,
            lambda: rng.load_state_dict(state),
            _get_rng_state,
        ):
            with pytest.raises(RNGStateError, match=message):
                use()
        assert random.getstate() == python
        assert torch.equal(torch.get_rng_state(), torch_state)
    finally:
        np.random.set_bit_generator(before)


# Bad records. Each has a check word that fits where it could, so that the values are looked at.


def flipped(state: State, index: int) -> State:
    table = state[KEY].clone()
    table[index] ^= 1 << 20
    return {KEY: table}


def negative_length(state: State) -> State:
    table = state[KEY].clone()
    table[2], table[4] = -1, -len(table)  # whose product is the length of the whole
    return {KEY: table}


def shorter_than_a_head(state: State) -> State:
    words = state[KEY][:12].numpy().tobytes()
    words += hashlib.blake2b(words, digest_size=8).digest()  # which fits
    return {KEY: torch.frombuffer(bytearray(words), dtype=torch.int64)}


BAD: dict[str, tuple[str, Callable[[State], Any]]] = {
    "missing": (r"no such entry, only .*import`", lambda s: {"numpy": s[KEY]}),
    "around it": (r"only \['rng'\].*such as state\['rng'\]", lambda s: {"rng": s}),
    "no tensor": ("expected a tensor, found list", lambda s: {KEY: [1, 2]}),
    "dtype": ("found torch.int32", lambda s: {KEY: s[KEY].to(torch.int32)}),
    "float": ("found torch.float64", lambda s: {KEY: s[KEY].double()}),
    "dimensions": ("expected a dense torch.int64", lambda s: {KEY: s[KEY].unsqueeze(0)}),
    "two in one": ("expected a dense torch.int64", lambda s: {KEY: s[KEY].repeat(2, 1)}),
    "meta": ("on meta", lambda s: {KEY: s[KEY].to("meta")}),
    "sparse": ("expected a dense torch.int64", lambda s: {KEY: s[KEY].to_sparse()}),
    "empty": ("expected a dense torch.int64", lambda s: {KEY: s[KEY][:0]}),
    "short": ("does not fit its check word", lambda s: {KEY: s[KEY][:-1]}),
    "two numbers": ("has layout version 2", lambda s: {KEY: torch.tensor([2, 3004005])}),
    "negative length": ("does not fit its check word", negative_length),
    "head alone": ("does not fit its check word", lambda s: {KEY: s[KEY][:3]}),
    "length of four numbers": (
        "does not fit its check word",
        lambda s: {KEY: torch.tensor([1, 0, 4, 0] * 2)},
    ),
    "shorter than a head": ("does not fit its check word", shorter_than_a_head),
    "zeros": ("has layout version 0", lambda s: {KEY: torch.zeros_like(s[KEY])}),
    "bit in the head": ("row 0 of 1, does not fit", lambda s: flipped(s, 6)),
    "bit in a state": ("row 0 of 1, does not fit", lambda s: flipped(s, 700)),
    "bit in the check word": ("row 0 of 1, does not fit", lambda s: flipped(s, -1)),
    "another row": ("was given row 1 of 2, expected row 0", lambda s: altered(s, row=1, rows=2)),
    "no row": ("row 0 of 0", lambda s: altered(s, rows=0)),
    "row outside": ("row 3 of 2", lambda s: altered(s, row=3, rows=2)),
    "another kind": (
        "^python: the checkpoint holds the state of a numpy generator, and this job's is python",
        lambda s: with_stream(s, "python", record_of(s).streams["numpy"].state, kind="numpy"),
    ),
    "short state": ("^torch: the state has 5048 ", lambda s: with_stream(s, "torch", bytes(5048))),
    "long state": ("^python: the state has 5024 ", lambda s: with_stream(s, "python", bytes(5024))),
    "position": ("^python: the position is 625", lambda s: with_number(s, "python", 624, 625)),
    "has-gauss": ("^numpy: the has-gauss flag is 7", lambda s: with_number(s, "numpy", 625, 7)),
    "torch left": ("^torch: torch refuses the state", lambda s: with_number(s, "torch", 2, 0)),
    "torch word": ("^torch: torch takes the state only", lambda s: with_number(s, "torch", 19, -1)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_explained_and_nothing_moves(case: str) -> None:
    rng = StatefulRNG(1)
    state = rng.state_dict()
    draw(2)
    message, damage = BAD[case]
    bad = damage(state)
    with unmoved(), pytest.raises(RNGStateError, match=message):
        rng.load_state_dict(bad)
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        rng.rewind()


def test_a_newer_layout_names_the_version_that_reads_it() -> None:
    rng = StatefulRNG(1)
    newer = torch.tensor([2, 3004005, 77])
    with unmoved(), pytest.raises(RNGStateError, match=r"layout version 2.*nemo_rng_dcp 3\.4\.5"):
        rng.load_state_dict({KEY: newer})


def test_an_exact_restore_does_not_warn() -> None:
    rng = StatefulRNG(1, ranked=True, generators={"noise": torch.Generator()})
    state = rng.state_dict()
    draw()
    assert warned(lambda: rng.load_state_dict(state)) == []


@pytest.mark.parametrize("direction", [-1, 1])
def test_other_versions_warn_once_and_name_both(direction: int) -> None:
    rng = StatefulRNG(1)
    state = rng.state_dict()
    record = record_of(state)
    others = altered(
        state,
        python_version=record.python_version + direction * 1000,
        torch_version=record.torch_version + direction * 1000,
    )
    [text] = warned(lambda: rng.load_state_dict(others))
    there = version_text(record.python_version + direction * 1000)
    assert text.startswith("RNG state: ")
    assert f"saved with python {there}, now {platform.python_version()}; torch " in text
    assert "numpy" not in text


def test_where_warnings_are_errors_a_load_that_warns_moves_nothing() -> None:
    rng = StatefulRNG(1)
    state = altered(rng.state_dict(), python_version=2007018)
    draw()
    with warnings.catch_warnings(), unmoved():
        warnings.simplefilter("error", RNGStateWarning)
        with pytest.raises(RNGStateWarning, match="saved with"):
            rng.load_state_dict(state)
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        rng.rewind()


def test_the_ranks_of_row_0_warn(fake_group: Callable[[int, int], None]) -> None:
    for rank, expected in ((0, 1), (1, 1), (2, 0), (3, 0)):
        fake_group(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        rng = StatefulRNG(1, mesh=mesh["dp"])  # ranks 0 and 1 share row 0
        state = altered(rng.state_dict(), python_version=2007018)
        assert len(warned(lambda: rng.load_state_dict(state))) == expected  # noqa: B023


def test_what_only_one_side_has_is_named_and_the_rest_is_restored() -> None:
    saved = StatefulRNG(1, generators={"old": random.Random(5)})
    state = saved.state_dict()
    expected = draw()
    new = random.Random(6)
    rng = StatefulRNG(2, generators={"new": new})
    untouched = new.getstate()
    [text] = warned(lambda: rng.load_state_dict(state))
    assert "the checkpoint has no new: the stream stays as it is" in text
    assert "the checkpoint has old, which this job does not have: ignored" in text
    assert draw() == expected
    assert new.getstate() == untouched
    new.random()
    rng.rewind()
    assert draw() == expected
    assert new.getstate() == untouched, "rewind() goes back to the moment of the load"


def test_the_stream_of_an_accelerator_that_is_not_here_is_ignored() -> None:
    rng = StatefulRNG(1)
    state = with_stream(rng.state_dict(), "cuda", bytes(16), kind="torch.cuda")
    draw()
    assert "the checkpoint has cuda, which this job does not have: ignored" in warned(
        lambda: rng.load_state_dict(state)
    )[0].replace("cuda, mps", "cuda")


def test_a_state_of_ones_own_is_restored_once_streams_have_moved() -> None:
    rng = StatefulRNG(1)
    state = rng.state_dict()
    expected = draw()
    assert warned(lambda: rng.load_state_dict(state)) == []
    assert draw() == expected


def test_all_rows_in_one_plain_tensor_are_taken_by_the_rules_of_the_planner() -> None:
    rng = StatefulRNG(1, ranked=True)
    rows = []
    for seed in range(3):
        init_all_rng(seed)
        rows.append(altered(rng.state_dict(), row=seed, rows=3)[KEY])
    init_all_rng(0)
    expected = draw()
    [text] = warned(lambda: rng.load_state_dict({KEY: torch.cat(rows)}))
    assert "3 rows were saved and 1 are loaded: rows 1 to 2 are dropped" in text
    assert draw() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mesh": "dp"}, "mesh is 'dp', expected a DeviceMesh"),
        ({"generators": [torch.Generator()]}, "generators is a list"),
        ({"generators": 0}, "generators is a int"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with unmoved(), pytest.raises(TypeError, match=message):
        StatefulRNG(1, **arguments)


@pytest.mark.parametrize("state", [None, [1], 5])
def test_what_is_no_state_at_all_is_refused(state: Any) -> None:
    rng = StatefulRNG(1)
    message = f"the state is a {type(state).__name__}, expected a mapping or an RNGState"
    with unmoved(), pytest.raises(TypeError, match=message):
        rng.load_state_dict(state)


def test_a_write_that_fails_halfway_puts_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = StatefulRNG(1)
    state = rng.state_dict()
    draw()
    real, calls = NumPyAdapter.set, 0

    def failing(adapter: NumPyAdapter, to: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("halfway")
        real(adapter, to)

    monkeypatch.setattr(NumPyAdapter, "set", failing)
    with unmoved(), pytest.raises(RNGStateError, match=r"^numpy: .*OSError: halfway"):
        rng.load_state_dict(state)
    assert calls > 1


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps])
def test_stateful_rng_cannot_be_copied_or_pickled(
    copy_of: Callable[[StatefulRNG], object],
) -> None:
    rng = StatefulRNG(1)
    with (
        unmoved(),
        pytest.raises(TypeError, match=r"deep-copied: keep it outside.*save_state_dict, pass"),
    ):
        copy_of(rng)


def test_threads_take_and_restore_whole_states() -> None:
    rng = StatefulRNG(0)
    saved = []
    for seed in range(3):
        init_all_rng(seed)
        saved.append((rng.state_dict(), states()))
    known = [state for _, state in saved]
    mixed = []

    def load_and_look(which: int) -> None:
        for _ in range(80):
            rng.load_state_dict(saved[which][0])
            seen = states()
            if seen not in known:
                mixed.append(which)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=load_and_look, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not mixed
