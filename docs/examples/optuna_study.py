"""Optuna: a relaxation that is short and comes near to backpropagation."""

import optuna
import torch
from torch import nn

from relaxprop import ActivationRelaxation, ClosedForm, alignment

torch.manual_seed(0)
network = nn.Sequential(
    nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
)
x, labels = torch.rand(32, 20), torch.randint(4, (32,))


def objective(trial):
    step_size = trial.suggest_float("step_size", 0.05, 1.0)
    num_steps = trial.suggest_int("num_steps", 1, 100)
    model = ActivationRelaxation(network, solver=ClosedForm(step_size, num_steps))
    found = alignment(model, lambda y: nn.functional.cross_entropy(y, labels), x)
    return max(a.distance for a in found.values()), num_steps


def main(trials=30):
    study = optuna.create_study(
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    study.optimize(objective, n_trials=trials)
    return study


if __name__ == "__main__":
    for best in main().best_trials:  # none of the others is both shorter and nearer
        (distance, steps), size = best.values, best.params["step_size"]
        print(f"distance {distance:.1e} after {steps:.0f} steps of {size:.2f}")
