"""The networks that are measured on random images, and what there is to do with them.

May import: frozen, public names, solvers, vertices, lab.bench.measuring, lab.data, lab.models, lab.training.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn

from relaxprop import (
    PAPER,
    ActivationRelaxation,
    ClosedForm,
    DirectFeedback,
    Equilibrium,
    EquilibriumPropagation,
    Euler,
    Frozen,
    PredictiveCoding,
)
from relaxprop.frozen import ALL_FROZEN
from relaxprop.lab import models
from relaxprop.lab.bench.measuring import Step
from relaxprop.lab.data import Dataset, Split
from relaxprop.lab.training import squared_error
from relaxprop.solvers import Solver
from relaxprop.vertices import find_vertices

IMAGE_SHAPES = {"mlp": (1, 28, 28), "cnn": (3, 32, 32), "cnn-as-coded": (3, 32, 32)}  # MNIST's and CIFAR's
EULER_STEPS = 10
RULE_STEPS = 10  # of predictive coding, and of each phase of equilibrium propagation
PREDICTIVE, NUDGED = f"PredictiveCoding(0.1, {RULE_STEPS})", f"EquilibriumPropagation(0.1, {RULE_STEPS})"
UPDATES = {"b": Frozen(update_derivative=False), "d": Frozen(update_activity=False)}  # the paper's conditions


def solvers() -> dict[str, Solver]:
    """What is compared with backpropagation."""
    found = (Equilibrium(), ClosedForm(), PAPER, Euler(0.1, 100))
    return {f"{type(s).__name__}({', '.join(map(str, _sizes(s)))})": s for s in found}


def _sizes(solver: Solver) -> list[float]:
    options = vars(solver)
    return [options["step_size"], options["num_steps"]] if options.get("num_steps") else []


class Problem:
    """A network on random images of the size that it is for, and what there is to do with it."""

    def __init__(self, model: str, batch_size: int, device: torch.device | str) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(batch_size, *IMAGE_SHAPES[model], generator=generator)
        labels = torch.randint(10, (batch_size,), generator=generator)
        dataset = Dataset("random", tuple(map(str, range(10))), Split(images, labels), Split(images, labels))
        self.dataset, self.model, self.device = dataset.to(device, models.memory_format(model)), model, device
        self.inputs = self.dataset.train.images
        self.targets = nn.functional.one_hot(self.dataset.train.labels, 10).to(self.inputs.dtype)

    def network(self) -> nn.Module:
        return models.build(self.model, self.dataset, seed=0).to(self.device)

    def training_step(self, solver: Solver | None, frozen: Frozen = ALL_FROZEN) -> Step:
        """Forward pass, backward pass or relaxation phase, update."""
        network = self.network()
        trained = network if solver is None else ActivationRelaxation(network, solver=solver, frozen=frozen)
        return self._step(network, lambda: squared_error(trained(self.inputs), self.targets))

    def other_rules(self) -> dict[str, Step]:
        """Training steps of the rules beside Activation Relaxation."""
        networks = [self.network() for _ in range(4)]
        direct, projected = DirectFeedback(networks[0]), DirectFeedback(networks[1], error="target")
        moving = PredictiveCoding(networks[2], squared_error, num_steps=RULE_STEPS)
        nudged = EquilibriumPropagation(networks[3], squared_error, num_steps=RULE_STEPS)
        x, t = self.inputs, self.targets
        losses: dict[str, Callable[[], Tensor]] = {
            "DirectFeedback()": lambda: squared_error(direct(x), t),
            "DirectFeedback(target)": lambda: squared_error(projected(x, target=t), t),
            PREDICTIVE: lambda: moving(x, target=t),
            NUDGED: lambda: nudged(x, target=t),
        }
        steps = zip(losses.items(), networks, strict=True)
        return {name: self._step(network, loss) for (name, loss), network in steps}

    def _step(self, network: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
        # A step of no length costs the same, and in however many rounds no rule diverges on images without a pattern.
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)

        def step() -> None:
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    def parts(self) -> dict[str, Step]:
        """Steps of Euler and conditions of the update, and the passes that are the least which they take."""
        network = self.network()
        vertices = find_vertices(network, "activations")
        closed_form = PAPER

        def forward() -> tuple[Tensor, list[Tensor]]:
            activities: list[Tensor] = []
            handles = [m.register_forward_hook(lambda m, args, y: activities.append(y)) for m in vertices]
            output = network(self.inputs)
            for handle in handles:
                handle.remove()
            return squared_error(output, self.targets), activities

        def forward_and_backward() -> None:
            loss, activities = forward()
            torch.autograd.grad(loss, activities)

        def plain_forward() -> None:
            network(self.inputs)

        kept_loss, kept_activities = forward()

        def backward() -> None:
            torch.autograd.grad(kept_loss, kept_activities, retain_graph=True)

        return {
            "forward": plain_forward,
            "backward": backward,
            "forward and backward": forward_and_backward,
            "Euler steps": self._euler_steps(network, ALL_FROZEN),
            "unfrozen Euler steps": self._euler_steps(network, Frozen(relaxation_derivative=False)),
            **{f"condition {name}": self.training_step(closed_form, frozen) for name, frozen in UPDATES.items()},
        }

    def _euler_steps(self, network: nn.Module, frozen: Frozen) -> Step:
        model = ActivationRelaxation(network, solver=PAPER.replay(), frozen=frozen)
        for _ in range(2):  # the first pass learns where copies are needed
            recording = model.record([self.inputs])
        (output,) = recording.graph.outputs
        recording.graph.drive_outputs([2 * (output.detach() - self.targets)])
        euler, initial = PAPER.replay(), recording.graph.initial_states()

        def step() -> None:
            for _ in islice(euler.trajectory(recording.graph, initial), EULER_STEPS):
                pass

        return step
