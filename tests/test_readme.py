"""README shows what runs: its snippets are run, its demo table is the demo's."""

import re
from pathlib import Path

import pytest

import records
from nemo_rng_dcp.cli.main import main
from scripts.demo import __main__ as demo
from scripts.demo import leaving
from scripts.demo.launch import torchrun
from test_demo import write_losses

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.split("\n")[0])
def test_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "snippet.py"
    # A reader's script has a life after its last line; see leaving.py.
    script.write_text(f"{snippet}\nimport time\n\ntime.sleep({leaving.SECONDS})\n")
    torchrun(script, 2 if "init_process_group" in snippet else 1)


def test_a_runnable_example_is_in_the_first_30_lines() -> None:
    lines = README.splitlines()
    assert "```python" in lines[:30]
    assert lines[lines.index("```python") :].index("```") + lines.index("```python") < 30


def test_the_demo_table_is_what_the_demo_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = write_losses(tmp_path / "uninterrupted", 0.5)
    rank_less = write_losses(tmp_path / "rank-less", 0.5)
    for rank in range(demo.RANKS):
        file = rank_less / f"losses-rank{rank}.txt"
        changed = [
            line if int(line.split()[0]) < 20 else line.replace("p+", "p-")
            for line in file.read_text().splitlines(keepends=True)
        ]
        file.write_text("".join(changed))
    demo.report_losses(uninterrupted, uninterrupted, rank_less)
    assert capsys.readouterr().out in README


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_commands_print_what_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the digits and the versions."""

    def masked(text: str) -> str:
        text = re.sub(r"[0-9a-f]{12}", "0" * 12, text)
        return re.sub(r"saved by .*", "saved by", text)

    records.save(records.records(4), tmp_path / "step-00000020")
    records.save(records.records(4), tmp_path / "step-00000030")
    blocks = re.findall(r"^\$ nemo-rng-dcp (.*)\n([^$`]*)", README, re.MULTILINE)
    assert [words.split()[0] for words, _ in blocks] == ["inspect", "diff", "explain"]
    monkeypatch.chdir(tmp_path)
    for words, shown in blocks:
        main(words.replace("../../uninterrupted/checkpoints/", "").split())
        assert masked(capsys.readouterr().out).strip() == masked(shown).strip()


def test_every_module_is_in_the_readme() -> None:
    package = Path(__file__).parent.parent / "nemo_rng_dcp"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    listed = set(re.findall(r"^\| `([\w/]+\.py)`", README, re.MULTILINE))
    assert listed == {module for module in modules if not module.endswith("__init__.py")}
