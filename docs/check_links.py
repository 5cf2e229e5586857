"""Whether the pages of a built site hold together: every link within it leads somewhere, and nothing is loaded from
elsewhere. Links to other sites are not followed.

    python docs/check_links.py docs/_build/html
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("video", "src")}
RELATIONS_THAT_LOAD_NOTHING = {"canonical", "index", "search", "next", "prev"}


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = {"", "top"}, set[str](), set[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        for name, value in found.items():
            if (tag, name) == ("a", "href"):
                self.links.add(value)
            if (tag, name) in LOADED and found.get("rel") not in RELATIONS_THAT_LOAD_NOTHING:
                self.loaded.add(value)


def faults(site: Path) -> Iterator[str]:
    """What is wrong with the pages of a folder, a line for each."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: no page in it"
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        for target in sorted(page.links | page.loaded):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    yield f"{where}: loads {target}"
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.is_file():
                yield f"{where}: {target} leads nowhere"
            elif file in pages and unquote(parts.fragment) not in pages[file].anchors:
                yield f"{where}: {target} leads to no place on that page"


if __name__ == "__main__":
    found = list(faults(Path(sys.argv[1])))
    print("\n".join(found) or "all links lead somewhere")
    sys.exit(bool(found))
