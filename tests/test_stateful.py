"""StatefulRNG in one process: without a process group, or as one rank of a fake one."""

import copy
import dataclasses
import pickle
import random
import sys
import threading
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

from nemo_rng_dcp import RNGState, RNGStateError, StatefulRNG, init_all_rng, snapshot
from nemo_rng_dcp.generators import global_generators
from nemo_rng_dcp.origin import Origin
from nemo_rng_dcp.rows import digest
from nemo_rng_dcp.snapshot import _get_rng_state, _restore_rng_state
from streams import draw, states, unmoved
from tables import sealed

TABLES = ["origin", "python", "numpy", "torch"]


def test_it_is_stateful_and_goes_through_dcp_in_automodel() -> None:
    assert isinstance(StatefulRNG(1), Stateful)
    assert StatefulRNG.use_distributed_checkpointing is True


def test_construction_seeds_and_keeps_what_it_was_given() -> None:
    rng = StatefulRNG(np.int64(11), ranked=True)
    found = draw()
    init_all_rng(11)
    assert draw() == found
    assert (rng.seed, rng.ranked, type(rng.seed)) == (11, True, int)


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
    tables = rng.state_dict()
    expected = (random.gauss(0, 1), np.random.standard_normal(), torch.randn(1))
    draw(3)
    rng.load_state_dict(tables)
    assert (random.gauss(0, 1), np.random.standard_normal(), torch.randn(1)) == expected


def test_the_tables_are_plain_tensors_of_the_documented_shapes() -> None:
    tables = StatefulRNG(1).state_dict()
    shapes = {name: tuple(table.shape) for name, table in tables.items() if name in TABLES}
    assert shapes == {
        "origin": (1, 13),
        "python": (1, 628),
        "numpy": (1, 628),
        "torch": (1, 633),
    }
    assert {table.dtype for table in tables.values()} == {torch.int64}


def test_state_dict_moves_nothing_and_is_a_copy() -> None:
    rng = StatefulRNG(1)
    with unmoved():
        tables = rng.state_dict()
        again = rng.state_dict()
    for name, table in tables.items():
        assert torch.equal(table, again[name])
        with unmoved():
            table.zero_()


def test_rewind_goes_back_to_the_last_load_as_often_as_asked() -> None:
    rng = StatefulRNG(1)
    with unmoved(), pytest.raises(RuntimeError, match="nothing was loaded"):
        rng.rewind()
    tables = rng.state_dict()
    expected = draw()
    rng.load_state_dict(tables)
    for table in tables.values():
        table.zero_()  # what was loaded is not borrowed from the caller
    for _ in range(2):
        draw(2)
        rng.rewind()
        assert draw() == expected


@pytest.mark.parametrize(("rank", "world_size"), [(0, 2), (3, 4), (4095, 4096)])
def test_in_a_group_a_table_is_one_row_per_rank(
    rank: int, world_size: int, fake_group: Callable[[int, int], None]
) -> None:
    fake_group(rank, world_size)
    rng = StatefulRNG(1, ranked=True)
    tables = rng.state_dict()
    for name in TABLES:
        table = tables[name]
        assert isinstance(table, DTensor)
        assert table.placements == (Shard(0),)
        assert table.shape[0] == world_size
        assert table.to_local().shape[0] == 1
    origin = tables["origin"]
    assert isinstance(origin, DTensor)
    assert origin.to_local()[0, 2:8].tolist() == [rank, world_size, world_size, 1, 1, 0]
    expected = draw()
    rng.load_state_dict(tables)
    assert draw() == expected


def test_a_stream_seeded_for_another_rank_is_refused(
    fake_group: Callable[[int, int], None],
) -> None:
    early = StatefulRNG(1, ranked=True)
    fake_group(2, 4)
    with unmoved(), pytest.raises(RuntimeError, match=r"seeded for rank 0.*after init_process"):
        early.state_dict()
    assert StatefulRNG(1).state_dict()  # with ranked=False the rank plays no part in the seed


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
    tables = rng.state_dict()
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        python, torch_state = random.getstate(), torch.get_rng_state()
        for use in (
            rng.state_dict,
            lambda: rng.load_state_dict(tables),
            _get_rng_state,
        ):
            with pytest.raises(RNGStateError, match=r"^numpy: .*PCG64"):
                use()
        assert random.getstate() == python
        assert torch.equal(torch.get_rng_state(), torch_state)
    finally:
        np.random.set_bit_generator(before)


# Bad tables. Each keeps a valid check word where it could, so that the values are looked at.


