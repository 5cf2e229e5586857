"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import relaxprop
from relaxprop.lab.bench.steps import USUAL
from relaxprop.lab.cli import reproduce
from relaxprop.lab.cli.main import function, main
from relaxprop.lab.cli.options import app
from relaxprop.lab.config import RunConfig
from relaxprop.lab.engines.grid import GridError
from relaxprop.lab.experiments import convergence, paper
from relaxprop.lab.experiments.conditions import condition_runs
from relaxprop.lab.experiments.paper import EXPERIMENTS
from relaxprop.lab.rules import OTHERS

COMMANDS = (
    "train", "reproduce", "report", "show", "convergence", "bench", "runs", "export", "compare", "power", "table",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RELAXPROP_DATA", raising=False)


def invoke(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[│╭╮╰╯─\s]+", " ", result.output)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str) -> None:
    status, text = invoke(command, "--help")
    assert status == 0
    assert "--help" in text
    for line in (function(command).__doc__ or "").splitlines():
        assert line.strip() in text


def test_help_and_version() -> None:
    status, text = invoke("--help")
    assert status == 0
    assert all(command in text for command in COMMANDS)
    assert invoke("--version") == (0, f"relaxprop {relaxprop.__version__} ")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("train", "--dataset", "a/b"), ("--dataset", "a/b")),
        (("train", "--model", "vgg"), ("'--model'", "vgg", "mlp")),
        (("train", "--rule", "hebb"), ("'--rule'", "hebb", "ar", "backprop")),
        (("train", "--solver", "magic"), ("'--solver'", "closed-form", "euler", "continuous", "equilibrium")),
        (("train", "--order", "random"), ("'--order'", "simultaneous", "sequential", "asynchronous")),
        (("train", "--step-size", "2"), ("--step-size", "--step-size must be in (0, 2)", "got 2.0")),
        (("train", "--order", "asynchronous"), ("--order", "'simultaneous', 'sequential'", "'asynchronous'")),
        (("train", "--rule", "backprop", "--solver", "euler"), ("--solver", "no effect", "backprop")),
        (("train", "--num-steps", "0"), ("--num-steps must be at least 1, got 0",)),
        (("train", "--num-steps", "many"), ("'--num-steps'", "valid integer")),
        (("train", "--solver", "equilibrium", "--step-size", "0.5"), ("--step-size", "no effect", "equilibrium")),
        (("train", "--rule", "backprop", "--num-steps", "9"), ("--num-steps", "no effect", "backprop")),
        (("train", "--epochs", "0"), ("--epochs", "greater than or equal to 1, got 0")),
        (("train", "--seed", "-1"), ("--seed", "greater than or equal to 0")),
        (("train", "--learning-rate", "-1"), ("--learning-rate", "greater than 0, got -1")),
        (("reproduce", "demo", "--epochs", "-5"), ("'--epochs'", "greater than or equal to 1")),
        (("train", "--device", "abacus"), ("--device", "abacus")),
        (("train", "--epoch", "3"), ("No such option", "--epochs")),
        (("reproduce", "figure9"), ("figure9", "demo", "figure1", "appendix-c")),
        (("reproduce",), ("Missing argument", "demo")),
        (("reproduce", "demo", "--seeds", "0"), ("'--seeds'", "greater than or equal to 1")),
        (("train", "--feedback", "learned", "--feedback", "all=random"), ("--feedback", "second time")),
        (
            ("reproduce", "figure1", "--condition", "z"),
            ("--condition must be", "backprop, baseline, a, b, c, d", "'z'"),
        ),
        (("reproduce", "demo", "--dataset", "a/b"), ("--dataset", "a/b")),
        (("train", "--feedback", "hebb"), ("--feedback", "hebb", "learned")),
        (("train", "--feedback", "head=learned"), ("--feedback", "head", "convolutional")),
        (("train", "--drop-derivatives", "all=never"), ("--drop-derivatives", "never", "relaxation")),
        (("train", "--rule", "backprop", "--feedback", "learned"), ("--feedback", "no effect", "backprop")),
        (("train", "--rule", "backprop", "--alignment-every", "9"), ("--alignment-every", "no effect", "backprop")),
        (("train", "--alignment-every", "-1"), ("'--alignment-every'", "greater than or equal to 0")),
        (("train", "--rule", "backprop", "--vertices", "operations"), ("--vertices", "no effect", "backprop")),
        (("train", "--rule", "backprop", "--initial", "zero"), ("--initial", "no effect", "backprop")),
        (("train", "--initial", "ones"), ("'--initial'", "feedforward", "zero")),
        (("defaults", "--depth", "0"), ("'--depth'", "greater than or equal to 1")),
        (("train", "--loss", "hinge"), ("'--loss'", "squared-error", "cross-entropy")),
        (("train", "--unfreeze", "weights"), ("'--unfreeze'", "relaxation-derivative", "update-activity")),
        (("train", "--unfreeze", "input"), ("--unfreeze", "--unfreeze input has no effect")),
        (("train", "--rule", "backprop", "--unfreeze", "input"), ("--unfreeze", "no effect", "backprop")),
        (
            ("train", "--solver", "closed-form", "--unfreeze", "relaxation-derivative"),
            (": --solver closed-form sums powers", "with --unfreeze relaxation-derivative", "--solver euler"),
        ),
        (("convergence", "--step-size", "3"), ("--step-size must be in (0, 2)", "got 3.0")),
        (("gradients", "--architecture", "perceptron"), ("--architecture", "'perceptron'", "mlp, cnn, resnet-18")),
        (("gradients", "--step-size", "2"), ("--step-size must be in (0, 2)", "got 2.0")),
        (("gradients", "--step-size", "1e-300"), ("--step-size", "too small for floating-point")),
        (("bench", "--model", "resnet"), ("--model", "must be one of mlp, cnn, cnn-as-coded, resnet-18", "'resnet'")),
        (("bench", "--model", "chain-0"), ("--model", "N must be at least 1", "'chain-0'")),
        (("bench", "--batch-size", "0"), ("'--batch-size'", "greater than or equal to 1")),
        (("bench", "--device", "abacus"), ("--device", "abacus")),
        (("bench", "--rule", "hebb"), ("--rule", "hebb", "drtp")),
        (("bench", "--rule", "pc", "--solver", "paper"), ("--solver", "no effect with --rule pc")),
        (("bench", "--solver", "magic"), ("--solver", "magic", "closed-form", "paper")),
        (("bench", "--what", "speed"), ("'--what'", "speed", "start-up")),
        (("bench", "--what", "scaling", "--model", "cnn"), ("--model", "no effect without --what steps")),
        (("bench", "--what", "start-up", "--device", "cpu"), ("--device", "no effect with --what start-up alone")),
        (("bench", "--image-size", "64"), ("--image-size", "no effect without --model resnet-18")),
        (("bench", "--model", "resnet-18", "--image-size", "16"), ("--image-size", "greater than or equal to 32")),
        (("bench", "--model", "resnet-18", "--batch-size", "1"), ("batch size must be at least 2 for resnet-18",)),
        (
            ("bench", "--model", "chain-4", "--compile-steps"),
            ("--compile-steps", "no effect without --model mlp"),
        ),
        (("bench", "--solver", "paper", "--compile-steps"), ("--compile-steps", "the solvers paper and euler")),
        (("bench", "--what", "scaling", "--compile-steps"), ("--compile-steps", "no effect without --what steps")),
        (("bench", "--against", "."), ("--against", "holds neither TorchSeq2PC.py")),
        (("bench", "--against", "nowhere"), ("--against", "nowhere is neither the name Torch2PC nor a folder")),
        (("convergence", "--model", "transformer"), ("'--model'", "cnn-as-coded")),
        (("reproduce", "graphs", "--dataset", "digits"), ("--dataset must be one of docstrings, cifar10", "'digits'")),
        (
            ("train", "--vertices", "operations", "--unfreeze", "update-activity"),
            ("--vertices", "no update reads both", "update-activity has no meaning", "--vertices activations"),
        ),
        (("depth", "--layers", "0"), ("'--layers'", "greater than or equal to 1")),
        (("bench", "--rounds", "1"), ("'--rounds'", "greater than or equal to 2")),
        (("train", "--dataset", "imagenet"), ("--dataset", "must be one of digits, docstrings, mnist", "'imagenet'")),
        (("convergence", "--dataset", "imagenet"), ("--dataset", "cifar10, cifar100, svhn", "'imagenet'")),
        (("reproduce", "demo", "--dataset", "imagenet"), ("imagenet", "must be one of")),
        (("learn",), ("No such command", "learn")),
        (("train", "--seed", str(2**63)), ("--seed", "less than or equal to 9223372036854775807")),
        (("convergence", "--seed", str(2**63)), ("--seed", "less than or equal to 9223372036854775807")),
        (("train", "--feedback", "=learned"), ("--feedback", "'=learned' names no part before the '='")),
        (("train", "--drop-derivatives", "=both"), ("--drop-derivatives", "'=both' names no part")),
        (("train", "--threads", "0"), ("'--threads'", "greater than or equal to 1")),
        (("reproduce", "demo", "--workers", "0"), ("'--workers'", "greater than or equal to 1")),
        (("reproduce", "demo", "--workers", "two"), ("'--workers'", "valid integer")),
        (("reproduce", "demo", "--engine", "slurm"), ("'--engine'", "processes", "ray")),
        (("reproduce", "demo", "--address", "host:1"), ("--address", "no effect without --engine ray")),
        (("reproduce", "demo", "--gpus", "1"), ("--gpus", "no effect without --engine ray")),
        (("reproduce", "demo", "--engine", "ray", "--workers", "2"), ("--workers", "workers of its own")),
    ],
)
def test_wrong_usage_is_explained_with_status_2(args: tuple[str, ...], parts: tuple[str, ...]) -> None:
    status, text = invoke(*args)
    assert status == 2
    for part in parts:
        assert part in text


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["relaxprop", *args])
    with pytest.raises(SystemExit) as exit_info:
        main()
    code = exit_info.value.code
    assert isinstance(code, int)
    return code


