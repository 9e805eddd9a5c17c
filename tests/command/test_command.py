"""The command as it is installed: its output, its exit codes and its options."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nemo_rng_dcp
from nemo_rng_dcp.cli.main import main
from tests.support.command import INSTALLED, Capture, ask, ask_json, run
from tests.support.launch import environment, python
from tests.support.records import at_their_seed, drawn_streams, records, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(records(2), tmp_path_factory.mktemp("command") / "checkpoint")


def test_the_command_is_installed_and_its_findings_have_one_order(
    tmp_path: Path, capsys: Capture
) -> None:
    """The order was the one of a set, which PYTHONHASHSEED changes."""
    path = save(records(6, at_their_seed), tmp_path / "checkpoint")
    words = ["inspect", str(path), "--json"]
    here = tmp_path / "here"
    here.mkdir()

    def start(seed: str, *command: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*command, *words],
            cwd=here,
            env=environment(PYTHONHASHSEED=seed),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    with ThreadPoolExecutor() as pool:
        installed = pool.submit(start, "1", INSTALLED)
        as_a_module = pool.submit(start, "2", sys.executable, "-m", "nemo_rng_dcp")
    assert main(words) == 0
    expected = capsys.readouterr().out
    assert len(json.loads(expected)["findings"]) == 3
    assert installed.result() == as_a_module.result() == (0, expected, "")
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "words",
    [["--version"], ["--help"], ["inspect", "--help"], ["diff", "--help"], ["explain", "-h"]],
)
def test_help_and_version_import_neither_torch_nor_numpy(words: list[str]) -> None:
    """So they answer at once: torch alone takes a second to import."""
    program = (
        "import sys\nfrom nemo_rng_dcp.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('imported:', {'torch', 'numpy'} & set(sys.modules))"
    )
    done = python("-c", program, *words)
    assert done.stdout.endswith("imported: set()\n")
    if words == ["--version"]:
        assert done.stdout.startswith(f"nemo-rng-dcp {nemo_rng_dcp.__version__}\n")
    elif len(words) == 2:
        examples = re.findall(r"^  nemo-rng-dcp .*", done.stdout, re.MULTILINE)
        assert len(examples) == 2


def test_a_reason_is_one_line_on_stderr(tmp_path: Path) -> None:
    done = run("inspect", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "no .metadata in it" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", ".", "--rows", "a-b"],
        ["inspect", ".", "--rows", "9-3"],
        ["inspect", ".", "--rows", "1-"],
        ["inspect", ".", "--fail-on", "everything"],
        ["explain", ".", "--world-size", "0"],
        ["explain", ".", "--world-size", "1000000000"],
        ["explain", ".", "--world-size", "1" * 5000],
        ["explain", ".", "--world-size", "4", "--mesh", "dp4"],
        ["explain", ".", "--world-size", "4", "--mesh", "dp=4", "--along", "dp,"],
        ["explain", "."],
        [],
    ],
)
def test_a_bad_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_an_empty_path_is_refused(capsys: Capture) -> None:
    code, text = ask(capsys, "inspect", "")
    assert (code, text) == (
        2,
        "nemo-rng-dcp: the path is empty, expected the folder of a checkpoint",
    )


# stdout that cannot be written.


def test_a_closed_stdout_is_one_line_and_exit_code_2(checkpoint: Path) -> None:
    words = f'"{INSTALLED}" inspect "{checkpoint}" >&-'
    done = subprocess.run(
        ["/bin/sh", "-c", words], stderr=subprocess.PIPE, text=True, timeout=100, check=False
    )
    assert done.returncode == 2
    assert done.stderr == ("nemo-rng-dcp: stdout is closed, so there is nowhere to print to\n")


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def onto_a_full_disk(words: Sequence[str]) -> int:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    return main(words)


@needs_full
def test_a_full_disk_is_one_line_and_exit_code_2(checkpoint: Path) -> None:
    done = run("inspect", checkpoint, program=onto_a_full_disk)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def to_nobody(words: Sequence[str]) -> int:
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)
    return main(words)


def test_a_reader_that_leaves_early_is_no_error(checkpoint: Path) -> None:
    done = run("inspect", checkpoint, program=to_nobody)
    assert (done.returncode, done.stderr) == (2, "")


# How it is put together.

CLI = Path(main.__code__.co_filename).parent
FLOORS = [
    {"terminal"},
    {"streams", "reading", "heading"},
    {"findings", "job"},
    {"inspect", "diff", "explain", "importing"},
    {"arguments", "main"},
]
"""The modules and folders of the command, from the ground."""


def imports_within_cli(place: str) -> set[str]:
    """Return which modules and folders of the command one of them imports, by their names."""
    found = set()
    for file in [CLI / f"{place}.py", *(CLI / place).glob("*.py")]:
        if file.exists():
            pattern = r"^ *from nemo_rng_dcp\.cli\.(\w+)"
            found |= set(re.findall(pattern, file.read_text(), re.MULTILINE))
    return found - {place}


def test_the_command_imports_only_downward() -> None:
    below: set[str] = set()
    for floor in FLOORS:
        for place in sorted(floor - {"main"}):
            assert imports_within_cli(place) <= below, place
        below |= floor
    here = {*CLI.glob("*.py"), *(file.parent for file in CLI.glob("*/__init__.py"))}
    assert below == {path.stem for path in here} - {"__init__"}
    assert imports_within_cli("reading") == {"terminal"}
    assert imports_within_cli("importing") == {"reading", "streams", "terminal"}


def test_import_has_one_door() -> None:
    """So that it could leave: nothing but ``main`` knows of it."""
    users = {
        str(file.relative_to(CLI))
        for file in CLI.rglob("*.py")
        if re.search(r"\bimporting\b", file.read_text()) and file.parent.name != "importing"
    }
    assert users == {"main.py"}
    (module,) = re.findall(r"\bimporting\b[.\w]*", (CLI / "main.py").read_text())
    assert module == "importing.command"


# What --json prints is described.


def keys_in(content: object) -> set[str]:
    if isinstance(content, list):
        return {key for item in content for key in keys_in(item)}
    if not isinstance(content, dict):
        return set()
    return content.keys() | keys_in([*content.values()])


def test_every_field_of_the_json_is_documented(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = save(records(3, lambda row: drawn_streams(row // 2)), tmp_path / "other")
    answers = [
        ask_json(capsys, "inspect", other),
        ask_json(capsys, "diff", checkpoint, other),
        ask_json(capsys, "explain", other, "--world-size", 4),
    ]
    assert answers[0]["findings"]
    assert answers[1]["entries"][0]["differences"]
    assert all(answer["schema"] == 1 for answer in answers)
    text = (Path(__file__).parents[2] / "docs" / "command.md").read_text()
    named = set(re.findall(r"`(\w+)`", text)) | {"A", "B"}
    missing = keys_in(answers) - named - set(drawn_streams(0))
    assert not missing


# Errors that nobody foresaw, and a stderr that cannot be written.


def test_a_file_larger_than_memory_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".metadata"
    file.touch()
    os.truncate(file, 2**43)  # more than any memory, and no byte on the disk
    done = run("inspect", tmp_path)
    assert (done.returncode, done.stderr) == (2, f"nemo-rng-dcp: {file}: MemoryError\n")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(LookupError("7"), "LookupError: 7"), (MemoryError(), "MemoryError"), (OSError(), "OSError")],
)
def test_an_error_that_nobody_foresaw_is_no_finding(
    error: Exception, reason: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback ends with exit code 1, which means findings."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("nemo_rng_dcp.cli.inspect.Inspection", fail)
    assert ask(capsys, "inspect", "anywhere") == (2, f"nemo-rng-dcp: {reason}")


class Interrupting(str):
    def __contains__(self, text: str) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return False


def interrupted(words: Sequence[str]) -> int:
    command, path = words
    return main([command, Interrupting(path)])


def test_ctrl_c_ends_with_130(checkpoint: Path) -> None:
    done = run("inspect", checkpoint, program=interrupted)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def without_stderr(words: Sequence[str]) -> int:
    os.close(2)
    sys.stderr = None  # type: ignore[assignment]  # as Python has it then
    return main(words)


def with_a_full_stderr(words: Sequence[str]) -> int:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    return main(words)


@needs_full
@pytest.mark.parametrize("program", [without_stderr, with_a_full_stderr])
def test_a_stderr_that_cannot_be_written_changes_nothing(
    program: Callable[[Sequence[str]], int], checkpoint: Path, tmp_path: Path
) -> None:
    """The reason went to stdout, where --json prints, or the exit code became 1."""
    damaged = save(records(2), tmp_path)
    (damaged / "__0_0.distcp").write_bytes(b"")
    for words, answers in (([damaged, damaged, "--json"], True), ([checkpoint, "/nowhere"], False)):
        done = run("diff", *words, program=program)
        assert done.returncode == 2
        assert json.loads(done.stdout)["entries"] if answers else done.stdout == ""