def resealed(tables: dict[str, torch.Tensor], name: str, index: int, value: int) -> None:
    state = tables[name][0, :-1].clone()
    state[index] = value
    number = value if (name, index) == ("origin", 2) else 0
    tables[name] = sealed(tables, name, state)
    if number:
        tables[name][0, -1] = digest(name, number, state)


def replaced(tables: dict[str, torch.Tensor], name: str, table: object) -> None:
    tables[name] = table  # type: ignore[assignment]


BAD: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {
    "missing": ("numpy", lambda t: t.pop("numpy")),
    "missing origin": ("origin", lambda t: t.pop("origin")),
    "extra": ("cuda:7", lambda t: t.update({"cuda:7": sealed(t, "cuda:7", t["torch"][0])})),
    "no tensor": ("torch", lambda t: replaced(t, "torch", [1, 2])),
    "dtype": ("python", lambda t: replaced(t, "python", t["python"].to(torch.int32))),
    "float": ("origin", lambda t: replaced(t, "origin", t["origin"].double())),
    "short": ("torch", lambda t: replaced(t, "torch", sealed(t, "torch", t["torch"][0, :-2]))),
    "long": ("python", lambda t: replaced(t, "python", sealed(t, "python", t["python"][0]))),
    "empty": ("numpy", lambda t: replaced(t, "numpy", t["numpy"][:, :0])),
    "rows": ("numpy", lambda t: replaced(t, "numpy", t["numpy"].repeat(2, 1))),
    "one dimension": ("numpy", lambda t: replaced(t, "numpy", t["numpy"][0])),
    "bit flipped": ("torch", lambda t: t["torch"][0, 100].bitwise_xor_(1 << 20)),
    "check word": ("numpy", lambda t: t["numpy"][0, -1].add_(1)),
    "origin altered": ("origin", lambda t: t["origin"][0, 5].add_(1)),
    "origin short": ("origin", lambda t: replaced(t, "origin", t["origin"][:, 1:])),
    "another generator's": ("python", lambda t: replaced(t, "python", t["numpy"].clone())),
    "another row": ("origin", lambda t: resealed(t, "origin", 2, 1)),
    "no row": ("origin", lambda t: resealed(t, "origin", 3, 0)),
    "newer layout": ("origin", lambda t: resealed(t, "origin", 0, 2)),
    "position": ("python", lambda t: resealed(t, "python", 624, 625)),
    "word": ("numpy", lambda t: resealed(t, "numpy", 3, 2**32)),
    "has-gauss": ("numpy", lambda t: resealed(t, "numpy", 625, 7)),
    "torch left": ("torch", lambda t: resealed(t, "torch", 1, 0)),
    "meta": ("torch", lambda t: replaced(t, "torch", t["torch"].to("meta"))),
    "sparse": ("numpy", lambda t: replaced(t, "numpy", t["numpy"].to_sparse())),
    "another moment's": (
        "numpy",
        lambda t: replaced(t, "numpy", StatefulRNG(2).state_dict()["numpy"]),
    ),
    "torch word": ("torch", lambda t: resealed(t, "torch", 9, 2**32)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_named_and_nothing_moves(case: str) -> None:
    rng = StatefulRNG(1)
    tables = rng.state_dict()
    draw(2)
    name, damage = BAD[case]
    damage(tables)
    with unmoved(), pytest.raises(RNGStateError, match=f"^{name}: "):
        rng.load_state_dict(tables)
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        rng.rewind()


def test_a_newer_layout_names_the_version_that_reads_it() -> None:
    rng = StatefulRNG(1)
    tables = rng.state_dict()
    longer = torch.cat([tables["origin"][0], torch.zeros(3, dtype=torch.int64)])
    longer[0], longer[1] = 2, 3004005
    tables["origin"] = longer.unsqueeze(0)
    with pytest.raises(RNGStateError, match=r"layout version 2.*nemo_rng_dcp 3\.4\.5"):
        rng.load_state_dict(tables)


def test_other_versions_are_warned_of_once_naming_both() -> None:
    rng = StatefulRNG(1)
    tables = rng.state_dict()
    resealed(tables, "origin", 9, 2007018)
    resealed(tables, "origin", 11, 1013001)
    with pytest.warns(
        UserWarning, match="saved with python 2.7.18, now .*; torch 1.13.1, now"
    ) as w:
        rng.load_state_dict(tables)
    assert len(w) == 1


def with_skew(rng: StatefulRNG) -> dict[str, torch.Tensor]:
    """The state as another version of Python would have saved it."""
    tables = rng.state_dict()
    table = tables["origin"]
    [row] = table.to_local() if isinstance(table, DTensor) else table
    row.copy_(dataclasses.replace(Origin.from_row(row), python_version=2007018).to_row())
    return tables


def test_where_warnings_are_errors_a_load_that_warns_moves_nothing() -> None:
    rng = StatefulRNG(1)
    tables = with_skew(rng)
    draw()
    with warnings.catch_warnings(), unmoved():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="saved with"):
            rng.load_state_dict(tables)


def test_rank_0_alone_warns_of_other_versions(fake_group: Callable[[int, int], None]) -> None:
    for rank, expected in ((0, 1), (1, 0)):
        fake_group(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        rng = StatefulRNG(1, mesh=mesh["dp"])  # ranks 0 and 1 share row 0
        tables = with_skew(rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rng.load_state_dict(tables)
        assert [warning.category for warning in caught] == [UserWarning] * expected


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
    with unmoved(), pytest.raises(TypeError, match=r"expected a mapping or an RNGState"):
        rng.load_state_dict(state)


def test_a_write_that_fails_halfway_puts_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = StatefulRNG(1)
    tables = rng.state_dict()
    draw()
    real, calls = np.random.set_state, 0

    def failing(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("halfway")
        real(*args)

    monkeypatch.setattr(np.random, "set_state", failing)
    with unmoved(), pytest.raises(OSError, match="halfway"):
        rng.load_state_dict(tables)
    assert calls == 2


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_not_copied_or_pickled_since_its_streams_are_not(
    copy_of: Callable[[StatefulRNG], object],
) -> None:
    rng = StatefulRNG(1)
    with unmoved(), pytest.raises(TypeError, match=r"pass its state_dict\(\) on"):
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
            seen = {name: state.tolist() for name, state in snapshot.read(globals_).items()}
            if seen not in known:
                mixed.append(which)

    globals_ = global_generators()
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


# RNGState, as NeMo Automodel has it.


def test_rng_state_round_trip_in_each_librarys_own_format() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    state = _get_rng_state()
    assert state.random_rng_state == random.getstate()
    key = state.np_rng_state[1]
    assert np.array_equal(key, np.random.get_state()[1])  # type: ignore[index]
    assert state.np_rng_state[2:] == np.random.get_state()[2:]  # type: ignore[index]
    assert torch.equal(state.torch_rng_state, torch.get_rng_state())
    expected = draw()
    _restore_rng_state(state)
    assert draw() == expected


def test_a_state_that_automodel_made_is_taken() -> None:
    state = RNGState(
        random.getstate(),
        np.random.get_state(),  # type: ignore[arg-type]
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all(),
    )
    rng = StatefulRNG(5)
    _restore_rng_state(state)
    expected = draw()
    rng.load_state_dict(state)
    assert draw() == expected
    rng.rewind()
    assert draw() == expected


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("random_rng_state", None, "python"),
        ("random_rng_state", (3, (0,) * 625, None), "python"),
        ("np_rng_state", None, "numpy"),
        ("np_rng_state", ("PCG64", {}), "numpy"),
        ("np_rng_state", {"bit_generator": "MT19937", "state": 5}, "numpy"),
        ("torch_rng_state", None, "torch"),
        ("torch_rng_state", torch.zeros(16, dtype=torch.uint8), "torch"),
        ("torch_rng_state", torch.zeros(5056), "torch"),
        ("torch_rng_state", b"bytes", "torch"),
        ("torch_rng_state", torch.zeros(5056, dtype=torch.uint8, device="meta"), "torch"),
        ("cuda_rng_state", None, "cuda"),
        ("cuda_rng_state", np.zeros(3), "cuda"),
        ("cuda_rng_state", [torch.zeros(16, dtype=torch.uint8)] * 99, "cuda"),
    ],
)
@pytest.mark.parametrize("restore", [_restore_rng_state, StatefulRNG(1).load_state_dict])
def test_a_bad_field_is_named_and_nothing_moves(
    field: str, value: object, name: str, restore: Callable[[RNGState], None]
) -> None:
    state = _get_rng_state()
    draw()
    setattr(state, field, value)
    with unmoved(), pytest.raises(RNGStateError, match=rf"^{name}: .*"):
        restore(state)


def test_an_rng_state_is_not_taken_where_a_registered_generator_cannot_be_read() -> None:
    broken = random.Random(1)
    rng = StatefulRNG(1, generators={"broken": broken})
    state = _get_rng_state()
    draw()
    broken.setstate((*broken.getstate()[:2], 1))  # type: ignore[arg-type]
    with unmoved(), pytest.raises(RNGStateError, match=r"^broken: .* gaussian is 1"):
        rng.load_state_dict(state)


def test_a_field_that_does_not_exist_is_named() -> None:
    state = _get_rng_state()
    del state.np_rng_state
    with unmoved(), pytest.raises(RNGStateError, match="numpy: the RNGState has no np_rng_state"):
        _restore_rng_state(state)
