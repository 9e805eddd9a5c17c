"""README and the pages of docs/: their examples run, their links lead somewhere, they are true."""

import io
import json
import re
import runpy
import shlex
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pdoc
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import nemo_rng_dcp
from nemo_rng_dcp import RNGLoadPlanner, StatefulRNG
from nemo_rng_dcp.generators.numpy_random import NumPyGeneratorAdapter
from nemo_rng_dcp.record import fingerprint
from tests.fixtures import LAYOUT_1
from tests.project.test_package import house
from tests.support.jobs import job
from tests.support.launch import torchrun_with
from tests.support.scripts import agent, execute, run_script
from tests.support.streams import warned

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
"""Those of docs/frameworks need the frameworks, and have tests of their own."""

README = (ROOT / "README.md").read_text()


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


SNIPPETS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, text in enumerate(snippets(page), start=1)
]


# Examples.


def torchrun_of(text: str) -> list[str]:
    """The torchrun command that an example's first line shows, or nothing."""
    comment, *command = shlex.split(text.splitlines()[0])
    return command if (comment, command[:1]) == ("#", ["torchrun"]) else []


ELASTIC = [text for text in snippets(ROOT / "docs" / "elastic.md") if "from reduction" in text]
"""Those that need the files beside the recipe."""


@pytest.mark.parametrize("text", [s for s in SNIPPETS if s.values[0] not in ELASTIC])
def test_examples_run_as_they_stand(text: str, tmp_path: Path) -> None:
    """With python, or on the ranks of a torchrun command."""
    command = torchrun_of(text)
    script = tmp_path / (command[-1] if command else "example.py")
    script.write_text(text)
    run_script(int(command[command.index("--nproc-per-node") + 1]) if command else 0, script)


def printed(script: Path, variables: dict[str, str]) -> str:
    with redirect_stdout(io.StringIO()) as output:
        execute(script, (), variables)
    return output.getvalue()


def printed_by(ranks: int, text: str, folder: Path) -> str:
    """Return what all ranks of an example print alike."""
    (script := folder / str(ranks) / "example.py").parent.mkdir(parents=True)
    script.write_text(text)
    for name in ("reduction.py", "shards.py"):
        (script.parent / name).write_text((ROOT / "scripts" / "recipes" / name).read_text())
    with agent() as variables:
        texts = set(job(ranks, printed, script, variables, group=False))
    assert len(texts) == 1
    return texts.pop()


def test_elastic_examples_print_the_same_on_other_numbers_of_processes(tmp_path: Path) -> None:
    fsdp2, tp, by_hand = ELASTIC
    one = printed_by(1, fsdp2, tmp_path / "fsdp2")
    assert printed_by(2, fsdp2, tmp_path / "fsdp2") == one
    assert "replicas, tp = 1, 2" in tp
    hsdp = tp.replace("replicas, tp = 1, 2", "replicas, tp = 2, 1")
    assert printed_by(4, hsdp, tmp_path / "hsdp") == one, "the same model"
    assert printed_by(4, tp, tmp_path / "tp") == printed_by(2, tp, tmp_path / "tp")
    one = printed_by(1, by_hand, tmp_path / "by_hand")
    assert printed_by(2, by_hand, tmp_path / "by_hand") == one


def test_the_first_example_runs_with_its_command(tmp_path: Path) -> None:
    text = snippets(ROOT / "README.md")[0]
    _, *options, name = torchrun_of(text)
    (tmp_path / name).write_text(text)
    torchrun_with(options, tmp_path / name)


def test_examples_that_need_ranks_say_how_they_are_run() -> None:
    for parameter in SNIPPETS:
        [text] = parameter.values
        needs_ranks = "init_process_group" in str(text)
        assert str(text).startswith("# torchrun --standalone") == needs_ranks, parameter.id


def test_readme_is_short_and_begins_with_an_example() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    start = lines.index("```python")
    assert lines.index("```", start) - start <= 20


# Links.


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted({*PAGES, *ROOT.glob("docs/**/*.md")}), ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


def test_the_index_names_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w/]+\.md)\)", text_of("README.md")))
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.glob("**/*.md")}
    assert pages - listed == {"README.md"}


