"""`python -m fastsr.checkpoints`: the table of formats in README, made from the readers."""

from __future__ import annotations

from fastsr.checkpoints import FORMATS


def table() -> str:
    """A Markdown table with a row for each reader."""
    rows = ["| format | endings | networks | tried on |", "|---|---|---|---|"]
    for reader in FORMATS:
        endings = " ".join(f"`{ending}`" for ending in reader.ENDINGS)
        networks = ", ".join(name if name == "all" else f"`{name}`" for name in reader.NETWORKS)
        rows.append(f"| {reader.DESCRIPTION} | {endings} | {networks} | {reader.SEEN} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
