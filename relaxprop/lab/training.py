"""The training loop. The learning rule is an argument: backpropagation is the same loop with the wrapper off.

May import: public names, rule, lab.batched, lab.checkpoint, lab.config, lab.data, lab.distributed, lab.files,
lab.graphed, lab.models, lab.results, lab.rules, lab.store.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from relaxprop import (
    ActivationRelaxation,
    UnconvergedWarning,
    alignment,
    certificate,
    describe_locality,
    feedback_alignment,
    mirror_weights,
)
from relaxprop.lab import models
from relaxprop.lab.batched import batched, check_seeds, gather_state, hand_out_state, side_by_side
from relaxprop.lab.checkpoint import kept_checkpoint
from relaxprop.lab.config import Loss, OptimizerName, Precision, RunConfig
from relaxprop.lab.data import DataError, Dataset, Split
from relaxprop.lab.distributed import ALONE, Group, this_group
from relaxprop.lab.files import OutputError
from relaxprop.lab.graphed import GraphedStep, Step, make_capturable
from relaxprop.lab.results import AlignmentSample, EpochMetrics
from relaxprop.lab.rules import OTHERS, LossFunction, called, wrap
from relaxprop.lab.store import Opened, Record
from relaxprop.rule import LearningRule

OnEpoch = Callable[[EpochMetrics], None]


@contextmanager
def expected_transients() -> Iterator[None]:
    """Within it, nobody is warned of relaxation phases that do not converge: the experiments' setting is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnconvergedWarning)
        yield


def train(
    config: RunConfig,
    dataset: Dataset,
    *,
    root: Path | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    on_epoch: OnEpoch | None = None,
) -> list[EpochMetrics]:
    """Trains a network as described and returns the metrics of every epoch; see `epochs`.

    Args:
        on_epoch: called after every epoch that is computed.
    """
    found = []
    with closing(epochs(config, dataset, root=root, device=device, check_finite=check_finite)) as run:
        for metrics, computed in run:
            found.append(metrics)
            if computed and on_epoch is not None:
                on_epoch(metrics)
    return found


def epochs(
    config: RunConfig,
    dataset: Dataset,
    *,
    root: Path | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
) -> Generator[tuple[EpochMetrics, bool]]:
    """Trains a network as described, epoch by epoch: the metrics, and whether they were computed now.

    In a process group (`distributed`), each process computes its share of every minibatch, and the first one keeps the
    run. A folder of run directories is to be the same for all of them.

    Args:
        root: folder of run directories. A run that is finished there is not computed again, and one that was
            interrupted continues to the same metrics as if it had not been. None keeps nothing.
        check_finite: whether a relaxation that diverges is an error, or, as in backpropagation, a bad result.

    Raises:
        DataError: if all minibatches are left out.
        ModelError: if the network or the loss does not fit the data, or there is no such part.
        OutputError: if the run's folder cannot be written, or is damaged.
        NonFiniteStateError: if the relaxation diverged; the epochs before it are kept.
    """
    with closing(epochs_at_once([config], dataset, root=root, device=device, check_finite=check_finite)) as run:
        for _, metrics, computed in run:
            yield metrics, computed


@dataclass(eq=False)
class _Run:
    """A run under way: what it trains, and the epochs that are finished."""

    config: RunConfig
    record: Record | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    found: list[EpochMetrics] = field(default_factory=list)


