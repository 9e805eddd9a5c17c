"""``inspect``: what it shows of a checkpoint, and what it finds wrong with one."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader

from nemo_rng_dcp import ResumableLoader, StatefulRNG, init_all_rng
from nemo_rng_dcp.position import Position
from nemo_rng_dcp.record import Stream
from scripts.demo.rankless import RanklessRNG
from tests.support.command import Capture, ask, ask_json
from tests.support.jobs import job
from tests.support.records import (
    at_their_seed,
    change_metadata,
    drawn_streams,
    place_of,
    records,
    save,
    stream,
)
from tests.support.streams import draw, unmoved

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# What real ranks saved.


def save_a_loader(path: Path, uneven: bool) -> None:
    rng = StatefulRNG(42, ranked=True)
    loader = ResumableLoader(DataLoader(range(7), batch_size=2), rng)
    batches = iter(loader)
    for _ in range(3 - (uneven and dist.get_rank())):
        next(batches)
    dcp.save({"rng": rng, "data": loader}, checkpoint_id=path)


def test_inspect_shows_where_a_loader_is(tmp_path: Path, capsys: Capture) -> None:
    job(2, save_a_loader, tmp_path / "even", False)
    code, text = ask(capsys, "inspect", tmp_path / "even")
    at = "data: a loader of 2 rows, behind batch 3 of epoch 0"
    assert f"{at} (length 4, samples 7, batch size 2)" in text
    assert code == 0
    [loader] = ask_json(capsys, "inspect", tmp_path / "even")["loaders"]
    assert loader["key"] == "data"
    assert [(row["row"], row["batches"]) for row in loader["rows"]] == [(0, 3), (1, 3)]

    job(2, save_a_loader, tmp_path / "uneven", True)
    code, text = ask(capsys, "inspect", tmp_path / "uneven")
    assert "suspicious: data: rows are at different batches" in text


def test_inspect_finds_a_damaged_position(tmp_path: Path, capsys: Capture) -> None:
    zeros = torch.zeros(len(Position._fields), dtype=torch.int64)
    dcp.save({"data": {"loader_position": zeros}}, checkpoint_id=tmp_path)
    code, text = ask(capsys, "inspect", tmp_path)
    assert "damage: data: loader_position: loader_position: found layout 0" in text
    assert code == 1


def save_deep_down(path: Path) -> list[dict[str, str]]:
    rng = StatefulRNG(42, ranked=True)
    draw(dist.get_rank() + 1)
    state = {"trainer": {"app": {"rng": rng.state_dict()}}, "weight": torch.ones(3)}
    dcp.save(state, checkpoint_id=path)
    with unmoved():
        return rng.fingerprint(gather=True)


def test_inspect_shows_the_fingerprints_of_every_rank(tmp_path: Path, capsys: Capture) -> None:
    fingerprints, *_ = job(4, save_deep_down, tmp_path)
    code, text = ask(capsys, "inspect", tmp_path)
    assert code == 0
    assert "trainer.app.rng: 4 rows of 4 ranks, seed 42, ranked one row per rank" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    for row, of_row in enumerate(fingerprints):
        assert f" {row} {of_row['python']} {of_row['numpy']} {of_row['torch']} " in text
    assert text.endswith("no findings")


def save_as_a_framework_seeded(path: Path) -> None:
    # Its numbers are those of a seed and a row that nobody named.
    init_all_rng(0 if dist.get_rank() == 0 else dist.get_rank() - 1)
    StatefulRNG(None, ranked=True).save(path)


def test_streams_that_a_framework_seeded_have_no_seed(tmp_path: Path, capsys: Capture) -> None:
    job(2, save_as_a_framework_seeded, tmp_path)
    _, text = ask(capsys, "inspect", tmp_path)
    assert "2 rows of 2 ranks, no seed, ranked" in text
    assert "still at its seed" not in text
    report = ask_json(capsys, "inspect", tmp_path)
    assert {row["seed"] for row in report["entries"][0]["streams"]} == {None}


def save_along_a_mesh(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shuffle = torch.Generator().manual_seed(1)
    noise = torch.Generator().manual_seed(dist.get_rank() // 2)
    rng = StatefulRNG(
        42,
        ranked=True,
        mesh=mesh["dp"],
        generators={"noise": noise},
        shared_generators={"shuffle": shuffle},
    )
    dcp.save(rng.state_dict(), checkpoint_id=path)


def test_inspect_shows_when_along_which_mesh_and_what_is_shared(
    tmp_path: Path, capsys: Capture
) -> None:
    job(4, save_along_a_mesh, tmp_path)
    _, text = ask(capsys, "inspect", tmp_path)
    assert "(top level): 2 rows of 4 ranks" in text
    assert "one row per coordinate of dp 2" in text
    assert "alike on all ranks: shuffle" in text
    assert re.search(r"taken 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", text)
    (entry,) = ask_json(capsys, "inspect", tmp_path)["entries"]
    assert entry["key"] == ""
    assert entry["streams"][1]["mesh"] == {"dp": 2}
    assert entry["streams"][1]["shared"] == ["shuffle"]


def test_streams_that_do_not_fit_a_terminal_are_shown_below(
    tmp_path: Path, capsys: Capture
) -> None:
    names = [f"generator-{number}" for number in range(12)]
    streams = {name: stream("torch.cpu", 2**40 + number) for number, name in enumerate(names)}
    path = save(records(2, lambda _: streams), tmp_path)
    _, text = ask(capsys, "inspect", path)
    (entry,) = ask_json(capsys, "inspect", path)["entries"]
    for row, of_row in enumerate(entry["streams"]):
        shown = re.findall(rf" {row}((?: \w{{12}})+)", text)
        assert len(shown) == 3
        assert " ".join(shown).split() == [of_row["fingerprints"][name] for name in names]
    assert " ".join(names[:5]) in text
    assert f"row {' '.join(names[5:10])}" in text


def save_unranked(path: Path) -> None:
    rng = StatefulRNG(42)
    draw()
    dcp.save({"rng": rng}, checkpoint_id=path)


def test_streams_that_were_never_ranked_may_be_alike(tmp_path: Path, capsys: Capture) -> None:
    job(3, save_unranked, tmp_path)
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, "not ranked" in text, "no findings" in text) == (0, True, True)


def test_entries_are_found_at_any_depth(tmp_path: Path, capsys: Capture) -> None:
    for entry in ("rng", "a.0.b", ""):
        path = save(records(2), tmp_path / f"at-{entry}", entry)
        (found,) = ask_json(capsys, "inspect", path)["entries"]
        assert (found["key"], found["rows"]) == (entry, 2)


def test_a_whole_table_of_one_process_is_read(tmp_path: Path, capsys: Capture) -> None:
    table = torch.cat([record.to_tensor() for record in records(3)])
    dcp.save({"rng": {"rng_streams": table}}, checkpoint_id=tmp_path, no_dist=True)
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, "rng: 3 rows of 3 ranks" in text) == (0, True)


# What is no finding.


def test_other_integers_beside_the_records_are_no_finding(tmp_path: Path, capsys: Capture) -> None:
    """An int64 matrix with as many rows was taken for a table, and called damaged."""
    (record,) = records(1)
    state: dict[str, Any] = {
        "rng": {"rng_streams": record.to_tensor(), "matrix": torch.zeros(1, 628).long()},
        "steps": torch.zeros(1, 13, dtype=torch.int64),
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    for words in (["inspect"], ["diff", tmp_path], ["explain", "--world-size", 1]):
        assert ask(capsys, *words, tmp_path)[0] == 0


@pytest.mark.parametrize(
    "weights",
    [
        {"generator_state_dict": {"conv.weight": torch.ones(2, 2), "step": torch.tensor(3)}},
        {"generator_state_dict": {"epoch": 3}},
        {"generator_state": {"mask": torch.zeros(5, dtype=torch.uint8)}},
        {"rng_head.weight": torch.ones(624)},
        {"random_state_embedding": torch.ones(5056)},
        {"layers.0.random": torch.zeros(16, dtype=torch.uint8), "python": torch.ones(3)},
    ],
    ids=lambda weights: next(iter(weights)),
)
def test_weights_are_no_rng_state(weights: Any, tmp_path: Path, capsys: Capture) -> None:
    """A GAN's generator was taken for RNG state by a word in its key."""
    (record,) = records(1)
    state = {"app": record.to_tensor(), "here": {"rng_streams": record.to_tensor()}, **weights}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    assert ask_json(capsys, "inspect", tmp_path)["others"] == []
    assert ask(capsys, "inspect", tmp_path)[0] == 0