def test_every_module_is_in_the_table_of_modules() -> None:
    package = ROOT / "nemo_rng_dcp"
    rooms = {str(path.relative_to(package)) for path in package.glob("*.py")}
    rooms |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    modules = re.search(r"^## Modules$(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert modules is not None
    text, _, command = modules[1].partition("### The command")
    listed = re.findall(r"^\| `([\w/.]+)`", text, re.MULTILINE)
    assert set(listed) == rooms - {"__init__.py", "__main__.py"}
    imports = house()
    names = [name.removesuffix(".py").rstrip("/") for name in listed]
    for above, name in enumerate(names):
        assert not imports[name] & set(names[:above]), f"{name} imports from above it"
    cli = package / "cli"
    rooms = {path.stem for path in cli.glob("*.py")}
    rooms |= {f"{path.parent.name}/" for path in cli.glob("*/__init__.py")}
    listed = re.findall(r"^\| `([\w/.]+)`", command, re.MULTILINE)
    assert set(listed) == rooms - {"__init__"}


# The format.


def test_the_reader_of_the_format_page_reads_the_committed_checkpoint(tmp_path: Path) -> None:
    """Two ranks with eight generators each, without the library."""
    [text] = snippets(ROOT / "docs" / "format.md")
    (tmp_path / "reader.py").write_text(text)
    read_table = runpy.run_path(str(tmp_path / "reader.py"))["read_table"]
    dcp_to_torch_save(LAYOUT_1, tmp_path / "file.pt")
    saved = torch.load(tmp_path / "file.pt", weights_only=True)
    records = read_table(saved["app"]["rng"]["rng_streams"].numpy())
    assert [head[3:6] for head, _, _ in records] == [[0, 2, 2], [1, 2, 2]]
    expected = json.loads((LAYOUT_1 / "fingerprints.json").read_text())
    found = [{n: fingerprint(state) for n, state in states.items()} for _, _, states in records]
    assert found == expected


def test_the_format_page_says_what_numpys_generators_are_stored_as() -> None:
    rows = re.findall(
        r"^\| (\w+) \| ([\d,]+) \| (`bit_gen.*) \|$", text_of("format.md"), re.MULTILINE
    )
    assert len(rows) == 5
    for algorithm, size, names in rows:
        generator = np.random.Generator(getattr(np.random, algorithm)(7))
        expected = b""
        for name in names.replace("`", "").split(", "):
            value = generator.bit_generator.state
            for key in name.split("."):
                value = value[key]
            if isinstance(value, str):
                expected += value.encode()
            elif isinstance(value, np.ndarray):
                expected += value.tobytes()
            else:
                expected += int(value).to_bytes(16, "little")
        adapter = NumPyGeneratorAdapter(generator)
        assert adapter.pack(adapter.get()) == expected
        assert len(expected) == int(size.replace(",", ""))


# What the page on elastic resumes quotes.


def save(path: Path) -> None:
    dcp.save({"rng": StatefulRNG(seed=42, ranked=True, device="cpu")}, checkpoint_id=path)


def load_without_planner(path: Path) -> str:
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"rng": StatefulRNG(seed=42, ranked=True, device="cpu")}, checkpoint_id=path)
    return str(caught.value)


def load_and_warn(path: Path) -> list[str]:
    rng = StatefulRNG(seed=42, ranked=True, device="cpu")
    messages = warned(lambda: dcp.load({"rng": rng}, checkpoint_id=path, planner=RNGLoadPlanner()))
    return [f"RNGStateWarning: {message}" for message in messages]


def test_the_page_on_elastic_resumes_quotes_the_warnings(tmp_path: Path) -> None:
    page = " ".join(text_of("elastic.md").split())
    job(4, save, tmp_path)
    [warning], *_ = job(6, load_and_warn, tmp_path)
    assert warning in page
    error = job(2, load_without_planner, tmp_path)[0]
    quoted = re.findall(r"`(Size mismatch [^`]*)`", page)
    assert [text for text in quoted if text in error] == quoted != []


# The API reference.


def test_the_api_reference_has_every_public_name(tmp_path: Path) -> None:
    """Built as by `make docs`, where every warning is an error."""
    [modules] = re.findall(r"^API := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*shlex.split(modules), output_directory=tmp_path)
    page = (tmp_path / "nemo_rng_dcp.html").read_text()
    assert [name for name in nemo_rng_dcp.__all__ if f'id="{name}"' not in page] == []
    assert (tmp_path / "nemo_rng_dcp" / "generators" / "adapter.html").exists()