def epochs_at_once(
    configs: Sequence[RunConfig],
    dataset: Dataset,
    *,
    root: Path | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
) -> Generator[tuple[RunConfig, EpochMetrics, bool]]:
    """As `epochs`, for several seeds of one description, whose networks are trained as one (`batched`).

    Each seed has its own start, minibatches, folder and metrics, which are those of its own run to rounding, and its
    share of the time. Only what is not finished is computed. A seed that has fewer epochs than others is trained
    without them until it has as many.

    Args:
        configs: differ in their seeds alone. One is trained as ever.
        check_finite: as `epochs`, of one. Several go on, as the others are none the worse: a bad result.

    Raises:
        ValueError: if two of several have the same seed, or differ in more than their seeds.
        ModelError: as `epochs`, or if something in the description depends on all seeds at once, or several processes
            compute the run.
    """
    config, group = configs[0], this_group()
    if len(configs) > 1:
        check_seeds(configs)
        if group.size > 1:
            raise models.ModelError("several processes compute one run: they cannot compute several seeds at once")
        check_finite = False
    if config.validation:
        dataset = dataset.held_out(config.validation)
    if config.enlarged > 1:
        dataset = dataset.enlarged(config.enlarged)
    if not min(kept_samples(len(split), config) for split in (dataset.train, dataset.test)):
        raise DataError(
            f"left_out={config.left_out} minibatches of {config.batch_size} are all that {dataset.name} has"
        )
    if group.size > 1:
        _check_shared(config)
    unfinished = []
    for each in configs:
        record = Record(each, root) if root is not None else None
        finished = record.finished_epochs() if record is not None and group.is_first else []
        if group.agreed(len(finished)) < config.epochs:
            unfinished.append((each, record))
            continue
        finished = finished if record is None or group.is_first else record.finished_epochs()
        if record is not None and group.is_first:
            record.tidy()
        yield from ((each, metrics, False) for metrics in finished[: config.epochs])
    if not unfinished:
        return
    if not dataset.is_images and config.loss == "squared-error":
        raise models.ModelError(
            f"{dataset.name} has a label at every place of a text: train it with --loss cross-entropy"
        )
    if config.signed_inputs:
        dataset = dataset.signed()
    runs = [_started(each, record, dataset) for each, record in unfinished]
    with limited_threads(config.threads), precise(config.precision, device), ExitStack() as stack:
        opened = {}
        for run in sorted(runs, key=lambda run: run.config.id):  # another process takes them in the same order
            opened[run] = stack.enter_context(_opened(run.record, group))
        dataset = dataset.to(device, models.memory_format(config.model))
        for run in runs:
            run.model.to(device)
            if (checkpoint := opened[run].checkpoint) is not None:
                checkpoint.load_into(run.model, run.optimizer)
            if run.record is not None and group.is_first and config.rule != "backprop":
                _save_reports(run.record, wrapped_by(run.config, run.model), dataset.train.images[:2])
            run.found += opened[run].metrics
            yield from ((run.config, metrics, False) for metrics in run.found[: config.epochs])
        yield from _trained(runs, dataset, group, check_finite)


def _trained(
    runs: Sequence[_Run], dataset: Dataset, group: Group, check_finite: bool
) -> Generator[tuple[RunConfig, EpochMetrics, bool]]:
    """The epochs that are missing: those that have the fewest go on alone until they have as many as the others."""
    config = runs[0].config
    rows = kept_samples(len(dataset.test), config)
    test = Split(dataset.test.images[:rows], dataset.test.labels[:rows])
    now: list[_Run] = []
    for epoch in range(min(len(run.found) for run in runs) + 1, config.epochs + 1):
        behind = [run for run in runs if len(run.found) < epoch]
        if behind != now:
            now = behind
            training = _together(now, dataset, group, check_finite)
        start = time.perf_counter()
        with expected_transients():
            losses, samples = train_epoch(training, epoch)
        seconds = time.perf_counter() - start - sum(sample.seconds for own in samples for sample in own)
        if len(now) > 1:
            hand_out_state(
                training.network, training.optimizer, [run.model for run in now], [run.optimizer for run in now]
            )
        for run, loss, own in zip(now, losses, samples, strict=True):
            metrics = EpochMetrics(
                epoch=epoch,
                train_loss=loss,
                test_accuracy=accuracy(run.model, test, group=group, precision=config.precision),
                seconds=seconds / len(now),
                alignment=tuple(own),
            )
            run.found.append(metrics)
            if run.record is not None and group.is_first:
                run.record.save(run.found, run.model, run.optimizer)
            yield run.config, metrics, True


