"""The examples that the site shows: each runs as it stands, and logs what is true."""

from __future__ import annotations

import csv
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import relaxprop
from relaxprop import ClosedForm, alignment, steps_to_converge
from tests.two_processes import as_two

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are in the repository"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*srun:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true:UserWarning"),
]


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")


def trained_by_one_process() -> float:
    """The sum of the weights after 20 steps of the plain network on the whole minibatch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
    x, labels = torch.rand(64, 20), torch.randint(4, (64,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return sum(p.sum().item() for p in network.parameters())


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("name", ["ddp", "fsdp", "accelerated"])
def test_two_processes_train_as_one_does(name: str, tmp_path: Path) -> None:
    if name == "accelerated":
        pytest.importorskip("accelerate")
    if name == "fsdp" and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("before PyTorch 2.7 fully_shard needs a GPU")
    as_two(_say, EXAMPLES / f"{name}.py", tmp_path)
    for rank in "01":
        said = (tmp_path / rank).read_text()
        (total,) = re.findall(rf"^process {rank} of 2: (-?\d+\.\d{{6}})$", said, re.M)
        assert float(total) == pytest.approx(trained_by_one_process(), abs=1e-4)


def _say(rank: int, script: Path, folder: Path) -> None:
    """Runs a script as a program, and keeps what it says in a file of the rank's."""
    with (folder / str(rank)).open("w") as out, redirect_stdout(out):
        runpy.run_path(str(script), run_name="__main__")


def read_csv(logger: Any) -> dict[str, list[float]]:
    lines = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    return {name: [float(line[name]) for line in lines if line[name]] for name in lines[0]}


def read_events(logger: Any) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logger if isinstance(logger, str | Path) else logger.log_dir))
    events.Reload()
    return {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_lightning_logs_the_relaxation_to_any_logger(kind: str, tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = getattr(loggers, kind)(tmp_path)
    learner = example("lightning_callback")["main"](logger)
    logged = read_csv(logger) if kind == "CSVLogger" else read_events(logger)
    record = learner.network.last_relaxation
    assert logged["relaxation/remaining"] == pytest.approx([record.remaining] * 8, rel=1e-6)
    assert logged["relaxation/transports"] == [record.transports] * 8
    for name, _ in learner.network.module.named_parameters():
        assert len(logged[f"cosine/{name}"]) == 4  # once in two of the eight minibatches
        assert all(0.99 < cosine <= 1 for cosine in logged[f"cosine/{name}"])


@pytest.mark.parametrize("model", ["gpt2", "vit"])
def test_the_trainer_logs_the_relaxation(model: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    script = example("trainer_callback")
    trained = script["main"](script[model], str(tmp_path))
    (events,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    logged = {name.removeprefix("train/"): values for name, values in read_events(events).items()}
    record = trained.last_relaxation
    assert len(logged["loss"]) == 3
    assert logged["relaxation/transports"] == [record.transports] * 3
    assert logged["relaxation/remaining"] == pytest.approx([record.remaining] * 3, rel=1e-6)
    cosines = [values for name, values in logged.items() if name.startswith("cosine/")]
    assert len(cosines) == 2  # of the two blocks
    assert all(cosine == pytest.approx([1, 1, 1], abs=1e-6) for cosine in cosines)


def test_optuna_finds_what_is_short_and_near() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.disable_default_handler()
    script = example("optuna_study")
    study = script["main"](trials=12)
    x, labels, network = script["x"], script["labels"], script["network"]
    for trial in study.trials:
        model = relaxprop.ActivationRelaxation(network, solver=ClosedForm(**trial.params))
        found = alignment(model, lambda y: nn.functional.cross_entropy(y, labels), x)
        assert trial.values == [max(a.distance for a in found.values()), trial.params["num_steps"]]
    # What has converged, as the depth says, is near.
    converged = [t for t in study.trials if t.params["num_steps"] >= steps_to_converge(2, t.params["step_size"], 1e-12)]
    assert converged
    assert all(t.values[0] < 1e-4 for t in converged)


def test_tensorboard_has_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = example("tensorboard_log")["main"](tmp_path, steps=3)
    logged = read_events(tmp_path)
    assert logged["relaxation/remaining"] == pytest.approx([model.last_relaxation.remaining] * 3, rel=1e-6)
    assert logged["loss"][2] < logged["loss"][0]
    names = {f"cosine/{name}" for name, _ in model.module.named_parameters()}
    assert names < set(logged)
    assert all(0.99 < cosine <= 1 for name in names for cosine in logged[name])
