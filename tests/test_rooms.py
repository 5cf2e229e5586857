"""The rooms of the package: each file says in its first lines what it may import, and there is no circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import relaxprop

ROOT = Path(relaxprop.__file__).parent
DOORS = {"__init__", "__main__"}  # they may import whatever they show or start
PUBLIC = "public names"  # of the library, through its one door
SAYS = "May import:"


PATHS = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in ROOT.rglob("*") if "__pycache__" not in p.parts}


def rooms() -> dict[str, ast.Module]:
    """By name within the package, ``lab.store`` for relaxprop/lab/store.py, ``lab.data`` for that folder's door."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in sorted(paths.items())}


ROOMS = rooms()


def imported(room: ast.AST) -> Iterator[str]:
    """The rooms that are imported anywhere in a file."""
    for node in ast.iter_child_nodes(room):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("relaxprop") for alias in node.names), "import names from rooms"
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the direction"
            home = (node.module or "").split(".")
            if home == ["relaxprop"]:
                yield PUBLIC
            elif home[0] == "relaxprop" and (ROOT / Path(*home[1:])).is_dir():
                rooms = {".".join([*home[1:], alias.name]) for alias in node.names}
                yield from rooms & PATHS
                if rooms - PATHS:  # names that the folder's door shows
                    yield ".".join(home[1:])
            elif home[0] == "relaxprop":
                yield ".".join(home[1:])
        yield from imported(node)


def allowed(room: ast.Module) -> set[str]:
    said = (ast.get_docstring(room) or "").partition(SAYS)[2].partition("\n\n")[0]
    names = {name.strip() for name in " ".join(said.split()).rstrip(".").split(",")}
    return names - {"", "nothing of this project"}


@pytest.mark.parametrize("name", [name for name in ROOMS if name not in DOORS])
def test_a_room_imports_what_it_says_and_no_more(name: str) -> None:
    assert SAYS in (ast.get_docstring(ROOMS[name]) or "")
    assert set(imported(ROOMS[name])) == allowed(ROOMS[name])


def test_imports_go_one_way() -> None:
    graph = {name: set(imported(room)) for name, room in ROOMS.items()}
    graph[PUBLIC] = graph.pop("__init__")
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is a circle
    # The equations stand between what they are made of and what makes a module of them.
    assert order.index("graph") < order.index("solvers") < order.index("relaxation") < order.index("wrapper")


def test_the_library_knows_nothing_of_the_lab() -> None:
    for name, room in ROOMS.items():
        if not name.startswith("lab.") and name != "__main__":
            assert not {other for other in imported(room) if other.startswith("lab")}, name
            assert PUBLIC not in imported(room) or name == "lab", name
