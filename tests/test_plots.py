"""What the plots draw is what was measured, or what the hop distributions say."""

from __future__ import annotations

import sys
from html import unescape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor, nn

from relaxprop import (
    ActivationRelaxation,
    Alignment,
    ClosedForm,
    Continuous,
    Equilibrium,
    Euler,
    Relaxation,
    alignment,
    convergence,
    describe_locality,
    plots,
)
from relaxprop.solvers import Solver
from tests.problems import mlp


@pytest.fixture
def ax() -> Any:
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp(4, 5, 5, 3).double()


def model(solver: Solver, **options: Any) -> ActivationRelaxation:
    return ActivationRelaxation(network(), solver=solver, **options)


def x() -> Tensor:
    return torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)


def squares(y: Tensor) -> Tensor:
    return (y**2).sum()


def record(solver: Solver, **options: Any) -> Relaxation:
    relaxing = model(solver, **options)
    squares(relaxing(x())).backward()  # type: ignore[no-untyped-call]
    assert relaxing.last_relaxation is not None
    return relaxing.last_relaxation


def curves(ax: Axes) -> dict[str, Any]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in ax.get_lines()}


def test_convergence(ax: Axes) -> None:
    result = convergence(model(Euler(0.3, 25)), squares, x())
    assert plots.convergence_curves(result, ax=ax) is ax
    assert (curves(ax)["0.weight"] == result.measured["0.weight"]).all()
    predicted = [line for line in ax.get_lines() if line.get_marker() == "o" and len(np.asarray(line.get_xdata()))]
    weights = [name for name in result.measured if name.endswith("weight")]
    for line, name in zip(predicted, weights, strict=True):
        assert (np.asarray(line.get_ydata()) == result.predicted[name][np.asarray(line.get_xdata())]).all()
    last = weights[-1]  # nothing lies between it and the loss: a logarithmic axis has no place for its zeros
    assert [label for label in curves(ax) if label.startswith(last)] == [f"{last} (exact from the start)"]


def test_alignment_over_training(ax: Axes) -> None:
    found = [alignment(model(ClosedForm(0.1, n)), squares, x()) for n in (1, 10, 100)]
    assert plots.alignment_over_training(found, at=[0, 5, 10], ax=ax) is ax
    assert curves(ax)["0.weight"].tolist() == [a["0.weight"].cosine for a in found]
    assert "0.bias" not in curves(ax)


HOPS = {
    ClosedForm(0.1, 50): stats.binom(50, 0.1),
    Euler(0.1, 50, order="asynchronous"): stats.binom(50, 0.05),
    Continuous(5.0): stats.poisson(5.0),
}


@pytest.mark.parametrize("solver", HOPS, ids=str)
def test_the_bars_are_the_probabilities_of_so_many_hops(solver: Solver, ax: Axes) -> None:
    plots.hop_distribution(solver, 4, ax=ax)
    bars: list[Any] = list(ax.patches)
    heights = np.array([bar.get_height() for bar in bars])
    assert heights == pytest.approx(HOPS[solver].pmf(np.arange(len(bars))), rel=1e-9)
    assert heights.sum() > 0.99
    assert [bar.get_fill() for bar in bars] == [k < 4 for k in range(len(bars))]
    legend = ax.get_legend()
    assert legend is not None
    assert f"{HOPS[solver].cdf(3):.2g} in all" in legend.get_texts()[0].get_text()
    assert ax.get_title() in ("ClosedForm(0.1, 50)", "Euler(0.1, 50, asynchronous)", "Continuous(5.0)")


def test_a_planned_number_of_steps_is_that_of_the_depth(ax: Axes) -> None:
    plots.hop_distribution(ClosedForm(0.5), 4, ax=ax)
    heights = np.array([bar.get_height() for bar in ax.patches])  # type: ignore[attr-defined]
    assert heights[:4].sum() < 1e-15
    assert heights.sum() > 0.99


def test_states_go_from_the_activity_to_the_gradient(ax: Axes) -> None:
    records = [record(Euler(0.5, n), keep_states=True) for n in (1, 2, 200)]
    name = next(iter(records[0].states or {}))
    assert plots.states_over_steps(records, name, sample=1, units=3, ax=ax) is ax
    lines = [np.asarray(line.get_ydata()) for line in ax.get_lines()[:3]]
    activity = network()[:2](x()).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(squares(network()[2:](activity)), activity)
    assert [line[-1] for line in lines] == pytest.approx(gradient[1, :3].tolist(), abs=1e-12)
    assert np.asarray(ax.get_lines()[0].get_xdata()).tolist() == [1, 2, 200]
    plots.states_over_steps(records, name, at=[0.5, 1, 100], ax=ax)


def test_without_axes_a_figure_is_made() -> None:
    first, second = (plots.hop_distribution(Continuous(1.0), 3) for _ in range(2))
    assert isinstance(first, Axes)
    assert first is not second
    plt.close("all")


