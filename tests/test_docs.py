"""The site: every public name has its place, and what checks its links finds those that lead nowhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import relaxprop
from relaxprop import plots

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the site is made in the repository")


def test_every_public_name_has_its_place_among_the_names() -> None:
    shown = re.findall(r"^\.\. auto\w+:: (\S+)", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    plotting = [f"plots.{name}" for name in plots.__all__]
    assert sorted(shown) == sorted(f"relaxprop.{name}" for name in (*relaxprop.__all__, *plotting))


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    def outcome() -> tuple[int, list[str]]:
        command: list[str | Path] = [sys.executable, DOCS / "check_links.py", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    page = tmp_path / "a.html"
    assert outcome() == (1, [f"{tmp_path}: no page in it"])
    (tmp_path / "b.html").write_text('<p id="there">')
    page.write_text('<a href="b.html#there">b</a> <a href="https://example.org/">elsewhere</a> <a href="#">up</a>')
    assert outcome() == (0, ["all links lead somewhere"])
    page.write_text('<a href="b.html#not">b</a> <img src="c.png"> <script src="https://example.org/d.js"></script>')
    assert outcome() == (
        1,
        [
            "a.html: b.html#not leads to no place on that page",
            "a.html: c.png leads nowhere",
            "a.html: loads https://example.org/d.js",
        ],
    )
