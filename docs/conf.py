"""How Sphinx makes the site: `make docs`. Nothing is fetched, neither by the build nor by the pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import typer.cli
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from typer.main import get_command

import relaxprop
from relaxprop.lab.bench import document
from relaxprop.lab.cli.main import COMMANDS, function
from relaxprop.lab.report.tables import markdown_table

HERE = Path(__file__).parent

project = "relaxprop"
author = copyright = "The relaxprop developers"
version = release = relaxprop.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "examples", "generated"]
html_theme = "furo"
html_title = "relaxprop"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # which browsers show by themselves, without a script from elsewhere
html_show_sourcelink = False
smartquotes_action = "qe"  # quotes and ellipses: two hyphens begin an option, and are no dash

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_timeout = 600  # seconds for a block: other work may share the machine
nb_output_stderr = "remove-warn"  # with -W, a notebook that writes a warning ends the build

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "py:obj"
copybutton_exclude = ".linenos, .gp, .go"


def equations_are_literal(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Indented equations of a docstring keep their lines: a paragraph that is indented by itself is a literal block."""
    before, section = "", False
    for i, line in enumerate(lines):
        section = section or bool(re.fullmatch(r"(Args|Attributes|Returns|Raises):", line.strip()))
        if line.startswith("    ") and not before.strip() and not section and i:
            above = next(k for k in range(i - 1, -1, -1) if lines[k].strip())
            if not lines[above].startswith("    ") and not lines[above].endswith("::"):
                lines[above] += " ::" if not lines[above].endswith(":") else ":"
        before = line


def write_generated(app: Sphinx) -> None:
    """What pages include: all commands as Typer describes them, kept benchmarks' tables, the files' own words."""
    folder = HERE / "generated"
    folder.mkdir(exist_ok=True)
    results = HERE.parent / "results"
    papers_network = document.read(results / "bench" / "mlp" / document.FILE).benchmarks[0]
    tables = [markdown_table(table.columns, table.rows) for table in document.cost_tables(papers_network)]
    (folder / "bench-mlp.md").write_text("\n".join(tables), encoding="utf-8")
    grown = results / "bench" / "scaling" / document.FILE
    others = sorted(path for path in results.glob(f"bench/*/{document.FILE}") if path != grown)
    for name, paths in (("bench", others), ("scaling", [grown] if grown.exists() else [])):
        titles = [f"### {path.parent.name}\n\n" if len(paths) > 1 else "" for path in paths]
        shown = [title + document.markdown(document.read(path)) for title, path in zip(titles, paths, strict=True)]
        text = "\n".join(shown) or "No measurement is kept yet; its command is in `results/bench/README.md`.\n"
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / "rooms.md").write_text("\n".join(rooms()), encoding="utf-8")
    (folder / "command_line.md").write_text(commands(), encoding="utf-8")


def commands() -> str:
    """Every command with all of its options, which the command line itself imports for the command that is called."""
    complete = typer.Typer(add_completion=False)
    for name in COMMANDS:
        complete.command(name.replace("_", "-"))(function(name))
    command = get_command(complete)
    context = command.make_context("relaxprop", ["--help"], resilient_parsing=True)
    pages = typer.cli.get_docs_for_click(obj=command, ctx=context, name="relaxprop")
    described = re.sub("^#", "##", "".join(pages.partition("\n## ")[1:]), flags=re.M)
    assert "`--learning-rate" in described
    return described


def rooms() -> Iterator[str]:
    """A table of the package's files, each with the first sentence that it says of itself."""
    yield from ("| file | what it is for |", "| --- | --- |")
    package = Path(relaxprop.__file__).parent
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent, path)):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(said.partition("\n\n")[0].split()).removesuffix(":")
        yield f"| `{path.relative_to(package)}` | {first} |"


def without_missing_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """The page of claims is generated from the kept results, and joins the others where it is."""
    if name == "index" and not (HERE / "claims.md").exists():
        source[0] = source[0].replace("\nclaims\n", "\n")


# What is one number, an interval or a mean with its error: it stays on one line of its cell.
NUMBER = re.compile(r"[<≤≥]? ?[-+−]?\d[\d.,]*(e[-+]?\d+)?(-[\d.,]+| ± [\d.,]+| to [-+−]?[\d.,]+)?( ?(×|%|s))?")


def tables_are_read_with_ease(app: Sphinx, page: nodes.document) -> None:
    """Numbers do not wrap. A note that a page has below several tables stands below the first of them alone."""
    for entry in page.findall(nodes.entry):
        if NUMBER.fullmatch(entry.astext()):
            entry["classes"].append("number")
    for dash in [text for text in page.findall(nodes.Text) if text == " -- "]:
        dash.parent.replace(dash, nodes.Text(" – "))  # between an argument and what is said of it
    said: set[str] = set()
    for item in list(page.findall(nodes.list_item)) if app.env.docname.startswith("results/") else []:
        bullets, text = item.parent, item.astext()
        if text in said:
            bullets.remove(item)
            if not bullets.children:
                bullets.parent.remove(bullets)
        said.add(text)


def inline_mathml(self: object, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))  # type: ignore[attr-defined]
    raise nodes.SkipNode


def display_mathml(self: object, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')  # type: ignore[attr-defined]
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_mathml, None), (display_mathml, None))
    app.connect("autodoc-process-docstring", equations_are_literal, priority=100)  # before napoleon
    app.connect("builder-inited", write_generated)
    app.connect("source-read", without_missing_pages)
    app.connect("doctree-read", tables_are_read_with_ease)
