"""The faults that mutmut makes, and a copy of the checkout that has all of them at once."""

from __future__ import annotations

import difflib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import libcst
from mutmut.mutation import file_mutation

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("nemo_rng_dcp")
FOLDER = ROOT / "runs" / "mutants"


@dataclass
class Fault:
    """One fault; ``diff`` tells what it changes, which takes a tenth of a second."""

    name: str
    diff: Callable[[], str]

    @property
    def function(self) -> str:
        return self.name.rpartition("__mutmut_")[0]

    @property
    def module(self) -> str:
        return self.function.rpartition(".")[0]


def library_modules() -> list[str]:
    """Return the modules with functions, without the command's."""
    paths = [path.relative_to(ROOT / PACKAGE) for path in (ROOT / PACKAGE).rglob("*.py")]
    return sorted(
        str(path.with_suffix(""))
        for path in paths
        if "__" not in path.name and path.parts[0] != "cli"
    )


def copy_checkout() -> None:
    """Copy the working tree, without what git ignores but the compiled simulated device."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for folder in (FOLDER, ROOT / "build"):
        folder.mkdir(parents=True, exist_ok=True)
    (FOLDER / "build").symlink_to(ROOT / "build")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for file in map(Path, listed.stdout.splitlines()):
        if (ROOT / file).exists():
            (FOLDER / file.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, FOLDER / file)
    shutil.copy(Path(__file__).with_name("trampoline.py"), FOLDER / PACKAGE)


def plant(module: str) -> Iterator[Fault]:
    """Write a module that can become any of its faulty selves; which one, the environment says."""
    path = PACKAGE / f"{module}.py"
    source = (ROOT / path).read_text()
    tree, mutations, *ignored = file_mutation.create_mutations(str(path), source)
    mutations = [
        mutation
        for mutation in mutations
        if isinstance(mutation.contained_by_top_level_function, libcst.FunctionDef)
        and not _is_prose(mutation)
    ]
    mutated = file_mutation.combine_mutations_to_source(tree, mutations, *ignored)
    code = mutated.code.replace("from mutmut.mutation.trampoline", "from nemo_rng_dcp.trampoline")
    (FOLDER / path).write_text(code)
    dotted = ".".join(path.with_suffix("").parts)
    for name, mutation in zip(mutated.mutant_names, mutations, strict=True):
        yield Fault(f"{dotted}.{name}", partial(_diff, source, tree, mutation))


def _diff(source: str, tree: libcst.Module, mutation: Any) -> str:
    changed: Any = file_mutation.deep_replace(tree, mutation.original_node, mutation.mutated_node)
    lines = difflib.unified_diff(source.splitlines(), changed.code.splitlines(), lineterm="", n=1)
    return "\n".join(list(lines)[2:])


def _is_prose(mutation: Any) -> bool:
    """Return whether a fault is in a text for people: one with a space in it."""
    node = mutation.original_node
    return isinstance(node, libcst.SimpleString) and " " in node.value