def _started(config: RunConfig, record: Record | None, dataset: Dataset) -> _Run:
    """A run before its first epoch."""
    model = models.build(config.model, dataset, seed=config.seed, feedback=config.feedback, dropped=config.dropped)
    return _Run(config, record, model, _optimizer(model, config))


def _optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.optimizer](_parameter_groups(model, config), lr=config.learning_rate)


def _together(runs: Sequence[_Run], dataset: Dataset, group: Group, check_finite: bool) -> Training:
    """The runs as they are trained: one as it is, several as one network."""
    config = runs[0].config
    own = [run.model for run in runs]
    network, optimizer = own[0], runs[0].optimizer
    if len(runs) > 1:
        network = batched(own)
        optimizer = _optimizer(network, config)
        gather_state(network, optimizer, own, [run.optimizer for run in runs])
        for run in runs:
            if run.record is not None:
                run.record.note_batched(len(runs))

    def wrapped(model: nn.Module) -> nn.Module:
        return model if config.rule == "backprop" else wrapped_by(config, model, check_finite=check_finite)

    trained = wrapped(network)
    measured = [trained] if len(runs) == 1 else [wrapped(model) for model in own] if config.alignment_every else []
    if graphed := _has_graph(config, trained, dataset, group):
        make_capturable(optimizer)
    configs = [run.config for run in runs]
    return Training(configs, network, group.spread(trained), optimizer, dataset, measured, group, graphed)


def _has_graph(config: RunConfig, trained: nn.Module, dataset: Dataset, group: Group) -> bool:
    """Whether the steps of a run can be a CUDA graph: where they are all alike, and nobody has to look at a value."""
    return (
        dataset.train.images.is_cuda
        and group.size == 1
        and not getattr(trained, "check_finite", False)
        and config.rule in ("ar", "backprop")
        and "mirror" not in config.feedback.values()
    )


def _save_reports(record: Record, wrapped: LearningRule, inputs: Tensor) -> None:
    config = record.config
    linear = config.frozen.relaxation_derivative
    record.save_reports(
        describe_locality(wrapped, inputs) if config.vertices != "operations" else None,
        certificate(wrapped, inputs) if isinstance(wrapped, ActivationRelaxation) and linear else None,
    )


def wrapped_by(config: RunConfig, model: nn.Module, *, check_finite: bool = True) -> LearningRule:
    """The network, trained by the learning rule that the description names; backpropagation is no wrapper."""
    if config.rule in OTHERS:
        loss_fn = measured_by(config)
        common = {"vertices": config.vertices, "check_finite": check_finite}
        return wrap(config.rule, model, config.rule_options, loss_fn, seed=config.seed, **common)
    return ActivationRelaxation(
        model,
        solver=config.build_solver(),
        vertices=config.vertices,
        initial=config.initial,
        frozen=config.frozen,
        check_finite=check_finite,
    )


@contextmanager
def _opened(record: Record | None, group: Group) -> Iterator[Opened]:
    """The run's directory, which the first process of the group opens for all."""
    if record is None:
        yield Opened([], None)
    elif group.is_first:
        with record.opened() as opened:
            group.agreed(len(opened.metrics))
            yield opened
    else:
        expected = group.agreed(0)
        metrics, found = record.finished_epochs(), kept_checkpoint(record.path)
        if len(metrics) != expected:
            raise OutputError(
                f"the run's folder {record.path} is not the same for all processes: name one by --runs that all "
                "machines share"
            )
        yield Opened(metrics, found)