def test_missing_data_and_unwritable_folders_are_errors_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "train", "--model", "cnn") == 2
    assert "error: the CNN needs images of at least 14×14 pixels, got 8×8" in capsys.readouterr().err
    assert run_main(monkeypatch, "train", "--feedback", "convolutional=learned") == 2
    assert "the network has no part 'convolutional'" in capsys.readouterr().err
    assert run_main(monkeypatch, "train", "--dataset", "mnist", "--data-dir", str(tmp_path)) == 1
    assert "mnist/train.parquet does not exist" in capsys.readouterr().err
    (tmp_path / "file").write_text("kept")
    for args in (
        ("train", "--runs", "file"),
        ("reproduce", "demo", "--out", "file/figures"),
        ("convergence", "--out", "file"),
        ("bench", "--out", "file"),
    ):
        assert run_main(monkeypatch, *args) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: cannot write to the folder")
        assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ((), 0, "pip install 'relaxprop[lab]'"),
        (("--help",), 0, "pip install 'relaxprop[lab]'"),
        (("--version",), 0, f"relaxprop {relaxprop.__version__}\n"),
        (("train",), 1, "error: the command line needs the package typer: pip install 'relaxprop[lab]'"),
    ],
)
def test_without_the_lab_extra_the_command_says_what_to_install(
    arguments: tuple[str, ...], status: int, says: str
) -> None:
    """In a process of its own, in which the packages of the extra cannot be imported."""
    extra = ("typer", "pydantic", "rich", "datasets", "safetensors", "sklearn", "matplotlib", "transformers", "pyarrow")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extra!r})); sys.argv = ['relaxprop', *{arguments!r}]; "
        "from relaxprop.__main__ import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == status, ended.stderr
    assert says in (ended.stderr if status else ended.stdout)
    assert "Traceback" not in ended.stderr


