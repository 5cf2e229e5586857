"""Others' code is measured on the same network, where it is there; stand-ins with their interfaces are made here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from relaxprop.lab.bench import against, problems, suite

TORCH2PC = """
import json
from pathlib import Path
print("Running")
def PCInfer(model, LossFun, X, Y, ErrType, eta=0.1, n=20, vinit=None):
    with Path(__file__).with_name("log.jsonl").open("a") as log:
        print(json.dumps([ErrType, eta, n, [[type(m).__name__ for m in layer] for layer in model]]), file=log)
    LossFun(model(X), Y).backward()
"""
FUNCTIONS = """
import subprocess
from pathlib import Path
import torch
import torchvision
import torchvision.transforms as transforms
from torch.nn import functional
def tanh(x): return torch.tanh(x)
def tanh_deriv(x): return 1 - torch.tanh(x) ** 2
def linear(x): return x
def linear_deriv(x): return torch.ones_like(x).to(DEVICE)
class Learner:
    def learn_batch(self, inps, labels, num_inference_steps, update_weights=True):
        print("learning")
        x = inps
        for layer in self.layers:
            x = layer.forward(x)
            getattr(layer, "df", getattr(layer, "fn_deriv", tanh_deriv))(x)
        rates = [(layer.inference_lr, layer.weight_lr) for layer in self.layers if hasattr(layer, "weights")]
        torch.save([x, labels, num_inference_steps, rates], Path(__file__).with_name("seen.pt"))
"""
MAIN = (
    FUNCTIONS
    + """
class FCLayer(object):
    def __init__(self, input_size, output_size, batch_size, fn, fn_deriv, inference_lr, weight_lr, device="cpu"):
        self.weights = torch.empty(input_size, output_size)
        self.bias = torch.empty(batch_size, output_size)
        self.fn, self.fn_deriv, self.inference_lr, self.weight_lr = fn, fn_deriv, inference_lr, weight_lr
    def forward(self, x):
        return self.fn(x @ self.weights + self.bias)
class Net(Learner):
    def __init__(self, layers, n_inference_steps, use_backwards_weights, update_backwards_weights,
                 use_backward_nonlinearity, device="cpu"):
        subprocess.call(["echo", "checking"])
        assert use_backward_nonlinearity and not use_backwards_weights
        self.layers = layers
"""
)
CNN_LAYERS = """
import torch
from torch.nn import functional
class ConvLayer(object):
    def __init__(self, input_size, num_channels, num_filters, batch_size, kernel_size, learning_rate, f, df,
                 inference_lr, padding=0, stride=1, device="cpu"):
        print(input_size)
        self.shape = (batch_size, num_channels, input_size, input_size)
        self.weights = torch.empty(num_filters, num_channels, kernel_size, kernel_size)
        self.f, self.df, self.inference_lr, self.weight_lr = f, df, inference_lr, learning_rate
    def forward(self, x):
        assert tuple(x.shape) == self.shape
        return self.f(functional.conv2d(x, self.weights))
class MaxPool(object):
    def __init__(self, kernel_size, device="cpu"):
        self.kernel_size = kernel_size
    def forward(self, x):
        return functional.max_pool2d(x, self.kernel_size)
class ProjectionLayer(object):
    def __init__(self, input_size, output_size, f, df, learning_rate, inference_lr, device="cpu"):
        batch, *self.shape = input_size
        self.f, self.df, self.inference_lr, self.weight_lr = f, df, inference_lr, learning_rate
        self.weights, self.bias = torch.empty(0), torch.empty(batch, output_size)
    def forward(self, x):
        assert list(x.shape[1:]) == self.shape
        return self.f(x.reshape(len(x), -1) @ self.weights + self.bias)
class FCLayer(object):
    def __init__(self, input_size, output_size, batch_size, learning_rate, inference_lr, f, df, device="cpu"):
        self.weights, self.bias = torch.empty(input_size, output_size), torch.empty(batch_size, output_size)
        self.f, self.df, self.inference_lr, self.weight_lr = f, df, inference_lr, learning_rate
    def forward(self, x):
        return self.f(x @ self.weights + self.bias)
"""
CNN = (
    FUNCTIONS
    + """
from cnn_layers import *
class ARNet(Learner):
    def __init__(self, layers, n_inference_steps_train, inference_learning_rate, weight_learning_rate, device="cpu",
                 use_FC_backwards_nonlinearity=False, use_conv_backwards_nonlinearity=False):
        assert use_FC_backwards_nonlinearity and use_conv_backwards_nonlinearity
        self.layers = layers