def test_what_cannot_be_drawn_is_refused(ax: Axes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"Equilibrium\(\) leaves nothing"):
        plots.hop_distribution(Equilibrium(), 3, ax=ax)
    with pytest.raises(TypeError, match=r"solver must be a solver, .*got 'euler'"):
        plots.hop_distribution("euler", 3, ax=ax)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        plots.hop_distribution(Continuous(1.0), 0, ax=ax)
    with pytest.raises(TypeError, match=r"result must be what relaxprop\.convergence returns, got dict"):
        plots.convergence_curves({}, ax=ax)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 0 measurements"):
        plots.alignment_over_training([], ax=ax)
    with pytest.raises(ValueError, match="got 1 measurements and 2 places"):
        plots.alignment_over_training([{"w": Alignment(1, 0, 1, 0)}], at=[1, 2], ax=ax)
    with pytest.raises(TypeError, match="a list of what alignment or feedback_alignment returned, got one of them"):
        plots.alignment_over_training({"w": Alignment(1, 0, 1, 0)}, ax=ax)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a record is None, .* before the first backward pass"):
        plots.states_over_steps([None], "1", ax=ax)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got 0 records"):
        plots.states_over_steps([], "1", ax=ax)
    with pytest.raises(ValueError, match="pass keep_states=True"):
        plots.states_over_steps([record(Euler(0.5, 3))], "1", ax=ax)
    with pytest.raises(ValueError, match="pass at="):
        plots.states_over_steps([record(Continuous(3.0), keep_states=True)], "1", ax=ax)
    kept = [record(Euler(0.5, 3), keep_states=True)]
    with pytest.raises(ValueError, match=r"vertex must be one of .*, got 'no such'"):
        plots.states_over_steps(kept, "no such", ax=ax)
    with pytest.raises(ValueError, match="sample must be at least 0 and below 2, got 2"):
        plots.states_over_steps(kept, next(iter(kept[0].states or {})), sample=2, ax=ax)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        plots.hop_distribution(Continuous(1.0), 3)
    assert raised.value.__notes__ == ["plots need Matplotlib: pip install 'relaxprop[plots]'"]


def test_notebooks_show_records_as_tables() -> None:
    found = record(Euler(0.5, 7), keep_states=True, measure_residual=True)._repr_html_()
    for cell in ("<td>steps</td><td>7</td>", "<td>products with A</td><td>7</td>", "<td>converged</td><td>no</td>"):
        assert cell in found
    assert found.count("<tr>") == 8
    assert "did not relax" not in found

    locality = describe_locality(model(Equilibrium()), x())
    shown = unescape(locality._repr_html_())
    assert shown.count("<tr>") == len(locality.rows) + 1
    for row in locality.rows:
        assert all(entry in shown for entry in (row.update, *row.activities, *row.non_local))


def test_what_is_shown_is_no_markup() -> None:
    shown = Relaxation(1, 1, 1, 1, None, None, unrelaxed=("<script>",))._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown


def test_curves_of_recurrent_layers_are_drawn(ax: Axes) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.f, self.read = nn.RNN(4, 3), nn.Tanh(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            read: Tensor = self.read(self.f(self.layer(x)[0][-1]))
            return read

    relaxing = ActivationRelaxation(Recurrent())
    inputs = torch.rand(3, 2, 4)
    plots.convergence_curves(convergence(relaxing, squares, inputs, solver=Euler(0.3, 9)), ax=ax)
    drawn = {str(line.get_label()).partition(" ")[0] for line in ax.lines}
    assert {"layer.weight_ih_l0", "layer.weight_hh_l0", "read.weight"} <= drawn
    assert not any("bias" in name for name in drawn)
    ax.clear()
    plots.alignment_over_training([alignment(relaxing, squares, inputs)], ax=ax)
    assert not any("bias" in str(line.get_label()) for line in ax.lines)


def test_a_layer_may_be_frozen_or_thawed_between_two_measurements(ax: Axes) -> None:
    one = Alignment(0.5, 60.0, 1.0, 1.0)
    plots.alignment_over_training([{"a": one, "b": one}, {"b": one}, {"b": one, "c": one}], ax=ax)
    lines: Any = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_equal(lines["a"], [0.5, np.nan, np.nan])
    np.testing.assert_equal(lines["b"], [0.5, 0.5, 0.5])
    np.testing.assert_equal(lines["c"], [np.nan, np.nan, 0.5])


def test_what_states_over_steps_cannot_draw_is_refused_by_name() -> None:
    kept = record(Euler(0.3, 5), keep_states=True)
    one_record: Any = kept
    with pytest.raises(TypeError, match="records must be a list of records"):
        plots.states_over_steps(one_record, "1")
    no_integer: Any = 1.0
    with pytest.raises(TypeError, match=r"sample must be an integer, got 1\.0"):
        plots.states_over_steps([kept], "1", sample=no_integer)
    assert kept.states is not None
    turned = Relaxation(2, 2, 5, 5, 0.0, converged=True, states={"1": kept.states["1"] * 1j})
    with pytest.raises(ValueError, match="vertex '1' are complex"):
        plots.states_over_steps([turned], "1")
