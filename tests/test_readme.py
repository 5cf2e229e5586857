"""What the README shows runs, and what it claims is what was measured. Its pages are held by `test_docs`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from relaxprop.lab.architectures import ARCHITECTURES
from relaxprop.lab.cli.main import app

ROOT = Path(__file__).parents[1]
in_a_clone = pytest.mark.skipif(
    not (ROOT / "results").is_dir(), reason="the kept results are in the repository, and not in a source distribution"
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_it_is_read_to_the_end() -> None:
    assert len(README.splitlines()) <= 150


def test_the_python_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    trained = []
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
        trained.append(names["network"][0].weight.grad is not None)
    assert trained[0]
    printed = capsys.readouterr().out
    for part in ("Alignment(cosine=", "0.feedback", "dropped", "not local"):
        assert part in printed


@pytest.mark.parametrize(
    "line", [line for b in blocks("sh") for line in b.splitlines() if line.startswith("relaxprop")]
)
def test_the_commands_exist_with_their_options(line: str) -> None:
    command, *arguments = shlex.split(line)[1:]
    help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    for argument in arguments:
        assert not argument.startswith("--") or argument in help_text


def test_the_goals_of_make_exist() -> None:
    goals = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"\bmake ([\w-]+)\b", " ".join(blocks("sh")) + " make docs")) <= set(goals)


@in_a_clone
def test_the_tables_of_claims_are_those_of_the_kept_results() -> None:
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    glance = page.partition("## At a glance\n")[2].partition("\n## ")[0]
    tables = glance[glance.index("| with |") :].strip()
    assert tables.count("| --- |") >= 2
    assert tables in README
    assert "On graphs of nine kinds" in README
    assert len(ARCHITECTURES) == 9


@in_a_clone
def test_the_table_of_rules_is_of_the_kept_results() -> None:
    kept = (ROOT / "results" / "rules-mnist" / "table.md").read_text(encoding="utf-8").splitlines()
    shown = README.partition("[The rules compared]")[2].partition("\n## ")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    assert set(rows) <= set(kept)


@in_a_clone
def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