"""
)


@pytest.fixture
def torch2pc(tmp_path: Path) -> Path:
    (tmp_path / "TorchSeq2PC.py").write_text(TORCH2PC)
    return tmp_path


@pytest.fixture
def authors(tmp_path: Path) -> Path:
    for name, text in (("main", MAIN), ("cnn", CNN), ("cnn_layers", CNN_LAYERS)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("mlp", [["Flatten", "Linear", "Tanh"], ["Linear", "Tanh"], ["Linear", "Tanh"], ["Linear"]]),
        ("chain-2", [["Linear", "Tanh"], ["Linear", "Tanh"], ["Linear"]]),
    ],
)
def test_torch2pc_trains_the_network_layer_by_layer(torch2pc: Path, model: str, layers: list[list[str]]) -> None:
    rival = against.find(str(torch2pc))
    problem = problems.build(model, batch_size=2)
    steps = rival.steps(problem)
    for step in steps.values():
        step()
    calls = [json.loads(line) for line in (torch2pc / "log.jsonl").read_text().splitlines()]
    assert calls == [
        ["FixedPred", 0.1, 100, layers],
        ["FixedPred", 1, len(layers), layers],
        ["Strict", 0.1, 10, layers],
        ["Exact", 1, 1, layers],
    ]
    assert all(name.startswith("Torch2PC ") for name in steps)
    assert all(p.grad is None for p in problem.network.parameters())  # for whoever is next


def test_torch2pc_is_found_by_its_name(torch2pc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"Torch2PC cannot be imported here: name the folder that holds TorchSeq2PC\.py"
    ):
        against.find("Torch2PC")
    monkeypatch.syspath_prepend(str(torch2pc))
    assert against.find("Torch2PC").name == "Torch2PC"


@pytest.mark.parametrize("model", ["mlp", "chain-3", "cnn", "cnn-as-coded"])
def test_the_authors_code_has_the_same_network(authors: Path, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    problem = problems.build(model, batch_size=2)
    with torch.no_grad():
        for parameter in problem.network.parameters():  # biases too are handed over, where their layer has one
            if parameter.dim() == 1 and model in ("mlp", "chain-3"):
                parameter.fill_(0.1)
    (step,) = against.find(str(authors)).steps(problem).values()
    step()
    output, labels, steps, rates = torch.load(authors / "seen.pt")
    torch.testing.assert_close(output, problem.network(problem.inputs).detach())
    assert torch.equal(labels, problem.targets)
    assert steps == 100
    assert set(rates) == {(0.1, 0.0)}
    assert len(rates) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in problem.network.modules())
    assert capfd.readouterr() == ("", "")
    assert not {"cnn_layers", "torchvision", "main", "cnn"} & sys.modules.keys()


def test_both_are_measured_in_the_same_rounds(torch2pc: Path, authors: Path) -> None:
    assert torch2pc == authors  # the folder that holds both is Torch2PC's
    (authors / "TorchSeq2PC.py").rename(authors / "elsewhere.py")
    own = authors / "torch2pc"
    own.mkdir()
    (authors / "elsewhere.py").rename(own / "TorchSeq2PC.py")
    rivals = [against.find(str(folder)) for folder in (own, authors)]
    assert [rival.name for rival in rivals] == ["Torch2PC", "the authors' code"]
    measured = suite.run(suite.Plan(solvers=("equilibrium",), rules=("ar",), batch_size=2, against=rivals), rounds=2)
    names = [cost.rule for cost in measured.costs]
    assert names[:2] == ["backpropagation", "Equilibrium()"]
    assert names[2:] == [
        "Torch2PC FixedPred(0.1, 100)", "Torch2PC FixedPred(1, 4)", "Torch2PC Strict(0.1, 10)", "Torch2PC Exact",
        "the authors' code (0.1, 100)",
    ]  # fmt: skip
    # The stand-ins' operations: backpropagation's own; a forward pass.
    assert [cost.floor for cost in measured.costs[2:6]] == [1, 1, 1, 1]
    forward, layers = measured.costs[-1].operations, (784 * 300, 300 * 300, 300 * 100, 100 * 10)
    assert forward == 2 * 2 * sum(layers)


@pytest.mark.parametrize("model", ["resnet-18", "transformer"])
def test_what_is_no_chain_is_refused(torch2pc: Path, model: str) -> None:
    with pytest.raises(ValueError, match=r"Torch2PC trains chains \(nn.Sequential\) only"):
        suite.Plan(model, batch_size=2, against=[against.find(str(torch2pc))]).prepare()


def test_a_layer_that_they_do_not_have_is_refused(authors: Path) -> None:
    problem = problems.build("chain-1", batch_size=2)
    other = replace(problem, network=nn.Sequential(nn.Linear(128, 10), nn.Sigmoid()))
    with pytest.raises(ValueError, match="the authors' code has no layer for Sigmoid"):
        against.find(str(authors)).steps(other)


def test_without_their_cnn_only_linear_layers_are_trained(authors: Path) -> None:
    (authors / "cnn.py").unlink()
    rival = against.find(str(authors))
    assert rival.steps(problems.build("mlp", batch_size=2))
    with pytest.raises(ValueError, match=r"has no cnn\.py"):
        rival.steps(problems.build("cnn", batch_size=2))


def test_a_file_that_cannot_be_imported_is_named(torch2pc: Path) -> None:
    (torch2pc / "TorchSeq2PC.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(ValueError, match=r"TorchSeq2PC\.py cannot be imported: No module named 'a_package"):
        against.find(str(torch2pc)).steps(problems.build("mlp", batch_size=2))


def test_a_folder_that_holds_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither") as caught:
        against.find(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "main.py").write_text("class Network: pass")
    with pytest.raises(ValueError, match=r"holds neither TorchSeq2PC\.py"):
        against.find(str(tmp_path))
    with pytest.raises(ValueError, match="nowhere is neither the name Torch2PC nor a folder"):
        against.find("nowhere")