# What is found.


def alike(row: int) -> Mapping[str, Stream]:
    return {**drawn_streams(row), "numpy": drawn_streams(min(row, 1))["numpy"]}


def test_rows_with_one_stream(tmp_path: Path, capsys: Capture) -> None:
    path = save(records(4, alike), tmp_path / "ranked")
    code, text = ask(capsys, "inspect", path)
    assert code == 0, "it may be meant so"
    assert re.search(r"suspicious: rng, numpy, rows 1-3: these rows have one stream", text)
    assert text.count("suspicious") == 1
    assert ask(capsys, "inspect", path, "--fail-on", "suspicious")[0] == 1
    path = save(records(4, alike, ranked=False), tmp_path / "not ranked")
    assert ask(capsys, "inspect", path, "--fail-on", "suspicious")[0] == 0


def with_registered(row: int) -> Mapping[str, Stream]:
    own = stream("torch.cpu", 5 if row < 2 else row)
    shared = stream("torch.cpu", 7 if row < 2 else row, shared=True)
    return {**drawn_streams(row), "noise": own, "shuffle": shared}


def test_registered_generators_are_judged_by_whether_they_are_shared(
    tmp_path: Path, capsys: Capture
) -> None:
    _, text = ask(capsys, "inspect", save(records(3, with_registered, ranked=False), tmp_path))
    assert "suspicious: rng, noise, rows 0-1: these rows have one stream" in text
    assert "suspicious: rng, shuffle, row 2: shared, but these rows have another stream" in text
    assert text.count("suspicious") == 2


