"""A command imports what it uses: heavy packages that it does without are not waited for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import relaxprop
from relaxprop.lab.cli.main import COMMANDS, function
from relaxprop.lab.data import load
from relaxprop.lab.experiments.conditions import condition_runs
from relaxprop.lab.experiments.paper import EXPERIMENTS
from relaxprop.lab.experiments.records import write_conditions
from relaxprop.lab.results import EpochMetrics, FinishedRun

# Each takes a tenth of a second or more to import.
HEAVY = {
    "datasets", "jinja2", "matplotlib", "numpy", "pandas", "PIL", "plotly", "pyarrow", "ray", "scipy", "sklearn",
    "tensorboard", "torch", "transformers", "wandb",
}  # fmt: skip
AFTER = """
import json, runpy, sys
sys.argv[0] = "relaxprop"
try:
    runpy.run_module("relaxprop", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted(name for name in sys.modules if "." not in name)), file=sys.stderr)
"""


def imported(*args: str | Path) -> set[str]:
    """The heavy packages that a command imports in a process of its own."""
    command = [sys.executable, "-c", AFTER, *map(str, args)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return HEAVY & set(json.loads(process.stderr.splitlines()[-1]))


@pytest.fixture(scope="module")
def figure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A figure's folder, as `relaxprop reproduce` keeps it; its runs are made up."""
    folder = tmp_path_factory.mktemp("figure")
    digits, demo = load("digits"), EXPERIMENTS["demo"]
    planned = condition_runs(demo, "digits", seeds=3, epochs=1, data=digits.digest)
    runs = []
    for i, (_, config) in enumerate(planned):
        metrics = EpochMetrics(epoch=1, train_loss=1, test_accuracy=0.5 + 0.01 * (i % 7), seconds=1)
        runs.append(FinishedRun(config, [metrics], {}))
    write_conditions(demo, [name for name, _ in planned], runs, digits, folder, "relaxprop reproduce demo")
    return folder


def test_what_tells_of_the_commands_needs_no_package_but_that_of_the_command_line() -> None:
    assert imported("--help") == set()
    assert imported("--version") == set()


def test_what_reads_records_needs_no_pytorch(figure: Path, tmp_path: Path) -> None:
    assert imported("runs", figure) == set()
    # pyarrow looks by itself for what pandas would make of a list.
    arrow = {"numpy", "pandas", "pyarrow"}
    assert imported("export", figure, "--format", "csv", "--out", tmp_path / "runs.csv") <= arrow


def test_what_compares_draws_and_trains_nothing(figure: Path) -> None:
    assert imported("compare", "a", "baseline", figure) <= {"torch", "numpy", "scipy"}
    assert imported("power", figure) <= {"torch", "numpy", "scipy"}


def test_a_figure_is_seen_to_draw(figure: Path) -> None:
    """The look at the modules does see a package that is used."""
    assert {"matplotlib", "numpy", "torch"} <= imported("table", figure)


def test_the_help_lists_what_the_commands_themselves_say() -> None:
    from relaxprop.lab.cli.options import app

    listed = {str(info.name): info.help for info in app.registered_commands}
    assert listed.keys() == {name.replace("_", "-") for name in COMMANDS}
    for name in COMMANDS:
        documented = function(name).__doc__ or ""
        assert [line.strip() for line in documented.strip().splitlines()] == [
            line.strip() for line in (listed[name.replace("_", "-")] or "").splitlines()
        ]


def test_public_names_come_when_they_are_asked_for() -> None:
    code = (
        "import sys, relaxprop; assert 'torch' not in sys.modules;"
        "assert set(relaxprop.__all__) <= set(dir(relaxprop)); assert 'torch' not in sys.modules;"
        "from relaxprop import *; assert 'torch' in sys.modules;"
        "assert ActivationRelaxation is relaxprop.ActivationRelaxation is relaxprop.wrapper.ActivationRelaxation"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="'relaxprop' has no attribute 'Adam'"):
        relaxprop.Adam  # noqa: B018
