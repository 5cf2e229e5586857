"""Many seeds trained as one network: each of them as in a run of its own, whatever becomes of the others."""

from __future__ import annotations

import io
import json
import math
import runpy
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from relaxprop import ActivationRelaxation, Frozen
from relaxprop.lab import models, training
from relaxprop.lab.batched import BatchedLinear, batched, of_seeds, side_by_side
from relaxprop.lab.checkpoint import kept_checkpoint
from relaxprop.lab.cli.progress import GridProgress
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.distributed import Group
from relaxprop.lab.engines.grid import GridError, run_all
from relaxprop.lab.engines.processes import processes
from relaxprop.lab.engines.work import ATTEMPTS, EpochDone, Event, Failed, Finished, Job, Started, died
from relaxprop.lab.graphed import GraphedStep
from relaxprop.lab.models import ModelError
from relaxprop.lab.results import BATCHED, EpochMetrics
from relaxprop.lab.store import Record, read_lines
from relaxprop.lab.training import epochs_at_once, train
from relaxprop.vertices import does_as_its_class_says
from tests.lab.problem import few_digits, invoke, learning
from tests.test_devices import every_device, no_gpu

SEEDS = 3
A: dict[str, Any] = {"frozen": {"relaxation_derivative": False}, "solver_options": {"num_steps": 6}}
CONDITIONS: dict[str, dict[str, Any]] = {
    "backpropagation": {"rule": "backprop"},
    "PAPER": {},
    "until converged": {"solver_options": {"num_steps": None}},
    "from zero": {"initial": "zero"},
    "Euler": {"solver": "euler", "solver_options": {"num_steps": 6}},
    "sequential": {"solver": "euler", "solver_options": {"num_steps": 6, "order": "sequential"}},
    "continuous": {"solver": "continuous"},
    "equilibrium": {"solver": "equilibrium"},
    "modules": {"vertices": "modules"},
    "a": A,
    "b": {"frozen": {"update_derivative": False}},
    "c": A | {"frozen": {"relaxation_derivative": False, "update_derivative": False}},
    "d": {"frozen": {"update_activity": False}},
    "d, input too": {"frozen": {"update_activity": False, "input": False}},
    "learned": {"feedback": {"all": "learned"}},
    "random": {"feedback": {"all": "random"}},
    "learned, a": A | {"feedback": {"all": "learned"}},
    "dropped": {"dropped": {"all": "both"}},
    "dropped in (1)": {"dropped": {"all": "relaxation"}},
    "learned, dropped in (2)": {"feedback": {"all": "learned"}, "dropped": {"all": "update"}},
    "Adam": {"optimizer": "adam", "learning_rate": 1e-3, "loss": "cross-entropy"},
    "other data": {"signed_inputs": True, "left_out": 1, "validation": 7},
}
PARTS: dict[str, dict[str, Any]] = {  # of the CNN
    "ψ-conv": {"feedback": {"convolutional": "learned"}, "dropped": {"fully_connected": "both"}},
    "ψ-fc": {"feedback": {"fully_connected": "random", "convolutional": "learned"}, "convolutional_factor": 2.0},
}
SMALL = {"mlp": (1, 5, 4), "cnn": (3, 14, 15), "cnn-as-coded": (3, 14, 14)}


def pictures(model: str, dtype: torch.dtype = torch.float64) -> Dataset:
    """Minibatches of 4 and a last one of 3, random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(23, *SMALL[model], generator=generator, dtype=dtype)
    split = Split(images, torch.arange(23) % 10)
    return Dataset("pictures", tuple("0123456789"), split, split)


def seeds(count: int = SEEDS, **options: Any) -> list[RunConfig]:
    values: dict[str, object] = {"epochs": 1, "batch_size": 4, **options}
    return [RunConfig.model_validate(values | {"seed": seed}) for seed in range(count)]


@pytest.fixture
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    """All networks in float64."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda *args, **kwargs: build(*args, **kwargs).double())


def at_once(configs: Sequence[RunConfig], dataset: Dataset, root: Path | None = None) -> list[list[EpochMetrics]]:
    found: dict[str, list[EpochMetrics]] = {config.id: [] for config in configs}
    for config, metrics, _ in epochs_at_once(configs, dataset, root=root):
        found[config.id].append(metrics)
    return list(found.values())


