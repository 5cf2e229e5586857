"""A run of training: its loop, what it leaves, and how it goes on after an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from relaxprop import ActivationRelaxation, NonFiniteStateError
from relaxprop.frozen import Frozen
from relaxprop.lab import data, training
from relaxprop.lab.checkpoint import kept_checkpoint
from relaxprop.lab.config import RunConfig
from relaxprop.lab.data import DataError, Dataset, Split
from relaxprop.lab.files import OutputError
from relaxprop.lab.models import ModelError, build
from relaxprop.lab.results import EpochMetrics
from relaxprop.lab.store import Record, read_run
from relaxprop.lab.training import accuracy, minibatches, train
from relaxprop.solvers import ClosedForm, Euler
from tests.lab.problem import few_digits, learning


def small(epochs: int = 3, **options: object) -> RunConfig:
    return RunConfig.model_validate({"epochs": epochs, **options})


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return few_digits()


class StopHereError(Exception):
    pass


def test_the_loop_is_the_papers(digits: Dataset) -> None:
    """One epoch by hand: W ← W − 0.0005 ∂/∂W Σ (x^L − T)², minibatch by minibatch, by plain autograd."""
    config = small(1, rule="backprop", seed=5)
    model = build("mlp", digits, seed=5)
    total = 0.0
    for rows in minibatches(len(digits.train), config, 1):
        target = torch.eye(10)[digits.train.labels[rows]]
        loss = ((model(digits.train.images[rows]) - target) ** 2).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(0.0005 * gradient)
        total += float(loss.detach())
    (metrics,) = train(config, digits)
    assert metrics.train_loss == pytest.approx(total / 320, rel=1e-5)
    correct = model(digits.test.images).argmax(1) == digits.test.labels
    assert metrics.test_accuracy == pytest.approx(float(correct.double().mean()), abs=1 / 360)


def test_at_equilibrium_training_is_backpropagation(digits: Dataset) -> None:
    relaxed = train(small(rule="ar", solver="equilibrium"), digits)
    assert learning(relaxed) == learning(train(small(rule="backprop"), digits))
    assert relaxed[-1].train_loss < relaxed[0].train_loss


def test_the_closed_form_trains_like_the_steps_that_it_replaces(digits: Dataset) -> None:
    options = {"step_size": 0.2, "num_steps": 12}
    closed = train(small(2, solver="closed-form", solver_options=options), digits)
    steps = train(small(2, solver="euler", solver_options=options), digits)
    assert [m.train_loss for m in closed] == pytest.approx([m.train_loss for m in steps], rel=1e-4)


# --------------------------------------------------------------------------------------------------- other graphs

OTHER: dict[str, object] = {"loss": "cross-entropy", "optimizer": "adam", "learning_rate": 1e-3, "batch_size": 16}
CONVERGED: dict[str, object] = {"vertices": "operations", "solver_options": {"step_size": 0.5, "num_steps": 300}}


@pytest.fixture(scope="module")
def text() -> Dataset:
    whole = data.load("docstrings")
    splits = (Split(split.images[:48], split.labels[:48]) for split in (whole.train, whole.test))
    return Dataset("docstrings", whole.classes, *splits)


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.rand(48, 3, 32, 32, generator=generator), torch.arange(48) % 10)
    return Dataset("pictures", tuple("0123456789"), split, split)


def test_the_loop_with_cross_entropy_and_adam(text: Dataset) -> None:
    """One epoch by hand, the mean over all places of the text."""
    config = small(1, dataset="docstrings", model="transformer", rule="backprop", seed=2, **OTHER)
    model = build("transformer", text, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    total = 0.0
    for rows in minibatches(48, config, 1):
        logits = model(text.train.images[rows]).movedim(1, -1).log_softmax(-1)
        loss = -logits.gather(-1, text.train.labels[rows].unsqueeze(-1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    (metrics,) = train(config, text)
    assert metrics.train_loss == pytest.approx(total / text.train.labels.numel(), rel=1e-4)
    right = (model(text.test.images).argmax(1) == text.test.labels).double().mean()
    assert metrics.test_accuracy == pytest.approx(float(right), abs=2 / text.test.labels.numel())


@pytest.mark.parametrize("model", ["transformer", "resnet"])
def test_on_other_graphs_training_is_backpropagation(
    text: Dataset, pictures: Dataset, tmp_path: Path, model: str
) -> None:
    dataset = text if model == "transformer" else pictures
    relaxed = train(small(2, model=model, **OTHER, **CONVERGED), dataset, root=tmp_path)
    exact = train(small(2, model=model, rule="backprop", **OTHER), dataset, root=tmp_path)
    losses = [[m.train_loss for m in metrics] for metrics in (relaxed, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][1] < losses[0][0]
    (run,) = tmp_path.glob("*-ar-*")
    certificate = json.loads((run / "certificate.json").read_text())
    assert len(certificate) > 20
    assert max(certificate.values()) < 1e-15
    assert not (run / "locality.json").exists()


@pytest.mark.parametrize("rule", ["ar", "backprop"])
@pytest.mark.parametrize("model", ["transformer", "mlp", "cnn", "resnet"])
def test_adam_resumes_to_identical_metrics(
    digits: Dataset, text: Dataset, pictures: Dataset, tmp_path: Path, model: str, rule: str
) -> None:
    """With its moments, batch norm's statistics, channels innermost; and tied weights stay tied."""
    dataset = {"transformer": text, "mlp": digits}.get(model, pictures)
    config = small(4, model=model, rule=rule, **OTHER)

    def interrupt(metrics: EpochMetrics) -> None:
        if metrics.epoch == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(config, dataset, root=tmp_path, on_epoch=interrupt)
    assert learning(train(config, dataset, root=tmp_path)) == learning(train(config, dataset))