def test_train_says_what_it_did_and_where_it_is(tmp_path: Path) -> None:
    args = ("train", "--epochs", "1", "--solver", "euler", "--num-steps", "3", "--order", "sequential", "--seed", "4")
    status, text = invoke(*args)
    assert status == 0
    assert "epoch 1/1 test accuracy" in text
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name in text.replace(" ", "")
    config = json.loads((folder / "config.json").read_text())
    assert config["solver_options"] == {"step_size": 0.1, "num_steps": 3, "order": "sequential", "tolerance": None}
    assert (config["seed"], config["learning_rate"], config["batch_size"]) == (4, 0.0005, 64)


def test_show_tells_what_a_run_was_and_what_its_updates_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert invoke("train", "--epochs", "2", "--unfreeze", "update-activity")[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    folder.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", folder)
    for name in (folder.name, str(folder), "moved"):
        status, text = invoke("show", name)
        assert status == 0
        for part in ('"update_activity": false', "torch 2.", "epoch 2: test accuracy", "pre: x of tanh1"):
            assert part in text
        assert "transposed" in text
        assert "weight transport: W is known only to" in text
    assert run_main(monkeypatch, "show", "another") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no run in runs/another: config.json is missing; in runs are digits-mlp-ar-seed0-")
    for damage in ("{}}", "[]", '{"frozen": {"weights": false}}'):
        (folder / "config.json").write_text(damage)
        assert run_main(monkeypatch, "show", folder.name) == 1
        assert "is damaged" in capsys.readouterr().err


def test_train_with_an_unfrozen_pass(tmp_path: Path) -> None:
    args = ("train", "--epochs", "1", "--num-steps", "2", "--unfreeze", "relaxation-derivative", "--unfreeze", "input")
    assert invoke(*args)[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "config.json").read_text())
    assert config["solver"] == "euler"
    assert config["frozen"] == {
        "relaxation_derivative": False,
        "update_derivative": True,
        "update_activity": True,
        "input": False,
    }


