"""Turn a result of `ctxstore bench node --json` into the table of docs/benchmarks.md.

Owns the layout of the table. It must not measure, round figures up, or leave rows out.

    python bench/report.py bench/results/node.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """Markdown: one line per row of the result, in its order."""
    lines = [
        "| row | value | ceiling | ratio (best round) | target | CPU s/GB | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result.items():
        if "value" not in row:
            continue
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        if "best_ratio" in row:
            ratio += f" ({row['best_ratio']:.2f})"
        ceiling = "-" if row["ceiling"] is None else f"{row['ceiling']:.2f}"
        cpu = "-" if row["cpu_s_per_gb"] is None else f"{row['cpu_s_per_gb']:.3f}"
        value = f"{row['value']:.2f} {row['unit']}"
        if "bytes_per_entry" in row:
            value += f", {row['bytes_per_entry']:.0f} B an entry"
        if "cpu_ratio" in row:
            cpu += f" ({row['cpu_ratio']:.2f} of the ceiling's)"
        met = "yes" if row["met"] else "no"
        lines.append(
            f"| `{name}` | {value} | {ceiling} | {ratio} | {row['target']} | {cpu} | {met} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the table of one result file, and the machine below it."""
    result = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    sys.stdout.write(table(result) + "\n\n")
    for part in ("machine", "node"):
        facts = ", ".join(f"{key} {value}" for key, value in result[part].items())
        sys.stdout.write(f"{part}: {facts}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