def test_what_does_not_fit_together_is_refused(digits: Dataset, text: Dataset, pictures: Dataset) -> None:
    with pytest.raises(ModelError, match="a transformer reads text, the others read images"):
        train(small(1, model="transformer", **OTHER), digits)
    with pytest.raises(ModelError, match="the mlp does not fit docstrings"):
        train(small(1, **OTHER), text)
    with pytest.raises(ModelError, match=r"docstrings has a label at every place.*cross-entropy"):
        train(small(1, model="transformer"), text)
    with pytest.raises(ModelError, match="at least 17×17 pixels, got 8×8"):
        train(small(1, model="resnet", **OTHER), digits)
    with pytest.raises(ValidationError, match="freeze or unfreeze update_derivative and update_activity together"):
        small(vertices="operations", frozen={"update_activity": False})
    switches = [{}, {"loss": "cross-entropy"}, {"optimizer": "adam"}, {"vertices": "operations"}]
    assert len({small(1, **switch).id for switch in switches}) == 4
    assert small(rule="backprop", vertices="operations") == small(rule="backprop")


@pytest.mark.parametrize("solver", ["euler", "continuous"])
def test_an_unfrozen_run_trains_with_what_it_names(digits: Dataset, solver: str) -> None:
    """One minibatch by hand, by the library's own wrapper."""
    frozen = Frozen(relaxation_derivative=False, update_derivative=False)
    options: dict[str, object] = {"duration": 0.5} if solver == "continuous" else {"num_steps": 5}
    config = small(1, frozen=frozen, solver=solver, solver_options=options, batch_size=320)
    model = build("mlp", digits, seed=0)
    relaxed = ActivationRelaxation(model, solver=config.build_solver(), frozen=frozen)
    target = torch.eye(10)[digits.train.labels]
    ((relaxed(digits.train.images) - target) ** 2).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0005).step()
    (metrics,) = train(config, digits)
    assert metrics.test_accuracy == pytest.approx(accuracy(model, digits.test), abs=2 / 360)


def test_the_last_minibatches_can_be_left_out(digits: Dataset) -> None:
    config = small(1, rule="backprop", left_out=2)
    assert [len(rows) for rows in minibatches(320, config, 1)] == [64] * 3
    assert [len(rows) for rows in minibatches(321, config, 1)] == [64] * 4
    (metrics,) = train(config, digits)  # 360 test images are 6 minibatches
    assert metrics.test_accuracy * 256 == pytest.approx(round(metrics.test_accuracy * 256))
    with pytest.raises(DataError, match="left_out=5 minibatches of 64 are all that digits has"):
        train(small(1, left_out=5), digits)


