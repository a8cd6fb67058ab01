"""Writes "Other seeds" in workflow.md: `python docs/again.py reports reports/again`.

Compares the ledgers of two runs of one study, whose seeds differ: whether what the first decided is
decided again, and on the same side.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("workflow.md")
MARKED = re.compile(r"(<!-- again -->\n).*?(<!-- end -->)", re.S)


def ledger(folder: Path) -> dict[str, dict[str, Any]]:
    """Claims of a report by id."""
    claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))["claims"]
    return {claim["id"]: claim for claim in claims}


def compared(before: dict[str, Any], after: dict[str, Any]) -> tuple[int, int, int, int]:
    """Of a claim's comparisons: decided before; of these again on the same side; now undecided;
    now on the other side. What is no longer compared counts as undecided."""
    sides = {row["name"]: row["side"] for row in after["rows"]}
    decided = [row for row in before["rows"] if row["side"] != "undecided"]
    now = [(row["side"], sides.get(row["name"], "undecided")) for row in decided]
    same, open_ = sum(a == b for a, b in now), sum(b == "undecided" for _, b in now)
    return len(decided), same, open_, len(now) - same - open_


def main() -> None:
    first, second = (ledger(Path(folder)) for folder in sys.argv[1:3])
    lines = [
        "| claim | verdict | on the other seeds | comparisons | same side | undecided | other side |"
    ]
    lines.append("|" + "---|" * 7)
    total = [0, 0, 0, 0]
    for name, claim in first.items():
        if claim["ledger"] in ("inconclusive", "not tested"):
            continue
        counts = compared(claim, second[name])
        total = [a + b for a, b in zip(total, counts, strict=True)]
        words = (claim["title"], claim["verdict"], second[name]["verdict"], *map(str, counts))
        lines.append(f"| {' | '.join(words)} |")
    lines.append(f"| all |  |  | {' | '.join(map(str, total))} |")
    text = PAGE.read_text(encoding="utf-8")
    block = "\n".join(lines) + "\n"
    PAGE.write_text(MARKED.sub(lambda m: m[1] + block + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
