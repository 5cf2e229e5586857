"""The library's one door."""

import inspect
import subprocess
import sys
from importlib.resources import files

import pytest

import relaxprop

PUBLIC_NAMES = [
    "PAPER",
    "ActivationRelaxation",
    "Alignment",
    "ClosedForm",
    "Continuous",
    "Convergence",
    "DirectFeedback",
    "DivergedError",
    "Equilibrium",
    "EquilibriumPropagation",
    "Euler",
    "Frozen",
    "Locality",
    "NonFiniteStateError",
    "PredictiveCoding",
    "Relaxation",
    "UnconvergedWarning",
    "alignment",
    "certificate",
    "convergence",
    "describe_locality",
    "drop_derivatives",
    "feedback_alignment",
    "mirror_weights",
    "steps_to_converge",
    "use_feedback",
]


def test_exported_names() -> None:
    assert sorted(relaxprop.__all__) == sorted(PUBLIC_NAMES)


def test_every_public_name_is_documented() -> None:
    for name in PUBLIC_NAMES:
        documentation = inspect.getdoc(getattr(relaxprop, name))
        assert documentation, name
        # A dataclass without a docstring gets its signature as one.
        assert not documentation.startswith(f"{name}("), name


def test_every_public_argument_is_documented() -> None:
    for name in PUBLIC_NAMES:
        value = getattr(relaxprop, name)
        if not callable(value) or (inspect.isclass(value) and issubclass(value, Exception)):
            continue
        documentation = inspect.getdoc(value) or ""
        for argument in inspect.signature(value).parameters:
            assert f"{argument}:" in documentation, f"{name}: {argument}"


def test_signatures_of_the_contract() -> None:
    signatures = {
        "Euler": "(step_size=0.1, num_steps=None, *, order='simultaneous', tolerance=None)",
        "ClosedForm": "(step_size=0.1, num_steps=None, *, order='simultaneous')",
        "Continuous": "(duration=10.0)",
        "Equilibrium": "()",
        "steps_to_converge": "(depth, step_size, tolerance, *, order='simultaneous')",
        "Frozen": "(relaxation_derivative=True, update_derivative=True, update_activity=True, input=True)",
        "describe_locality": "(model, *inputs, **kwargs)",
        "alignment": "(model, loss_fn, *inputs, **kwargs)",
        "certificate": "(model, *inputs, **kwargs)",
        "convergence": "(model, loss_fn, *inputs, solver=None, **kwargs)",
        "use_feedback": "(module, rule='learned', *, skip=())",
        "mirror_weights": "(module, *, samples=64, rate=0.1)",
        "drop_derivatives": "(module, *, relaxation=True, update=True)",
    }
    for name, expected in signatures.items():
        signature = inspect.signature(getattr(relaxprop, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == expected


def test_types_are_shipped() -> None:
    assert files("relaxprop").joinpath("py.typed").is_file()


def test_rooms_with_names_of_their_own_are_found_too() -> None:
    command = "import relaxprop; print(relaxprop.rules.DirectFeedback.__name__, relaxprop.plots.__name__)"
    found = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["DirectFeedback", "relaxprop.plots"]
    with pytest.raises(AttributeError, match="module 'relaxprop' has no attribute 'rule_of_thumb'"):
        relaxprop.rule_of_thumb  # noqa: B018
