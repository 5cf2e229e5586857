"""A learning rule of one's own: errors of three values, −1, 0 and 1, go from layer to layer towards the input.

The states are ``x_i = g · sign((A x)_i + s_i)`` where that is larger than a threshold, and 0 elsewhere: what a vertex
sends on is a spike, excitatory or inhibitory, or none. `Graph.sweep` goes from the output towards the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from relaxprop.graph import Graph, States, Vertex
from relaxprop.rules import Phase, Rule, RuleSettings


@dataclass(frozen=True)
class SpikingSettings(RuleSettings):
    """The arguments of `SpikingErrors`, checked together."""

    gain: float = 0.1
    threshold: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gain > 0 <= self.threshold:
            raise ValueError(f"gain must be > 0 and threshold ≥ 0, got {self.gain!r} and {self.threshold!r}")


class SpikingErrors(Rule):
    """Trains ``module`` by errors of three values."""

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        super().__init__(module, SpikingSettings(**settings))

    def solve(self, graph: Graph) -> tuple[States, Phase]:
        def spike(vertex: Vertex, arriving: Tensor) -> Tensor:
            spikes: Tensor = arriving.sign() * (arriving.abs() > self.settings.threshold)
            return spikes * float(self.settings.gain)

        states = graph.sweep(spike)
        return states, Phase(len(states), graph.depth, products=2)