def _check_shared(config: RunConfig) -> None:
    """Refuse what depends on a minibatch as a whole.

    Raises:
        ModelError: if it does.
    """
    for name, value in config.solver_options.items():
        if (name, value) == ("order", "asynchronous") or (name == "tolerance" and value is not None):
            raise models.ModelError(
                f"{name} {value}: the relaxation of a minibatch's parts would differ from that of the whole; leave it "
                "out, or compute the run in one process"
            )


@contextmanager
def limited_threads(number: int) -> Iterator[None]:
    """Within it, PyTorch computes by so many threads: the order in which it takes sums depends on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def precise(precision: Precision, device: torch.device | str) -> AbstractContextManager[None]:
    """Within it, a GPU's convolutions are taken in float32 where a description says so. By default PyTorch rounds what
    they multiply to 10 bits (TF32); matrix products it takes in float32 anyway.
    """
    if precision != "fp32" or torch.device(device).type != "cuda":
        return nullcontext()
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def _parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """The convolutions have a learning rate of their own."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    theirs = {p: None for m in convolutions for p in m.parameters()}
    others = [p for p in model.parameters() if p not in theirs]
    rate = config.convolutional_factor * config.learning_rate
    groups: list[dict[str, Any]] = [{"params": others}, {"params": [*theirs], "lr": rate}]
    return [group for group in groups if group["params"]]


@dataclass(eq=False)
class Training:
    """What is trained, by what and on what: one run, or several at once.

    Attributes:
        configs: of the runs, which differ in their seeds alone.
        network: the model; of several runs, as `batched` gives it.
        trained: the same as it is called in training.
        optimizer: of the network.
        dataset: on the device of the network.
        measured: whose alignment is measured, one for each run.
        group: the processes that compute the run.
        graphed: whether the steps are to be launched as a CUDA graph.
    """

    configs: Sequence[RunConfig]
    network: nn.Module
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    measured: Sequence[nn.Module]
    group: Group = ALONE
    graphed: bool = False

    def __post_init__(self) -> None:
        config, labels = self.configs[0], self.dataset.train.labels
        squared = config.loss == "squared-error"
        classes = len(self.dataset.classes)
        self.targets = functional.one_hot(labels, classes).to(self.dataset.train.images.dtype) if squared else labels
        self.measure = measured_by(config)
        self.measure_all = torch.func.vmap(self.measure) if len(self.configs) > 1 else self.measure
        self.step: Step = GraphedStep(self._step, labels.device) if self.graphed else self._step

    def called(self, rows: Tensor, measure: LossFunction) -> tuple[dict[str, Any], Callable[[Any], Tensor]]:
        """As `rules.called`, on a minibatch."""
        return called(self.configs[0].rule, measure, self.targets[rows], self.dataset.train.labels[rows])

    def _step(self, rows: Tensor) -> Tensor:
        """One training step; the loss of each run."""
        several = len(self.configs) > 1
        more, loss_of = self.called(rows, self.measure_all)
        images = self.dataset.train.images
        inputs = side_by_side(images[rows.T]) if several else images[rows]
        with autocast(self.configs[0].precision, rows.device):
            output = self.trained(inputs, **more)
        loss = loss_of(output)
        self.optimizer.zero_grad()
        (loss.sum() if several else loss).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def alignment(self, model: LearningRule, rows: Tensor, epochs: float) -> AlignmentSample:
        """Of the run whose model it is, on its minibatch."""
        start = time.perf_counter()
        with autocast(self.configs[0].precision, rows.device):
            more, loss_of = self.called(rows, self.measure)
            gradients = alignment(model, loss_of, self.dataset.train.images[rows], **more)
            feedback = feedback_alignment(model)
        return AlignmentSample(
            epochs=epochs,
            gradients={name: found.cosine for name, found in gradients.items()},
            feedback={name: found.cosine for name, found in feedback.items()},
            seconds=time.perf_counter() - start,
        )