def test_streams_still_at_their_seed_do_not_fail_a_gate(tmp_path: Path, capsys: Capture) -> None:
    path = save(records(3, at_their_seed), tmp_path)
    found = ask_json(capsys, "inspect", path)["findings"]
    assert [(finding["severity"], finding["generator"], finding["rows"]) for finding in found] == [
        ("suspicious", "python", [0, 1, 2]),
        ("suspicious", "numpy", [0]),
        ("suspicious", "torch", [0]),
    ]
    assert all("still at its seed" in finding["text"] for finding in found)
    assert ask(capsys, "inspect", path)[0] == 0
    assert ask(capsys, "inspect", path, "--fail-on", "damage")[0] == 0
    assert ask(capsys, "inspect", path, "--fail-on", "suspicious")[0] == 1


def flip(path: Path, key: str, row: int) -> None:
    """Change one bit in the middle of a row."""
    file, start, length = place_of(path, key, row)
    content = bytearray(file.read_bytes())
    content[start + length // 2] ^= 4
    file.write_bytes(content)


def test_damaged_and_missing_rows_are_named(tmp_path: Path, capsys: Capture) -> None:
    good = save(records(4), tmp_path / "good")
    path = save(records(4), tmp_path / "damaged")
    flip(path, "rng.rng_streams", 1)

    def move(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if index.offset[0] == 2 * length:
                place.relative_path = "__9_0.distcp"

    length = len(records(1)[0].to_tensor())
    change_metadata(path, move)
    code, text = ask(capsys, "inspect", path)
    assert code == 1
    assert re.search(r"damage: rng, row 1: unreadable: \S+, byte \d+: .*Bad CRC", text)
    assert "damage: rng, row 2: unreadable: __9_0.distcp is missing" in text
    # The other commands say that it cannot be trusted.
    code, text = ask(capsys, "diff", path, good)
    assert code == 2
    assert "2 rows compared, no stream differs" in text, "a damaged row is no difference"
    assert "2 rows of A missing or damaged" in text
    code, text = ask(capsys, "explain", path, "--world-size", 7)
    assert (code, "a load raises, for saved row 2" in text) == (1, True)
    assert ask(capsys, "explain", path, "--world-size", 1)[0] == 0


def tensors(count: int) -> list[torch.Tensor]:
    return [record.to_tensor() for record in records(count)]


BAD_ROWS = {
    "altered": (r"row 1: damaged: .*does not fit its check word", (40, 9)),
    "newer": (r"row 1: damaged: .*layout version 2", (0, 2)),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_load_and_inspect_refuse_the_same(case: str, tmp_path: Path, capsys: Capture) -> None:
    pattern, (place, number) = BAD_ROWS[case]
    rows = tensors(2)
    rows[1] = rows[1].clone()
    rows[1][place] = number
    code, text = ask(capsys, "inspect", save(rows, tmp_path))
    assert code == 1
    assert re.search(pattern, text)


def test_a_row_in_another_ones_place_is_damage(tmp_path: Path, capsys: Capture) -> None:
    first, _ = records(2)
    code, text = ask(capsys, "inspect", save([first, first], tmp_path))
    assert code == 1
    assert "row 1: damaged: it says that it is row 0 of 2, and stands in the place of row 1" in text


def out_of_range(row: int) -> Mapping[str, Stream]:
    streams = drawn_streams(row)
    numbers = bytearray(streams["numpy"].state)
    numbers[4 * 624 : 4 * 625] = (625 if row == 1 else 5).to_bytes(4, "little")
    return {**streams, "numpy": Stream("numpy", False, bytes(numbers))}


def test_a_state_that_a_load_refuses_is_found_although_its_check_word_fits(
    tmp_path: Path, capsys: Capture
) -> None:
    path = save(records(3, out_of_range), tmp_path)
    code, text = ask(capsys, "inspect", path)
    assert code == 1
    assert "damage: rng, numpy, row 1: a load refuses it" in text
    assert "the position is 625, expected 0 to 624" in text
    code, text = ask(capsys, "explain", path, "--world-size", 3)
    assert (code, "a load raises, for saved row 1" in text) == (1, True)


@pytest.mark.parametrize(
    ("field", "value", "finding"),
    [
        ("seed", 7, "damage: rng, row 2: another seed than row 0's 42"),
        ("mesh", None, "damage: rng, row 2: another mesh than row 0's dp 3"),
        ("torch_version", 2001000, "row 2: another torch version than row 0's 2.2.0"),
    ],
)
def test_a_row_of_another_job_or_machine_is_found(
    field: str, value: object, finding: str, tmp_path: Path, capsys: Capture
) -> None:
    good = records(3, mesh=(("dp", 3),), torch_version=2002000)
    bad = replace(good[2], **{field: value})
    code, text = ask(capsys, "inspect", save([*good[:2], bad], tmp_path))
    assert (code, finding in text) == (finding.startswith("damage"), True), text


@pytest.mark.parametrize(
    ("stored", "finding"),
    [
        (torch.ones(2, 3), "rng_streams is float32 [2, 3], expected int64 of one dimension"),
        (torch.ones(2, 3).long(), "rng_streams is int64 [2, 3], expected int64 of one dimension"),
        ({1, 2}, "rng_streams is a pickle, expected int64 of one dimension"),
    ],
)
def test_what_only_has_a_records_name_is_damage(
    stored: object, finding: str, tmp_path: Path, capsys: Capture
) -> None:
    """The command said that there is no RNG state."""
    dcp.save({"rng": {"rng_streams": stored}}, checkpoint_id=tmp_path, no_dist=True)
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, text) == (1, f"damage: rng: {finding}: a load finds no record in it")


def test_rows_that_no_rank_saved_are_missing(tmp_path: Path, capsys: Capture) -> None:
    path = save(records(4), tmp_path)

    def cut(metadata: Any) -> None:
        (table,) = metadata.state_dict_metadata.values()
        del table.chunks[1:3]

    change_metadata(path, cut)
    code, text = ask(capsys, "inspect", path)
    assert (code, "damage: rng: 2 of 4 rows are missing, the first is 1" in text) == (1, True)


def test_a_row_beyond_the_end_stands_for_none_that_is_missing(
    tmp_path: Path, capsys: Capture
) -> None:
    path = save(records(4), tmp_path)

    def cut(metadata: Any) -> None:
        (table,) = metadata.state_dict_metadata.values()
        del table.chunks[1:3]
        table.size = torch.Size([3 * table.chunks[0].sizes[0]])

    change_metadata(path, cut)
    code, text = ask(capsys, "inspect", path)
    assert (code, "damage: rng: 2 of 3 rows are missing, the first is 1" in text) == (1, True)


# What other code stored.


def save_rank_less(path: Path) -> None:
    dcp.save({"rng": RanklessRNG(42)}, checkpoint_id=path)


def test_rank_less_keys_have_lost_the_streams(tmp_path: Path, capsys: Capture) -> None:
    job(4, save_rank_less, tmp_path)
    code, text = ask(capsys, "inspect", tmp_path)
    assert code == 1
    assert "lost: no StatefulRNG's record" in text
    assert "note: rng: one state for all ranks" in text
    assert "pickles, which were not read" in text


def save_rank_named(path: Path) -> None:
    rng = RanklessRNG(42)
    dcp.save({f"rng.rank{dist.get_rank()}": rng.state_dict()}, checkpoint_id=path)


def test_rank_named_keys_have_lost_nothing_yet(tmp_path: Path, capsys: Capture) -> None:
    job(4, save_rank_named, tmp_path)
    code, text = ask(capsys, "inspect", tmp_path)
    assert code == 0
    assert "rng.rank*: one key a rank, 4 ranks." in text

    def lose(metadata: Any) -> None:
        for name in ("python", "numpy", "torch"):
            del metadata.state_dict_metadata[f"rng.rank2.{name}"]

    change_metadata(tmp_path, lose)
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, "rng.rank*: rank 2 wrote to this checkpoint, but no RNG" in text) == (1, True)


def test_no_rng_state_at_all_is_a_finding(tmp_path: Path, capsys: Capture) -> None:
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    code, text = ask(capsys, "inspect", tmp_path)
    assert (code, text) == (1, "lost: no RNG state in it: a resume restores no stream")
    for other in (["diff", tmp_path, tmp_path], ["explain", tmp_path, "--world-size", 2]):
        code, text = ask(capsys, *other)
        assert (code, "no StatefulRNG's record in it" in text) == (2, True)


CPU, GPU = torch.zeros(5056, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
WORDS, PICKLE = torch.zeros(624, dtype=torch.int64), (3, "a pickle")


@pytest.mark.parametrize(
    ("state", "prefix", "ranks"),
    [
        ({"anything": CPU}, "", []),
        ({"app.torch_rng_state": CPU, "app.cuda_rng_state.0": GPU}, "app", []),
        ({"random_rng_state": PICKLE, "np_rng_state": WORDS}, "", []),
        ({"trainer.random_state": PICKLE}, "trainer", []),
        ({"sampler.generator_state": CPU}, "sampler", []),
        ({"rng/0": GPU, "rng/1": GPU}, "rng/*", [0, 1]),
        ({"rank_0.rng": PICKLE, "rank_1.rng": PICKLE}, "rank_*", [0, 1]),
        ({"rng_states.0.torch": CPU, "rng_states.1.torch": CPU}, "rng_states.*", [0, 1]),
    ],
)
def test_rng_state_of_other_code_is_recognised(
    state: dict[str, Any], prefix: str, ranks: list[int], tmp_path: Path, capsys: Capture
) -> None:
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    others = ask_json(capsys, "inspect", tmp_path)["others"]
    assert [(found["prefix"], found["ranks"]) for found in others] == [(prefix, ranks)]


def test_a_large_number_in_a_foreign_key_costs_nothing(tmp_path: Path, capsys: Capture) -> None:
    """It was taken for a rank, and a set of all ranks up to it was built."""
    dcp.save({"rng/1763800000": GPU, "rng/rank1763800000": GPU}, checkpoint_id=tmp_path)
    code, text = ask(capsys, "inspect", tmp_path)
    assert "rng/" in text
    assert code in (0, 1)


# Many rows.


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 120 rows of which row 100 is damaged and row 101 has row 17's Python."""
    good = records(120)
    alike = replace(good[101], streams={**good[101].streams, "python": good[17].streams["python"]})
    bad = good[100].to_tensor().clone()
    bad[100] ^= 1
    rows = [*good[:100], bad, alike, *good[102:]]
    return save(rows, tmp_path_factory.mktemp("many") / "checkpoint")


def test_many_rows_are_summarised(many: Path, capsys: Capture) -> None:
    code, text = ask(capsys, "inspect", many)
    assert code == 1
    assert "python 119 good rows, 118 different" in text
    assert "torch 119 good rows, 119 different" in text
    assert "suspicious: rng, python, rows 17, 101: these rows have one stream" in text
    assert "damage: rng, row 100: damaged" in text
    _, text = ask(capsys, "inspect", many, "--rows", "12,40-44")
    shown = re.findall(r" (\d+) [0-9a-f]{12} [0-9a-f]{12} [0-9a-f]{12}", text)
    assert list(map(int, shown)) == [12, 40, 41, 42, 43, 44]


def test_rows_narrows_what_every_command_lists(many: Path, capsys: Capture) -> None:
    (found,) = ask_json(capsys, "inspect", many, "--rows", "99-100")["entries"]
    assert [row["row"] for row in found["streams"]] == [99]
    (found,) = ask_json(capsys, "explain", many, "--world-size", 140, "--rows", "139")["entries"]
    assert [fate["row"] for fate in found["fates"]] == [139]


def test_json_has_a_version(many: Path, capsys: Capture) -> None:
    assert ask_json(capsys, "inspect", many)["schema"] == 1


def save_in_grids(path: Path) -> None:
    """Save the streams of an actor and of a critic, on meshes of their own, with logical ranks."""
    grids = [DeviceMesh("cpu", ranks, mesh_dim_names=("dp",)) for ranks in ([0, 1], [2, 3])]
    mesh = next(mesh for mesh in grids if mesh.get_coordinate() is not None)
    rng = StatefulRNG(42, ranked=True, mesh=mesh, logical_ranks=4)
    for rank in rng.ranks:
        with rng.as_rank(rank):
            draw(1 + rank + int(mesh.mesh[0]))
    dcp.save({"rng": rng}, checkpoint_id=path)


def test_grids_are_entries_of_their_own_and_rows_are_logical_ranks(
    tmp_path: Path, capsys: Capture
) -> None:
    """Of two rows in one chunk one was shown."""
    job(4, save_in_grids, tmp_path / "a")
    code, text = ask(capsys, "inspect", tmp_path / "a")
    assert (code, "no findings" in text) == (0, True)
    for key in ("rng", "rng@2"):
        assert f"{key}: 4 rows of 4 ranks, seed 42, ranked one row per logical rank" in text
    entries = ask_json(capsys, "inspect", tmp_path / "a")["entries"]
    assert [(entry["key"], len(entry["streams"])) for entry in entries] == [
        ("rng", 4),
        ("rng@2", 4),
    ]
    job(4, save_in_grids, tmp_path / "b")
    code, text = ask(capsys, "diff", tmp_path / "a", tmp_path / "b")
    compared = "4 rows compared, no stream differs"
    assert (code, text) == (0, f"rng: {compared} rng@2: {compared}")
    change_metadata(tmp_path / "a", _claim_many)
    code, text = ask(capsys, "inspect", tmp_path / "a")
    assert (code, "rows are missing" in text) == (1, True)


def _claim_many(metadata: Any) -> None:
    for saved in metadata.state_dict_metadata.values():
        saved.size = torch.Size([2**60])