def test_every_switch_gives_a_run_another_name() -> None:
    switches: list[dict[str, object]] = [
        {},
        {"signed_inputs": True},
        {"convolutional_factor": 2},
        {"left_out": 1},
        {"feedback": {"all": "learned"}},
        {"feedback": {"all": "random"}},
        {"dropped": {"all": "both"}},
        {"frozen": {"update_derivative": False}},
        {"frozen": {"update_activity": False}},
        {"frozen": {"update_activity": False, "input": False}},
        {"alignment_every": 10},
    ]
    assert len({small(1, **switch).id for switch in switches}) == len(switches)
    assert small(1, feedback={"all": "symmetric"}) == small(1)
    parts = {"fully_connected": "learned", "convolutional": "random"}
    assert small(1, feedback=parts).id == small(1, feedback=dict(sorted(parts.items()))).id


def test_a_solver_that_cannot_follow_the_jacobians_is_refused() -> None:
    frozen = {"relaxation_derivative": False}
    assert small(frozen=frozen).solver == "euler"
    assert small(rule="backprop", frozen=frozen) == small(rule="backprop")
    for solver in ("closed-form", "equilibrium"):
        with pytest.raises(ValidationError, match="relaxation_derivative=False"):
            small(frozen=frozen, solver=solver)


def test_minibatches_visit_every_sample_once_and_differ_by_epoch_and_seed() -> None:
    config = small(batch_size=64, seed=1)
    first = list(minibatches(1437, config, 1))
    assert [len(rows) for rows in first] == [64] * 22 + [29]
    assert torch.cat(first).sort().values.tolist() == list(range(1437))
    assert torch.equal(torch.cat(first), torch.cat(list(minibatches(1437, small(rule="backprop", seed=1), 1))))
    for other, epoch in ((config, 2), (small(seed=2), 1)):
        assert not torch.equal(torch.cat(first), torch.cat(list(minibatches(1437, other, epoch))))


def test_accuracy_counts_every_sample(digits: Dataset) -> None:
    model = build("mlp", digits, seed=0)
    right = (model(digits.test.images).argmax(1) == digits.test.labels).double().mean()
    assert accuracy(model, digits.test, batch_size=77) == pytest.approx(float(right))


# --------------------------------------------------------------------------------------------------------- alignment

MEASURED: list[dict[str, object]] = [
    {},
    {"feedback": {"all": "learned"}, "dropped": {"all": "both"}},
    {"frozen": {"relaxation_derivative": False}, "solver_options": {"num_steps": 4}},
    {"solver": "euler", "solver_options": {"num_steps": 4, "order": "asynchronous"}},
]


@pytest.mark.parametrize("options", MEASURED)
def test_measuring_alignment_changes_nothing(digits: Dataset, tmp_path: Path, options: dict[str, object]) -> None:
    plain, measured = small(2, **options), small(2, **options, alignment_every=2)
    assert plain.id != measured.id
    assert learning(train(plain, digits)) == learning(found := train(measured, digits, root=tmp_path))
    assert [[s.epochs for s in m.alignment] for m in found] == [[0, 0.4, 0.8], [1, 1.4, 1.8]]  # five minibatches
    assert train(measured, digits, root=tmp_path) == found  # as read from the disk
    assert read_run(tmp_path / measured.id).metrics == found


def test_the_alignment_that_is_measured(digits: Dataset) -> None:
    """Before the first update: the cosine of the two rules' gradients on the first minibatch, by hand."""
    options: dict[str, object] = {"solver_options": {"num_steps": 20}, "feedback": {"all": "learned"}}
    config = small(1, **options, alignment_every=1, seed=3)
    model = build("mlp", digits, seed=3, feedback=config.feedback)
    rows = next(minibatches(len(digits.train), config, 1))
    target = torch.eye(10)[digits.train.labels[rows]]
    (
        (ActivationRelaxation(model, solver=ClosedForm(0.1, 20))(digits.train.images[rows]) - target) ** 2
    ).sum().backward()
    plain = build("mlp", digits, seed=3)
    ((plain(digits.train.images[rows]) - target) ** 2).sum().backward()
    (metrics,) = train(config, digits)
    first = metrics.alignment[0]
    assert first.gradients.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        g = model.get_parameter(name).grad
        assert g is not None
        assert parameter.grad is not None
        cosine = torch.nn.functional.cosine_similarity(g.flatten(), parameter.grad.flatten(), dim=0)
        assert first.gradients[name] == pytest.approx(float(cosine), abs=1e-5)
    for name, found in first.feedback.items():
        b, w = (model.get_parameter(f"{name}.{kind}").detach().flatten() for kind in ("feedback", "weight"))
        assert found == pytest.approx(float(torch.nn.functional.cosine_similarity(b, w, dim=0)), abs=1e-5)
    assert len(first.feedback) == 4
    assert len(metrics.alignment) == 5