def train_epoch(training: Training, epoch: int) -> tuple[list[float], list[list[AlignmentSample]]]:
    """One pass over the training data: for each run the mean loss per sample, and what was measured on the way."""
    config, group, labels = training.configs[0], training.group, training.dataset.train.labels
    torch.manual_seed(_seed(config, epoch))  # for an asynchronous relaxation
    for model in (training.trained, *training.measured):
        model.train()
    mirrors = "mirror" in config.feedback.values()
    total = torch.zeros(len(training.configs), dtype=torch.float64, device=labels.device)
    count, per_sample = 0, labels[:1].numel()
    samples: list[list[AlignmentSample]] = [[] for _ in training.configs]
    for i, drawn in enumerate(_drawn(len(labels), training.configs, epoch)):
        if config.alignment_every and i % config.alignment_every == 0:
            epochs = epoch - 1 + i * config.batch_size / kept_samples(len(labels), config)
            each = drawn.to(labels.device).view(len(samples), -1)
            for found, model, rows in zip(samples, training.measured, each, strict=True):
                if isinstance(model, LearningRule):
                    found.append(training.alignment(model, rows, epochs))
        rows = group.share(drawn).to(labels.device)
        if mirrors:
            mirror_weights(training.network)
        total += training.step(rows)
        count += rows.numel() * per_sample
    total, number = group.total(total, torch.tensor(count, device=total.device))
    return [len(samples) * summed / int(number) for summed in total.tolist()], samples


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Within it, matrix products and convolutions are taken in the precision, and the relaxation phase after them."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The paper's loss, summed over minibatch and outputs, so that ∂L/∂x^L = 2 (x^L − T)."""
    return ((output - target) ** 2).sum()


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """In nats, summed over all labels."""
    return functional.cross_entropy(output, labels, reduction="sum")


def measured_by(config: RunConfig) -> LossFunction:
    """The loss of a description, taken in float32 whatever the precision of the network."""
    measure = LOSSES[config.loss]
    return measure if config.precision == "fp32" else partial(_in_float32, measure)


def _in_float32(measure: LossFunction, output: Tensor, wanted: Tensor) -> Tensor:
    return measure(output.float(), wanted)


LOSSES: dict[Loss, LossFunction] = {"squared-error": squared_error, "cross-entropy": cross_entropy}
OPTIMIZERS: dict[OptimizerName, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}


def minibatches(size: int, config: RunConfig, epoch: int) -> Iterator[Tensor]:
    """Row numbers, shuffled anew in every epoch; the same for every learning rule and after a resumption."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_seed(config, epoch)))
    for start in range(0, kept_samples(size, config), config.batch_size):
        yield order[start : start + config.batch_size]


def _drawn(size: int, configs: Sequence[RunConfig], epoch: int) -> Iterator[Tensor]:
    """The minibatches of one run; of several, a row of each in every one."""
    for own in zip(*(minibatches(size, config, epoch) for config in configs), strict=True):
        yield own[0] if len(own) == 1 else torch.stack(own)


def kept_samples(size: int, config: RunConfig) -> int:
    """How many of ``size`` samples are left when the last minibatches are left out."""
    if not config.left_out:
        return size
    return max(0, math.ceil(size / config.batch_size) - config.left_out) * config.batch_size


def _seed(config: RunConfig, epoch: int) -> int:
    return int(np.random.SeedSequence((config.seed, epoch)).generate_state(1)[0])


@torch.no_grad()
def accuracy(
    model: nn.Module,
    split: Split,
    batch_size: int = 2000,
    *,
    group: Group = ALONE,
    precision: Precision = "fp32",
) -> float:
    """Share of the split's labels that are the likeliest by the model, in [0, 1]."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for start in range(0, len(split), batch_size):
        rows = group.share(torch.arange(start, min(start + batch_size, len(split)), device=correct.device))
        with autocast(precision, rows.device):
            output = model(split.images[rows])
        correct += (output.argmax(1) == split.labels[rows]).sum()
    return int(*group.total(correct)) / split.labels.numel()
