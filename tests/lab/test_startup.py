"""A command imports what it uses: heavy packages that it does without are not waited for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
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
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["relaxprop", *arguments]
    try:
        runpy.run_module("relaxprop", run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
    print(json.dumps(sorted(name for name in sys.modules if "." not in name)), file=sys.stderr)
"""


def imported(*commands: Sequence[str | Path]) -> list[set[str]]:
    """The heavy packages that are there after each of the commands, one after the other in a process of their own."""
    command = [sys.executable, "-c", AFTER, json.dumps([[str(part) for part in each] for each in commands])]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return [HEAVY & set(json.loads(line)) for line in process.stderr.splitlines() if line.startswith('["')]


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


def test_what_tells_of_the_commands_needs_no_package_and_what_reads_records_needs_no_pytorch(
    figure: Path, tmp_path: Path
) -> None:
    export = ("export", figure, "--format", "csv", "--out", tmp_path / "runs.csv")
    *without, exported = imported(("--help",), ("--version",), ("runs", figure), export)
    assert without == [set(), set(), set()]
    assert exported <= {"numpy", "pandas", "pyarrow"}  # pyarrow looks by itself for what pandas would make of a list


def test_what_compares_draws_and_trains_nothing_and_a_figure_is_seen_to_draw(figure: Path) -> None:
    """The look at the modules does see a package that is used."""
    *compared, drawn = imported(("compare", "a", "baseline", figure), ("power", figure), ("table", figure))
    assert len(compared) == 2
    assert all(packages <= {"torch", "numpy", "scipy"} for packages in compared)
    assert {"matplotlib", "numpy", "torch"} <= drawn


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