def test_an_interrupted_run_keeps_the_alignment_of_its_finished_epochs(digits: Dataset, tmp_path: Path) -> None:
    config = small(3, alignment_every=3)

    def interrupt(metrics: EpochMetrics) -> None:
        if metrics.epoch == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(config, digits, root=tmp_path, on_epoch=interrupt)
    cosines = [[s.gradients for s in m.alignment] for m in train(config, digits, root=tmp_path)]
    assert cosines == [[s.gradients for s in m.alignment] for m in train(config, digits)]


def test_backpropagation_is_not_compared_with_itself(digits: Dataset) -> None:
    assert small(rule="backprop", alignment_every=3) == small(rule="backprop")


@pytest.mark.parametrize("rule", ["ar", "backprop"])
def test_bf16_learns_as_fp32_does_up_to_its_rounding(digits: Dataset, rule: str) -> None:
    """A bfloat16 has 8 bits: after an epoch the losses differ, and by less than their rounding."""
    (exact,), (rounded,) = (train(small(1, rule=rule, precision=p), digits) for p in ("fp32", "bf16"))
    assert rounded.train_loss != exact.train_loss
    assert rounded.train_loss == pytest.approx(exact.train_loss, rel=2**-8)


# ----------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("order", ["simultaneous", "asynchronous"])
def test_an_interrupted_run_resumes_to_identical_metrics(digits: Dataset, tmp_path: Path, order: str) -> None:
    config = small(4, solver="euler", solver_options={"num_steps": 5, "order": order})

    def interrupt(metrics: EpochMetrics) -> None:
        if metrics.epoch == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(config, digits, root=tmp_path, on_epoch=interrupt)
    computed: list[int] = []
    resumed = train(config, digits, root=tmp_path, on_epoch=lambda m: computed.append(m.epoch))
    assert computed == [3, 4]
    assert learning(resumed) == learning(train(config, digits))


def test_an_epoch_without_its_weights_is_computed_again(digits: Dataset, tmp_path: Path) -> None:
    """The interruption came between the two files."""
    config = small(2)
    whole = train(config, digits, root=tmp_path)
    shorter = train(small(1), digits, root=tmp_path / "other")
    Path(tmp_path / config.id / "checkpoint.safetensors").write_bytes(
        (tmp_path / "other" / config.id / "checkpoint.safetensors").read_bytes()
    )
    assert len(shorter) == 1
    computed: list[int] = []
    again = train(config, digits, root=tmp_path, on_epoch=lambda m: computed.append(m.epoch))
    assert computed == [2]
    assert learning(again) == learning(whole)


def test_a_finished_run_is_not_computed_again(digits: Dataset, tmp_path: Path) -> None:
    metrics = train(small(2), digits, root=tmp_path)
    computed: list[EpochMetrics] = []
    assert train(small(2), digits, root=tmp_path, on_epoch=computed.append) == metrics
    assert train(small(1), digits, root=tmp_path, on_epoch=computed.append) == metrics[:1]
    assert computed == []
    assert train(small(3), digits, root=tmp_path, on_epoch=computed.append)[:2] == metrics
    assert [m.epoch for m in computed] == [3]


def test_what_a_run_leaves(digits: Dataset, tmp_path: Path) -> None:
    config = small(1, seed=7)
    train(config, digits, root=tmp_path)
    folder = tmp_path / config.id
    assert sorted(p.name for p in folder.iterdir()) == [
        "certificate.json", "checkpoint.safetensors", "config.json", "environment.json", "locality.json",
        "metrics.jsonl",
    ]  # fmt: skip
    assert RunConfig.model_validate_json((folder / "config.json").read_text()) == config
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["processor"]
    model = build("mlp", digits, seed=0)
    checkpoint = kept_checkpoint(folder)
    assert checkpoint is not None
    checkpoint.load_into(model, torch.optim.SGD(model.parameters()))
    (metrics,) = Record(config, tmp_path).finished_epochs()
    assert accuracy(model, digits.test) == metrics.test_accuracy


