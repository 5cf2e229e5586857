"""The training loop. The learning rule is an argument: backpropagation is the same loop with the wrapper off.

May import: public names, rule, lab.checkpoint, lab.config, lab.data, lab.distributed, lab.files, lab.models,
lab.results, lab.rules, lab.store.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
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
from relaxprop.lab.checkpoint import kept_checkpoint
from relaxprop.lab.config import Loss, OptimizerName, Precision, RunConfig
from relaxprop.lab.data import DataError, Dataset, Split
from relaxprop.lab.distributed import ALONE, Group, this_group
from relaxprop.lab.files import OutputError
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
    if config.validation:
        dataset = dataset.held_out(config.validation)
    if config.enlarged > 1:
        dataset = dataset.enlarged(config.enlarged)
    if not min(kept_samples(len(split), config) for split in (dataset.train, dataset.test)):
        raise DataError(
            f"left_out={config.left_out} minibatches of {config.batch_size} are all that {dataset.name} has"
        )
    group = this_group()
    if group.size > 1:
        _check_shared(config)
    record = Record(config, root) if root is not None else None
    finished = record.finished_epochs() if record is not None and group.is_first else []
    if group.agreed(len(finished)) >= config.epochs:
        finished = finished if record is None or group.is_first else record.finished_epochs()
        if record is not None and group.is_first:
            record.tidy()
        yield from ((metrics, False) for metrics in finished[: config.epochs])
        return
    if not dataset.is_images and config.loss == "squared-error":
        raise models.ModelError(
            f"{dataset.name} has a label at every place of a text: train it with --loss cross-entropy"
        )
    if config.signed_inputs:
        dataset = dataset.signed()
    model = models.build(config.model, dataset, seed=config.seed, feedback=config.feedback, dropped=config.dropped)
    optimizer = OPTIMIZERS[config.optimizer](_parameter_groups(model, config), lr=config.learning_rate)
    with _threads(config.threads), _opened(record, group) as opened:
        model.to(device)
        if opened.checkpoint is not None:
            opened.checkpoint.load_into(model, optimizer)
        dataset = dataset.to(device, models.memory_format(config.model))
        trained: nn.Module = model
        if config.rule != "backprop":
            trained = wrapped = wrapped_by(config, model, check_finite=check_finite)
            if record is not None and group.is_first:
                few = dataset.train.images[:2]
                linear = config.frozen.relaxation_derivative
                record.save_reports(
                    describe_locality(wrapped, few) if config.vertices != "operations" else None,
                    certificate(wrapped, few) if isinstance(wrapped, ActivationRelaxation) and linear else None,
                )
        trained = group.spread(trained)
        found = list(opened.metrics)
        yield from ((metrics, False) for metrics in found[: config.epochs])
        rows = kept_samples(len(dataset.test), config)
        test = Split(dataset.test.images[:rows], dataset.test.labels[:rows])
        for epoch in range(len(found) + 1, config.epochs + 1):
            samples: list[AlignmentSample] = []
            start = time.perf_counter()
            with expected_transients():
                loss = train_epoch(trained, optimizer, dataset, config, epoch, samples.append, group)
            seconds = time.perf_counter() - start - sum(sample.seconds for sample in samples)
            metrics = EpochMetrics(
                epoch=epoch,
                train_loss=loss,
                test_accuracy=accuracy(model, test, group=group, precision=config.precision),
                seconds=seconds,
                alignment=tuple(samples),
            )
            found.append(metrics)
            if record is not None and group.is_first:
                record.save(found, model, optimizer)
            yield metrics, True


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
def _threads(number: int) -> Iterator[None]:
    """Within it, PyTorch computes by so many threads: the order in which it takes sums depends on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """The convolutions have a learning rate of their own."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    theirs = {p: None for m in convolutions for p in m.parameters()}
    others = [p for p in model.parameters() if p not in theirs]
    rate = config.convolutional_factor * config.learning_rate
    groups: list[dict[str, Any]] = [{"params": others}, {"params": [*theirs], "lr": rate}]
    return [group for group in groups if group["params"]]


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    config: RunConfig,
    epoch: int,
    on_alignment: Callable[[AlignmentSample], None] = lambda sample: None,
    group: Group = ALONE,
) -> float:
    """One pass over the training data; the mean loss per sample."""
    torch.manual_seed(_seed(config, epoch))  # for an asynchronous relaxation
    model.train()
    labels = dataset.train.labels
    squared = config.loss == "squared-error"
    targets = functional.one_hot(labels, len(dataset.classes)).to(dataset.train.images.dtype) if squared else labels
    measure = measured_by(config)
    mirrors = "mirror" in config.feedback.values()
    total = torch.zeros((), dtype=torch.float64, device=targets.device)
    count = 0
    relaxed: Any = model.module if group.size > 1 else model
    for i, rows in enumerate(minibatches(len(dataset.train), config, epoch)):
        if config.alignment_every and i % config.alignment_every == 0 and isinstance(relaxed, LearningRule):
            index = rows.to(targets.device)
            epochs = epoch - 1 + i * config.batch_size / kept_samples(len(dataset.train), config)
            with autocast(config.precision, index.device):
                more, loss_of = called(config.rule, measure, targets[index], labels[index])
                sample = _measure_alignment(relaxed, loss_of, dataset.train.images[index], more, epochs)
            on_alignment(sample)
        index = group.share(rows).to(targets.device)
        if mirrors:
            mirror_weights(relaxed)
        more, loss_of = called(config.rule, measure, targets[index], labels[index])
        with autocast(config.precision, index.device):
            output = model(dataset.train.images[index], **more)
        loss = loss_of(output)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach()
        count += labels[index].numel()
    total, number = group.total(total, torch.tensor(count, device=total.device))
    return float(total) / int(number)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Within it, matrix products and convolutions are taken in the precision, and the relaxation phase after them."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _measure_alignment(
    model: LearningRule, loss_of: Callable[[Any], Tensor], inputs: Tensor, more: dict[str, Any], epochs: float
) -> AlignmentSample:
    start = time.perf_counter()
    gradients = alignment(model, loss_of, inputs, **more)
    feedback = feedback_alignment(model)
    return AlignmentSample(
        epochs=epochs,
        gradients={name: found.cosine for name, found in gradients.items()},
        feedback={name: found.cosine for name, found in feedback.items()},
        seconds=time.perf_counter() - start,
    )


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
