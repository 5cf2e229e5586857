"""Lightning and Fabric: the wrapper is the network that a `LightningModule` trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from relaxprop.solvers import Solver
from tests.integrations.problem import EQUAL, OTHER, ROUNDING, distance, mlp, samples, weights, wrapped

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*srun:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
]


def network(solver: Solver | None) -> nn.Module:
    return mlp() if solver is None else wrapped(mlp(), solver)


class Learner(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Trains a network on classes, by Lightning's loop or by its own."""

    def __init__(self, solver: Solver | None, *, automatic: bool = True) -> None:
        super().__init__()
        self.network = network(solver)
        self.automatic_optimization = automatic

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
        x, labels = batch
        loss = functional.cross_entropy(self.network(x), labels)
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.1)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*samples(16)), batch_size=4)


def trainer(folder: Path, **options: Any) -> Any:
    settings = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
    }  # fmt: skip
    return lightning.Trainer(**settings | options)


def trained(solver: Solver | None, folder: Path, *, automatic: bool = True, **options: Any) -> dict[str, Tensor]:
    learner = Learner(solver, automatic=automatic)
    trainer(folder, **options).fit(learner, loader())
    return weights(learner)


OPTIONS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "manual, clipped": {"automatic": False},
    "clipped": {"gradient_clip_val": 0.1},
    "accumulated": {"accumulate_grad_batches": 2},
    "bfloat16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_it_trains_as_it_trains_the_plain_network(options: dict[str, Any], tmp_path: Path) -> None:
    expected = trained(None, tmp_path, **options)
    # Half precision rounds states and products, and Adam divides by the gradient's size.
    allowed = 0.05 if "precision" in options else 1e-3
    assert distance(trained(EQUAL["default"], tmp_path, **options), expected) < ROUNDING
    assert distance(trained(EQUAL["cut"], tmp_path, **options), expected) < allowed
    assert distance(trained(OTHER, tmp_path, **options), expected) > 2 * allowed


@pytest.mark.parametrize("solver", [*EQUAL.values(), OTHER], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(solver: Solver, tmp_path: Path) -> None:
    expected = trained(solver, tmp_path)
    keeper = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="kept")
    trainer(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[keeper]).fit(Learner(solver), loader())
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)["state_dict"]
    assert list(kept) == list(Learner(None).state_dict())
    learner = Learner(solver)
    trainer(tmp_path).fit(learner, loader(), ckpt_path=tmp_path / "kept.ckpt")
    assert distance(weights(learner), expected) == 0


def test_a_lightning_module_within_the_wrapper_is_refused() -> None:
    with pytest.raises(TypeError, match=r"LightningModule.*self\.network = ActivationRelaxation\(network\)"):
        wrapped(Learner(None), EQUAL["default"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision: str) -> None:
    def found(solver: Solver | None) -> dict[str, Tensor]:
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = network(solver)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
        for i, (x, labels) in enumerate(fabric.setup_dataloaders(loader())):
            fabric.backward(functional.cross_entropy(model(x), labels) / 2)
            if i % 2:
                fabric.clip_gradients(model, optimizer, max_norm=0.2)
                optimizer.step()
                optimizer.zero_grad()
        return weights(model)

    expected, allowed = found(None), 1e-3 if precision == "bf16-mixed" else ROUNDING
    for solver in EQUAL.values():
        assert distance(found(solver), expected) < allowed
    assert distance(found(OTHER), expected) > 5 * allowed