def tensors(config: RunConfig, root: Path) -> dict[str, Tensor]:
    """Weights and the optimiser's state."""
    checkpoint = kept_checkpoint(root / config.id)
    assert checkpoint is not None
    return dict(checkpoint.tensors)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest, relative to the norm."""
    assert one.keys() == other.keys()
    assert [x.shape for x in one.values()] == [other[name].shape for name in one]
    return max(float((x - other[name]).norm() / (other[name].norm() or 1)) for name, x in one.items())


def check_equal(configs: Sequence[RunConfig], dataset: Dataset, folder: Path, allowed: float) -> None:
    """Every seed beside its own run: metrics, and what is left in its folder."""
    together = at_once(configs, dataset, folder / "together")
    for config, found in zip(configs, together, strict=True):
        expected = train(config, dataset, root=folder / "single")
        for one, other in zip(learning(found), learning(expected), strict=True):
            assert one == pytest.approx(other, rel=allowed, abs=0)
        assert distance(*(tensors(config, folder / way) for way in ("together", "single"))) < allowed
        for name in ("config.json", "locality.json", "certificate.json"):
            files = [folder / way / config.id / name for way in ("together", "single")]
            assert files[0].exists() == files[1].exists()
            if files[0].exists():
                assert files[0].read_bytes() == files[1].read_bytes()
    weights = [tensors(config, folder / "together") for config in configs]
    assert distance(weights[0], weights[1]) > 0.1  # so that a mix-up would be seen


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_seed_is_its_own_run(condition: str, tmp_path: Path) -> None:
    check_equal(seeds(**CONDITIONS[condition]), pictures("mlp"), tmp_path, 1e-10)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("condition", [*PARTS, "backpropagation", "PAPER", "a", "c", "d, input too", "modules", "Adam"])
@pytest.mark.parametrize("model", ["cnn", "cnn-as-coded"])
def test_every_seed_of_a_convolutional_network_is_its_own_run(model: str, condition: str, tmp_path: Path) -> None:
    options = (CONDITIONS | PARTS)[condition]
    check_equal(seeds(2, model=model, **options), pictures(model), tmp_path, 1e-10)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("condition", ["PAPER", "a", "learned", "learned, dropped in (2)"])
def test_alignment_is_measured_on_each_seeds_own_network(model: str, condition: str, tmp_path: Path) -> None:
    options = CONDITIONS[condition] | {"alignment_every": 2, "epochs": 2}
    configs = seeds(2, model=model, **options)
    check_equal(configs, pictures(model), tmp_path, 1e-10)
    found = [Record(config, tmp_path / "together").finished_epochs() for config in configs]
    expected = [Record(config, tmp_path / "single").finished_epochs() for config in configs]
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert [sample.epochs for sample in one.alignment] == [sample.epochs for sample in other.alignment]
        assert len(one.alignment) == 3
        for sample, reference in zip(one.alignment, other.alignment, strict=True):
            assert sample.gradients == pytest.approx(reference.gradients, abs=1e-10)
            assert sample.feedback == pytest.approx(reference.feedback, abs=1e-10)
    assert found[0][0].alignment[0].gradients != pytest.approx(found[1][0].alignment[0].gradients, abs=1e-10)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("condition", ["backpropagation", "PAPER", "a", "c"])
def test_in_float32_to_its_rounding(model: str, condition: str, tmp_path: Path) -> None:
    """Rounding is 6e-8; 6 minibatches."""
    check_equal(seeds(2, model=model, **CONDITIONS[condition]), pictures(model, torch.float32), tmp_path, 1e-5)


@every_device
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("condition", ["backpropagation", "PAPER", "c", "learned", "Adam"])
def test_on_every_device(device: str, condition: str, model: str) -> None:
    """Beside single runs on the processor; in float32, which a GPU may round to 10 bits in products."""
    configs, dataset = seeds(2, model=model, **CONDITIONS[condition]), pictures(model, torch.float32)
    found = run_all(configs, dataset, root=None, device=device, batched_seeds=True)
    for run in found:
        (single,) = train(run.config, dataset)
        assert run.metrics[0].train_loss == pytest.approx(single.train_loss, rel=1e-5 if device == "cpu" else 2**-10)


def test_gradients_are_those_of_the_seeds_own_networks() -> None:
    """One backward pass of a sum over seeds of a mean over each seed's samples; no seed's gradient knows of another."""
    dataset = pictures("mlp")
    own = [models.build("mlp", dataset, seed=seed).double() for seed in range(SEEDS)]
    expected = []
    for model, rows in zip(own, torch.arange(15).view(SEEDS, 5), strict=True):
        output = ActivationRelaxation(model)(dataset.train.images[rows])
        nn.functional.cross_entropy(output, dataset.train.labels[rows]).backward()  # type: ignore[no-untyped-call]
        expected.append([p.grad for p in model.parameters()])
    network = batched(own)
    index = torch.arange(15).view(SEEDS, 5)
    outputs = ActivationRelaxation(network)(side_by_side(dataset.train.images[index.T]))
    losses = torch.func.vmap(nn.functional.cross_entropy)(outputs, dataset.train.labels[index])
    losses.sum().backward()  # type: ignore[no-untyped-call]
    for seed in range(SEEDS):
        for (name, parameter), wanted in zip(network.named_parameters(), expected[seed], strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(of_seeds(network, name, parameter.grad)[seed], wanted, rtol=1e-12, atol=1e-14)


def test_the_seeds_own_networks_are_trained_with_it() -> None:
    dataset = pictures("cnn", torch.float32)
    own = [models.build("cnn", dataset, seed=seed) for seed in range(2)]
    before = [[p.clone() for p in model.parameters()] for model in own]
    network = batched(own)
    assert all(
        torch.equal(x, p)
        for was, model in zip(before, own, strict=True)
        for x, p in zip(was, model.parameters(), strict=True)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    assert all(
        torch.equal(2 * x, p)
        for was, model in zip(before, own, strict=True)
        for x, p in zip(was, model.parameters(), strict=True)
    )
    images = dataset.train.images[:3]
    together = network(side_by_side(images.unsqueeze(1).expand(-1, 2, -1, -1, -1)))
    for model, output in zip(own, together, strict=True):
        torch.testing.assert_close(output, model(images))


# ------------------------------------------------------------------------------------------------- one that diverges


@pytest.mark.parametrize(("model", "condition"), [("mlp", "PAPER"), ("mlp", "c"), ("mlp", "learned"), ("cnn", "PAPER")])
@pytest.mark.parametrize("size", [1e25, math.nan])
def test_a_seed_that_diverges_is_recorded_alone(
    model: str, condition: str, size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second seed's weights are this large, and its own run comes to no number."""
    build = models.build

    def huge(name: str, dataset: Dataset, *, seed: int, **options: object) -> nn.Module:
        network = build(name, dataset, seed=seed, **options)  # type: ignore[arg-type]
        if seed == 1:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(size)
        return network

    monkeypatch.setattr(models, "build", huge)
    dataset = pictures(model, torch.float32)
    configs = seeds(epochs=2, model=model, **CONDITIONS[condition])
    found = run_all(configs, dataset, root=tmp_path, batched_seeds=True)
    single = run_all(configs, dataset, root=None)
    assert not math.isfinite(single[1].metrics[-1].train_loss)
    assert not math.isfinite(found[1].metrics[-1].train_loss)
    assert found[1].metrics[-1].test_accuracy == single[1].metrics[-1].test_accuracy
    for one, other in zip((found[0], found[2]), (single[0], single[2]), strict=True):
        assert math.isfinite(other.metrics[-1].train_loss)
        for a, b in zip(learning(one.metrics), learning(other.metrics), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert all(bool(x.isfinite().all()) for x in tensors(one.config, tmp_path).values())
    progress = GridProgress(configs, {c.id: c.id for c in configs}, Console(file=io.StringIO()))
    for run in found:
        progress(EpochDone(run.config.id, run.metrics[-1], True))
    assert progress.diverged == {configs[1].id}
    # And they go on from there.
    longer = [config.model_copy(update={"epochs": 3}) for config in configs]
    again = run_all(longer, dataset, root=tmp_path, batched_seeds=True)
    assert [math.isfinite(run.metrics[-1].train_loss) for run in again] == [True, False, True]


# ------------------------------------------------------------------------------------------------------------ on disk


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_interrupted_group_goes_on_from_where_each_seed_was(optimizer: str, tmp_path: Path) -> None:
    """One seed was finished by itself, one has an epoch of its own, and the group stops between two seeds."""
    dataset = pictures("mlp")
    configs = seeds(5, epochs=4, optimizer=optimizer, learning_rate=1e-3)
    train(configs[0], dataset, root=tmp_path)
    train(configs[3].model_copy(update={"epochs": 1}), dataset, root=tmp_path)
    computed = []
    with closing(epochs_at_once(configs, dataset, root=tmp_path)) as group:
        for config, metrics, now in group:
            computed += [(config.seed, metrics.epoch)] if now else []
            if computed[-1:] == [(2, 3)]:
                break
    kept = [len(Record(config, tmp_path).finished_epochs()) for config in configs]
    assert kept == [4, 3, 3, 2, 2]
    again = []
    found: dict[int, list[EpochMetrics]] = {}
    for config, metrics, now in epochs_at_once(configs, dataset, root=tmp_path):
        found.setdefault(config.seed, []).append(metrics)
        again += [(config.seed, metrics.epoch)] if now else []
    assert sorted(computed + again) == sorted(set(computed + again))  # nothing twice
    assert again == [(3, 3), (4, 3), (1, 4), (2, 4), (3, 4), (4, 4)]
    for config in configs:
        expected = train(config, dataset, root=tmp_path / "single")
        for one, other in zip(learning(found[config.seed]), learning(expected), strict=True):
            assert one == pytest.approx(other, rel=1e-10)
        assert distance(tensors(config, tmp_path), tensors(config, tmp_path / "single")) < 1e-10
    noted = [Record(config, tmp_path).environment().get(BATCHED) for config in configs]
    assert noted == [None, 4, 4, 4, 4]
    assert not list(tmp_path.glob("*/lock"))


def test_a_finished_grid_is_not_computed_again_by_either_way(tmp_path: Path) -> None:
    dataset = few_digits()
    configs = [RunConfig(epochs=1, seed=seed, rule=rule) for seed in range(2) for rule in ("ar", "backprop")]
    events: list[Event] = []
    found = run_all(configs, dataset, root=tmp_path, batched_seeds=True, on_event=events.append)
    assert [run.config for run in found] == configs
    for config in configs:
        own = [type(e) for e in events if getattr(e, "run", None) == config.id]
        assert own == [Started, EpochDone, Finished]
    assert all(run.environment[BATCHED] == 2 for run in found)
    for way in (True, False):
        events.clear()
        again = run_all(configs, dataset, root=tmp_path, batched_seeds=way, on_event=events.append)
        assert [(run.metrics, run.environment) for run in again] == [(run.metrics, run.environment) for run in found]
        assert not any(e.computed for e in events if isinstance(e, EpochDone))


def test_one_seed_alone_is_the_single_run_bit_for_bit() -> None:
    dataset = few_digits()
    (found,) = run_all(seeds(1, epochs=2, batch_size=64), dataset, root=None, batched_seeds=True)
    assert learning(found.metrics) == learning(train(found.config, dataset))
    assert BATCHED not in found.environment


def test_two_workers_compute_groups_and_a_killed_one_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.lab.test_engines import _killing

    dataset = few_digits()
    configs = [RunConfig(epochs=3, seed=seed, rule=rule) for seed in range(3) for rule in ("ar", "backprop")]
    expected = run_all(configs, dataset, root=None, batched_seeds=True)
    kill = _killing(lambda event: isinstance(event, EpochDone) and event.metrics.epoch == 2)
    found = run_all(
        configs, dataset, root=tmp_path, engine=partial(processes, workers=2), batched_seeds=True, on_event=kill
    )
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(learning(one.metrics), learning(other.metrics), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert one.environment[BATCHED] == 3
    assert "and 2 more was killed by SIGKILL: the run is taken up again from its checkpoint" in caplog.text


def test_what_stops_a_group_stops_its_unfinished_seeds(tmp_path: Path) -> None:
    dataset = few_digits()
    configs = seeds(3, batch_size=64)
    train(configs[1], dataset, root=tmp_path)
    broken = Dataset(
        dataset.name, dataset.classes, dataset.train, Split(dataset.test.images[:, :0], dataset.test.labels)
    )
    events: list[Event] = []
    with pytest.raises(GridError, match=r"2 of 3 runs have failed"):
        run_all(configs, broken, root=tmp_path, batched_seeds=True, on_event=events.append)
    assert [e.run for e in events if isinstance(e, Failed)] == [configs[0].id, configs[2].id]
    assert [e.run for e in events if isinstance(e, Finished)] == [configs[1].id]
    told = died(ATTEMPTS, Job(tuple(configs)), "was killed")
    assert [e.run for e in told if isinstance(e, Failed)] == [c.id for c in configs]


# ------------------------------------------------------------------------------------------------ what is refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "resnet", "loss": "cross-entropy"}, "model resnet"),
    ({"rule": "dfa"}, "rule dfa"),
    ({"rule": "pc"}, "rule pc"),
    ({"feedback": {"all": "mirror"}}, "feedback mirror"),
    ({"feedback": {"all": "sign"}}, "feedback sign"),
    ({"vertices": "operations"}, "vertices operations"),
    ({"solver": "euler", "solver_options": {"order": "asynchronous"}}, "order asynchronous"),
    ({"solver": "euler", "solver_options": {"tolerance": 0.1}}, "tolerance 0.1"),
    ({"solver": "continuous", "frozen": {"relaxation_derivative": False}}, "solver continuous, unfrozen"),
    ({"precision": "bf16"}, "precision bf16"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_cannot_be_batched_is_refused_by_name(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^{named}.*one after the other"):
        run_all(seeds(2, **options), pictures("mlp"), root=tmp_path, batched_seeds=True)
    assert not list(tmp_path.iterdir())


@every_device
@pytest.mark.parametrize("condition", ["backpropagation", "PAPER", "a", "c", "learned", "d, input too", "Adam"])
def test_steps_are_a_cuda_graph_on_a_gpu(
    device: str, condition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two epochs of two minibatches of each size, as on the processor."""
    steps: list[GraphedStep] = []

    def watched(*args: Any) -> GraphedStep:
        steps.append(GraphedStep(*args))
        return steps[-1]

    monkeypatch.setattr(training, "GraphedStep", watched)
    configs = seeds(2, **CONDITIONS[condition] | {"epochs": 2})
    dataset = pictures("mlp", torch.float32)
    found = [list(epochs_at_once(configs, dataset, device=place)) for place in (device, "cpu")]
    for (_, one, _), (_, other, _) in zip(*found, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
    assert not caplog.records
    assert [step.is_captured for step in steps] == ([] if device == "cpu" else [True])


@no_gpu
def test_where_a_capture_fails_the_steps_are_launched_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that reads a value cannot be a graph. It trains as on the processor, and a warning tells why, once."""
    step = training.Training._step

    def reads(self: training.Training, rows: Tensor) -> Tensor:
        loss = step(self, rows)
        assert float(torch.as_tensor(loss).sum()) > 0
        return loss

    configs, dataset = seeds(2, epochs=2), pictures("mlp", torch.float32)
    expected = at_once(configs, dataset)
    monkeypatch.setattr(training.Training, "_step", reads)
    found = [metrics for _, metrics, _ in epochs_at_once(configs, dataset, device="cuda")]
    assert [one.train_loss for one in found] == pytest.approx(
        [one.train_loss for epoch in zip(*expected, strict=True) for one in epoch], rel=1e-4
    )
    assert ["cannot be a CUDA graph" in record.getMessage() for record in caplog.records] == [True]
    monkeypatch.setattr(training.Training, "_step", step)
    again = [metrics for _, metrics, _ in epochs_at_once(configs, dataset, device="cuda")]  # nothing is left behind
    assert [one.train_loss for one in again] == pytest.approx([one.train_loss for one in found], rel=1e-6)
    assert len(caplog.records) == 1


def test_a_layer_without_a_batched_form_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="ReLU has no form for several seeds at once"):
        batched([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)])


def test_what_differs_in_more_than_the_seed_is_no_group() -> None:
    first, second = seeds(2)
    with pytest.raises(ValueError, match="must differ in their seeds alone"):
        at_once([first, second.model_copy(update={"learning_rate": 0.1})], pictures("mlp"))
    with pytest.raises(ValueError, match="a seed of its own, got 0, 0"):
        at_once([first, first], pictures("mlp"))


def test_several_processes_do_not_compute_several_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "this_group", lambda: Group(0, 2))
    with pytest.raises(ModelError, match="several processes compute one run"):
        at_once(seeds(2), pictures("mlp"))


def test_on_the_command_line_it_is_refused_before_anything_runs(tmp_path: Path) -> None:
    status, said = invoke("reproduce", "rules", "--batched-seeds", "--runs", tmp_path / "runs")
    assert status == 2
    assert "--batched-seeds" in said
    assert "no effect on reproduce rules" in said
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------- what it says, and what it costs


def test_the_table_says_how_its_runs_were_computed(tmp_path: Path) -> None:
    options = ("figure1", "--dataset", "digits", "--epochs", "1", "--seeds", "2", "--condition", "b", "--workers", "1")
    runs = tmp_path / "runs"
    status, said = invoke("reproduce", *options, "--batched-seeds", "--runs", runs, "--out", tmp_path / "out")
    assert status == 0, said
    note = "batched with 2 seeds: 6 of 6 runs were trained as one network for all seeds of a condition"
    assert note in said
    assert note in " ".join((tmp_path / "out" / "table.md").read_text().split())
    kept = read_lines(tmp_path / "out" / "runs.jsonl").runs
    assert all(run.environment[BATCHED] == 2 for run in kept)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [place[BATCHED] for place in summary["environments"]] == [2]
    _, said = invoke("reproduce", *options, "--runs", tmp_path / "single", "--out", tmp_path / "other")
    assert "batched" not in said
    names = [{path.name for path in folder.iterdir()} for folder in (runs, tmp_path / "single")]
    assert names[0] == names[1]


def test_the_layer_next_to_the_input_is_not_computed_again_where_no_state_reaches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a single network: where f' is unfrozen, the model runs again in every step, most of it in that layer."""
    calls: list[nn.Module] = []
    real = BatchedLinear.forward

    def forward(self: BatchedLinear, x: Tensor) -> Tensor:
        calls.append(self)
        return real(self, x)

    monkeypatch.setattr(BatchedLinear, "forward", forward)
    dataset = pictures("mlp")
    network: nn.Module = batched([models.build("mlp", dataset, seed=seed).double() for seed in range(2)])
    config = seeds(**A)[0]
    relaxed = ActivationRelaxation(network, solver=config.build_solver(), frozen=Frozen(relaxation_derivative=False))
    relaxed(side_by_side(dataset.train.images[torch.arange(6).view(3, 2)])).sum().backward()
    first, *others = [layer for layer in network.modules() if isinstance(layer, BatchedLinear)]
    assert calls.count(first) == 1
    assert all(calls.count(layer) > 3 for layer in others)


def test_a_class_says_of_itself_that_it_only_computes() -> None:
    class Counting(BatchedLinear):
        pass

    layer = nn.Linear(2, 2)
    assert does_as_its_class_says(BatchedLinear(layer, 2))
    assert not does_as_its_class_says(Counting(layer, 2))


MEASURE = Path(__file__).parents[2] / "results" / "batched-seeds" / "measure.py"


@pytest.mark.skipif(not MEASURE.exists(), reason="the kept results are in the repository, not in a source distribution")
def test_the_command_that_measures_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(MEASURE), "--small", "--out", str(tmp_path)])
    runpy.run_path(str(MEASURE), run_name="__main__")
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert [found["condition"] for found in outcome["results"]] == ["backpropagation", "PAPER", "a", "c"]
    for found in outcome["results"]:
        assert all(len(found["seconds"][way]) == 1 for way in ("batched", "single"))
        assert found["largest relative difference of losses"] < 1e-5
    assert len((tmp_path / "table.md").read_text().splitlines()) == 8