def test_train_with_simplifications(tmp_path: Path) -> None:
    args = ("train", "--epochs", "1", "--feedback", "learned", "--drop-derivatives", "all=update")
    assert invoke(*args)[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    config = json.loads((folder / "config.json").read_text())
    assert config["feedback"] == {"all": "learned"}
    assert config["dropped"] == {"all": "update"}
    assert "linear2.feedback" in (folder / "locality.json").read_text()


def test_alignment_and_certificate_of_a_run(tmp_path: Path) -> None:
    args = ("reproduce", "demo", "--epochs", "1", "--seeds", "1", "--condition", "b", "--alignment-every", "20")
    status, text = invoke(*args)
    assert status == 0
    assert "figures/demo-digits/alignment.png" in text
    (run, *_) = (tmp_path / "runs").glob("digits-mlp-ar-*")
    certificate = json.loads((run / "certificate.json").read_text())
    assert list(certificate) == ["tanh3", "tanh2", "tanh1"]
    assert certificate["tanh3"] == pytest.approx(0.9**100)  # no hop in 100 steps of 0.1
    status, text = invoke("show", run.name)
    assert status == 0
    assert "weight of the initial state after the relaxation phase" in text
    assert "0.00266 %" in text


def test_train_on_a_users_folder(data_dir: Path) -> None:
    status, text = invoke("train", "--dataset", "mnist", "--data-dir", str(data_dir), "--epochs", "1")
    assert status == 0
    assert "test accuracy" in text


def test_the_demo_prints_its_table_and_ends_with_its_paths(tmp_path: Path) -> None:
    args = ("reproduce", "demo", "--epochs", "1", "--seeds", "1")
    status, text = invoke(*args)
    assert status == 0
    for condition in paper.UNFROZEN.values():
        assert condition.title in text
    for name in ("table.md", "accuracy.csv", "summary.json", "accuracy.png", "convergence.png"):
        assert f"figures/demo-digits/{name}" in text
        assert (tmp_path / "figures" / "demo-digits" / name).stat().st_size > 0
    assert text.rstrip().endswith("figures/demo-digits/report.html")
    page = (tmp_path / "figures" / "demo-digits" / "report.html").read_text(encoding="utf-8")
    assert "Convergence of the relaxation phase: digits" in page
    assert page.count("update by update") == 5  # the locality of every condition but backpropagation
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    assert len(before) == 6
    assert invoke(*args)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_convergence_writes_curves_and_figure(tmp_path: Path) -> None:
    args = ("convergence", "--step-size", "0.5", "--step-size", "1", "--num-steps", "4", "--order", "sequential")
    status, text = invoke(*args)
    assert status == 0
    folder = tmp_path / "figures" / "convergence-digits"
    assert {path.name for path in folder.iterdir()} == {"convergence.csv", "convergence.json", "convergence.png"}
    lines = (folder / "convergence.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 8 * 5  # step sizes × parameters × (start and four steps)
    assert "linear1.weight" in text
    assert json.loads((folder / "convergence.json").read_text())["largest_deviation"] < 1e-12


def test_gradients_of_some_architectures(tmp_path: Path) -> None:
    status, text = invoke("gradients", "--small", "--rounds", "1", "--architecture", "gru", "--architecture", "mixture")
    assert status == 0
    folder = tmp_path / "figures" / "gradients"
    names = {"table.md", "gradients.json", "asynchronous.json", "asynchronous.png"}
    assert {path.name for path in folder.iterdir()} == names
    kept = json.loads((folder / "gradients.json").read_text())
    assert [c["architecture"] for c in kept["comparisons"]] == ["gru", "mixture"]
    assert all(error < kept["bound"] for c in kept["comparisons"] for error in c["errors"].values())
    assert "GRU unrolled over time" in (folder / "table.md").read_text()
    assert "mixture" in text


def test_the_cost_of_depth(tmp_path: Path) -> None:
    status, text = invoke("depth", "--layers", "3", "--layers", "2", "--width", "4", "--rounds", "1", "--out", "d")
    assert status == 0
    assert "2 layers" in text
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"table.md", "depth.json", "depth.png"}


def test_bench_prints_what_it_writes(tmp_path: Path) -> None:
    args = ("bench", "--model", "mlp", "--model", "chain-2", "--rounds", "2", "--batch-size", "2", "--out", "kept")
    status, text = invoke(*args)
    assert status == 0
    folder = tmp_path / "kept"
    assert {path.name for path in folder.iterdir()} == {"bench.json", "table.md", "costs.png"}
    written = json.loads((folder / "bench.json").read_text())
    mlp, chain = written["benchmarks"]
    assert len(mlp["costs"]) == 1 + len(USUAL) + len(OTHERS)
    assert len(chain["costs"]) == 1 + len(USUAL)
    for benchmark in (mlp, chain):
        assert all(cost["rule"] in text for cost in benchmark["costs"])
    assert all(ratio["what"] in text for ratio in mlp["ratios"])
    for part in ("chain-2, batch 2, cpu", "quartiles", "peak KiB", "operations", "floor"):
        assert part in text
    assert written["environment"]["processor"]
    for name in ("table.md", "costs.png"):
        (folder / name).unlink()
    status, again = invoke("table", "kept")
    assert status == 0
    assert {path.name for path in folder.iterdir()} == {"bench.json", "table.md", "costs.png"}
    assert again.partition("kept/")[0] in text


def test_bench_measures_each_size_of_minibatch() -> None:
    args = ("bench", "--model", "chain-1", "--solver", "equilibrium", "--batch-size", "2", "--batch-size", "3")
    status, text = invoke(*args, "--rounds", "2")
    assert status == 0
    assert [f"chain-1, batch {n}, cpu: 2 interleaved" in text for n in (2, 3)] == [True, True]
    assert "Euler" not in text


def test_control_c_stops_at_once_and_keeps_finished_epochs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "relaxprop", "train", "--epochs", "100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        # A shell has what it starts in the background ignore the signal, and the tests hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    assert "epoch   1/100000" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "stopped: the finished epochs are in runs/" in errors
    assert "Traceback" not in errors
    (metrics,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    finished = len(metrics.read_text().splitlines())
    status, _ = invoke("train", "--epochs", str(finished))
    assert status == 0


def test_an_interrupted_figure_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run_all", interrupt)
    assert run_main(monkeypatch, "reproduce", "demo") == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_the_default_step_sizes_are_those_that_help_names() -> None:
    _, text = invoke("convergence", "--help")
    assert f"(default: {' '.join(map(str, convergence.STEP_SIZES))})" in text


@pytest.mark.parametrize("options", [(), ("--solver", "equilibrium"), ("--unfreeze", "update-activity")])
def test_train_as_the_code_has_it_is_the_figures_run(options: tuple[str, ...], tmp_path: Path) -> None:
    status, _ = invoke("train", "--as-coded", "--epochs", "1", "--runs", str(tmp_path), *options)
    assert status == 0
    (path,) = tmp_path.glob("*/config.json")
    config = RunConfig.model_validate_json(path.read_text())
    assert config.left_out == 2
    if options[:1] != ("--solver",):
        experiment = EXPERIMENTS["demo"]
        runs = dict(condition_runs(experiment, "digits", seeds=1, epochs=1, data=config.data, as_coded=True))
        assert config == runs["d" if options else "baseline"]


@pytest.mark.parametrize("arguments", [("--help",), ("reproduce", "--help"), ("take-over", "no", "--help")])
def test_output_into_a_closed_pipe_ends_quietly(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "relaxprop", *arguments]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""


def test_what_is_logged_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(*args: object, **kwargs: object) -> None:
        logging.getLogger("relaxprop.lab.store").warning("run %s [is] computed elsewhere", "a")
        raise GridError("1 of 2 runs have failed")

    monkeypatch.setattr(reproduce, "run_all", failing)
    assert run_main(monkeypatch, "reproduce", "demo") == 1
    errors = capsys.readouterr().err
    assert "run a [is] computed elsewhere\n" in errors
    assert errors.endswith("error: 1 of 2 runs have failed\n")
