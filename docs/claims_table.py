"""The README's table of the paper's claims, made from the page of claims: a row for each condition, a column for each
data set. A cell has our verdict († where it is open after Holm's correction) and the difference in points of accuracy.

    python docs/claims_table.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASELINE = "Activation Relaxation reaches backpropagation's accuracy"


def table(page: str) -> str:
    """In Markdown, from the text of ``docs/claims.md``."""
    cells: dict[str, dict[str, str]] = {BASELINE: {}}
    figures: list[str] = []
    for section in page.split("\n## ")[1:]:
        figure = section.partition("\n")[0]
        for line in section.splitlines():
            entries = [entry.strip() for entry in line.strip("| ").split(" | ")]
            if "|" not in line or entries[0] in ("the paper's claim", "---", "item") or len(entries) < 6:
                continue
            claim, _, _, difference, _, verdict = entries[:6]
            said = re.match(r"(\*\*)?(holds|does not hold|open)", verdict)
            if said is None:
                continue
            corrected = "†" if "after Holm's correction open" in verdict else ""
            cell = f"{said[2]}{corrected} ({difference.partition(' ')[0]})"
            if claim.endswith(BASELINE):
                cells[BASELINE][claim.removesuffix(f": {BASELINE}")] = cell
            elif re.match(r"(Figure|Appendix)", figure):
                figures += [figure] if figure not in figures else []
                row = cells.setdefault(claim.partition(":")[0], {})
                row.setdefault("claim", claim)
                falls = claim.endswith("falls") and not row["claim"].endswith("falls")
                row[figure] = f"falls: {cell}" if falls else cell
    lines = [["the paper says", *figures], ["---"] * (len(figures) + 1)]
    lines += [[row.get("claim", name), *(row.get(figure, "") for figure in figures)] for name, row in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table((ROOT / "docs" / "claims.md").read_text(encoding="utf-8")))
