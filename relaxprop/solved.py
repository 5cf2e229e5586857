"""What somebody's own ``solve(graph)`` has to return: a state for every vertex, and a record of how they were found.

PyTorch would take less without a word: a vertex that has no state leaves the weights before it without a gradient, and
a state with one dimension more is summed over it.

May import: graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from relaxprop.graph import Graph, States, check_are_states

Record = TypeVar("Record")


def checked(graph: Graph, solve: Callable[[Graph], Any], record: type[Record], name: str) -> tuple[States, Record]:
    """What ``solve(graph)`` returns. Refuses what is not a state for every vertex and a record.

    A vertex that nothing reaches may be left out, as `Graph.equilibrium` does.

    Args:
        graph: the recorded pass.
        solve: gives the states and the record.
        record: the class of the record.
        name: of ``solve``, for the message.

    Raises:
        TypeError: if it is not a pair of a dictionary of tensors and a record.
        ValueError: if a vertex has no state, a state is not like the vertex's activity (`check_are_states`), or a key
            is no vertex.
    """
    found = solve(graph)
    match found:
        case Mapping() as states, last if isinstance(last, record):
            pass
        case _:
            parts = found if isinstance(found, tuple) else [found]
            got = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(
                f"{name} must return two things, a dictionary of states by vertex and a {record.__name__}, got {got}"
            )
    given = {v: x for v, x in states.items() if x is not None}
    check_are_states(given, graph, name)
    if missing := [v for v in graph.vertices if v not in given]:
        reached = graph.equilibrium()
        for vertex in missing:
            if vertex in reached:
                raise ValueError(
                    f"{name} gives vertex {vertex.name!r} no state: each of graph.vertices is a key of the states, "
                    "and the value is a tensor of the shape of the vertex's activity"
                )
    return given, last
