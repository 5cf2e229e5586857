"""What is uploaded: the wheel and the source distribution. The wheel works where only what it asks for is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import relaxprop

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="it is built in the repository")
pytest.importorskip("build")
pytest.importorskip("hatch_fancy_pypi_readme")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Of the user's own paths nothing is seen, such as that of this repository.
    known = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=known | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, and the source distribution that it was built from."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_an_index_would_take_it(built: tuple[Path, Path]) -> None:
    pytest.importorskip("twine")
    done = run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=built[0].parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_its_page_stands_alone(built: tuple[Path, Path]) -> None:
    described = metadata(built[0])
    page = str(described.get_payload())
    assert described["Version"] == relaxprop.__version__
    assert page.startswith("# relaxprop\n")
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert all(target.startswith("https://") for target in targets)
    ours = f"https://github.com/relaxprop/relaxprop/blob/v{relaxprop.__version__}/"
    raw = f"https://raw.githubusercontent.com/relaxprop/relaxprop/v{relaxprop.__version__}/"
    for target in targets:
        for base in (ours, raw):
            assert not target.startswith(base) or (ROOT / target.removeprefix(base)).exists(), target
    pictures = re.findall(r"^!\[", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert sum(target.startswith(raw) for target in targets) == len(pictures) == 2
    assert "$" not in page
    assert "<!--" not in page
    urls = dict(line.split(", ") for line in described.get_all("Project-URL", []))
    assert {"Documentation", "Source", "Issues", "Changelog", "Paper"} < set(urls)


def test_the_version_is_the_newest_of_the_changelog_and_the_citations() -> None:
    newest = re.search(
        r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
    assert newest is not None
    assert newest[1] == relaxprop.__version__
    assert f"\nversion: {relaxprop.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_it_has_every_file_of_the_package_and_no_other(built: tuple[Path, Path]) -> None:
    package = ROOT / "relaxprop"
    kept = {str(p.relative_to(ROOT)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    with zipfile.ZipFile(built[0]) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == kept
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert kept <= names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "Makefile", "tests/test_laws.py"} <= names


# ----------------------------------------------------------------------------------- where it is installed


def needed(name: str, extras: frozenset[str] = frozenset(), seen: set[tuple[str, str]] | None = None) -> Iterator[str]:
    """A distribution and all that it asks for, as far as that is installed here."""
    seen = set() if seen is None else seen
    for extra in ("", *extras):
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # of another platform, or optional
            return
        yield name
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield from needed(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


@pytest.fixture(scope="module")
def environment(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "--disable-pip-version-check")
    done = run(*pip, "install", "--quiet", "--no-deps", "--no-index", built[0], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def with_requirements(environment: Path, extra: str) -> dict[str, str]:
    """Links to what the wheel asks for, with or without an extra, which may stand for others of its own."""
    folder = environment.parent / f"for-{extra or 'library'}"
    folder.mkdir(exist_ok=True)
    requirements = [Requirement(line) for line in metadata_of(environment).get_all("Requires-Dist", [])]
    extras = {extra}
    for requirement in requirements:
        if requirement.name == "relaxprop" and requirement.marker and requirement.marker.evaluate({"extra": extra}):
            extras |= requirement.extras
    asked: set[str] = set()
    for requirement in requirements:
        if requirement.name != "relaxprop" and (
            requirement.marker is None or any(requirement.marker.evaluate({"extra": name}) for name in extras)
        ):
            asked |= set(needed(canonicalize_name(requirement.name), frozenset(requirement.extras)))
    for name in asked:
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))).resolve())
    return {"PYTHONPATH": str(folder)}


def metadata_of(environment: Path) -> Message:
    (found,) = environment.rglob("relaxprop-*.dist-info/METADATA")
    return Parser().parsestr(found.read_text(encoding="utf-8"))


def test_the_command_says_what_it_lacks_with_each_extra(environment: Path, tmp_path: Path) -> None:
    """What an extra asks for is linked, as far as it is installed here."""
    command = environment / "bin/relaxprop"
    extras = metadata_of(environment).get_all("Provides-Extra", [])
    assert set(extras) == {"plots", "lab", "cluster", "integrations", "docs", "test"}
    for extra in extras:
        paths = with_requirements(environment, extra)
        helped = run(command, "--help", cwd=tmp_path, **paths)
        assert helped.returncode == 0, f"{extra}: {helped.stderr}"
        has_lab = extra in ("lab", "cluster", "docs", "test")
        if has_lab:
            assert "Train one network." in helped.stdout, extra
        else:
            refused = run(command, "train", cwd=tmp_path, **paths)
            assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), f"{extra}: {refused.stderr}"
            assert "pip install 'relaxprop[lab]'" in refused.stderr, extra


def test_the_library_needs_no_extra(environment: Path, tmp_path: Path) -> None:
    """What the README shows runs, and the command line and the plots say what they lack.

    With all extras the same is run by `tests/test_readme.py`.
    """
    paths = with_requirements(environment, "")
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    drawn = "from relaxprop import Continuous, plots; plots.hop_distribution(Continuous(1.0), 3)"
    script = "\n".join([*readme, "import relaxprop; print(relaxprop.__file__, flush=True)", drawn])
    done = run(environment / "bin/python", "-W", "error", "-c", script, cwd=tmp_path, **paths)
    assert str(environment) in done.stdout.splitlines()[-1], done.stderr
    assert "pip install 'relaxprop[plots]'" in done.stderr.splitlines()[-1]
    command = environment / "bin/relaxprop"
    helped = run(command, "--help", cwd=tmp_path, **paths)
    assert helped.returncode == 0
    assert "pip install 'relaxprop[lab]'" in helped.stdout
    assert run(command, "--version", cwd=tmp_path, **paths).stdout == f"relaxprop {relaxprop.__version__}\n"
    refused = run(command, "train", cwd=tmp_path, **paths)
    assert refused.returncode == 1
    assert "pip install 'relaxprop[lab]'" in refused.stderr
    plotted = run(environment / "bin/python", "-c", drawn, cwd=tmp_path, **with_requirements(environment, "plots"))
    assert plotted.returncode == 0, plotted.stderr


def test_the_extra_lab_is_all_that_the_command_line_needs(environment: Path, tmp_path: Path) -> None:
    paths = with_requirements(environment, "lab")
    trained = run(environment / "bin/relaxprop", "train", "--epochs", "1", cwd=tmp_path, **paths)
    assert trained.returncode == 0, trained.stderr
    assert "test accuracy" in trained.stdout
    assert (tmp_path / "runs").is_dir()