def test_a_diverged_run_keeps_its_finished_epochs(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.train_epoch

    def diverge(now: training.Training, epoch: int) -> object:
        if epoch == 2:
            raise NonFiniteStateError("tanh1", 5)
        return real(now, epoch)

    monkeypatch.setattr(training, "train_epoch", diverge)
    with pytest.raises(NonFiniteStateError):
        train(small(3), digits, root=tmp_path)
    assert len(Record(small(3), tmp_path).finished_epochs()) == 1


def test_a_run_that_diverges_without_an_error_keeps_its_metrics(digits: Dataset, tmp_path: Path) -> None:
    config = small(2, rule="backprop", learning_rate=10.0)
    assert not math.isfinite(train(config, digits, root=tmp_path)[-1].train_loss)
    assert len(train(small(3, rule="backprop", learning_rate=10.0), digits, root=tmp_path)) == 3


def test_other_data_are_another_run(digits: Dataset) -> None:
    other = Dataset(digits.name, digits.classes, digits.test, digits.train)
    assert digits.digest != other.digest
    assert small(data=digits.digest).id != small(data=other.digest).id


def test_a_shorter_run_leaves_the_longer_ones_description(digits: Dataset, tmp_path: Path) -> None:
    train(small(2), digits, root=tmp_path)
    train(small(1), digits, root=tmp_path)
    assert json.loads((tmp_path / small(1).id / "config.json").read_text())["epochs"] == 2


def test_a_folder_that_cannot_be_written_is_named(digits: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write the run's folder .*file"):
        train(small(1), digits, root=tmp_path / "file")


# -------------------------------------------------------------------------------------------------------- description


def test_a_description_names_a_run() -> None:
    assert small(1).id == small(9).id  # a longer run continues a shorter one
    assert small().id == small(solver_options={"step_size": 0.1}).id  # defaults spelled out or not
    assert small(rule="backprop").id == small(rule="backprop", solver="euler").id
    different = [
        small(seed=1),
        small(rule="backprop"),
        small(solver="euler"),
        small(batch_size=32),
        small(solver_options={"step_size": 0.2}),
        small(learning_rate=0.1),
        small(dataset="mnist"),
    ]
    assert len({config.id for config in (small(), *different)}) == 8


def test_a_description_builds_its_solver() -> None:
    assert small().build_solver() == ClosedForm(0.1, 100)
    options = {"step_size": 0.5, "num_steps": 7, "order": "sequential", "tolerance": 1e-3}
    config = small(solver="euler", solver_options=options)
    assert config.build_solver() == Euler(0.5, 7, order="sequential", tolerance=1e-3)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "a/b"}, "name must be of letters, digits, dots, hyphens and single spaces"),
        ({"rule": "hebb"}, "'ar', 'backprop', 'pc', 'ep', 'dfa' or 'drtp'"),
        ({"solver": "magic"}, "'closed-form', 'euler', 'continuous' or 'equilibrium'"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"solver_options": {"step_size": 2.0}}, r"step_size must be in \(0, 2\).*got 2.0"),
        ({"epoch": 3}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_description_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(options)


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / "results").is_dir(),
    reason="the kept results are in the repository, and not in a source distribution",
)
def test_the_descriptions_of_kept_results_keep_their_ids() -> None:
    """What is kept under results/ was run before later switches came in: they leave it its name and its steps."""
    kept = {
        id: config
        for path in Path(__file__).parents[2].glob("results/**/summary.json")
        for id, config in json.loads(path.read_text(encoding="utf-8"))["runs"].items()
    }
    assert kept
    for id, config in kept.items():
        described = RunConfig.model_validate(config)
        assert described.id == id
        assert (described.solver_options.get("num_steps") or "no steps") == (
            config["solver_options"].get("num_steps") or "no steps"
        )


def test_the_lab_takes_the_papers_steps_where_none_are_given() -> None:
    assert RunConfig().build_solver() == ClosedForm(0.1, 100)
    unfrozen = RunConfig(solver="euler", frozen=Frozen(relaxation_derivative=False))
    assert unfrozen.build_solver() == Euler(0.1, 100)


def test_the_initial_state_is_part_of_the_description() -> None:
    assert RunConfig(initial="zero").id != RunConfig().id
    assert RunConfig(initial="feedforward").id == RunConfig().id
