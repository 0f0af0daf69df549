"""What the benchmarks say of a run, and how they write it down."""

import csv
import datetime
from pathlib import Path

from hf_rskip.environment import describe_device, find_commit, read_versions


def describe_run(device: str) -> dict[str, str]:
    """Where and with what a benchmark ran."""
    versions = read_versions()
    return {
        "device": describe_device(device),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "date": datetime.date.today().isoformat(),
        "commit": find_commit() or "",
    }


def print_table(rows: list[dict[str, str]], about: dict) -> None:
    """Prints rows under their names, and below them what they have in common."""
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print("  ".join(value.ljust(20) for value in row.values()).rstrip())
    print(", ".join(f"{name} {value}" for name, value in about.items()))


def print_row(row: dict) -> None:
    print("\n".join(f"{name}: {value}" for name, value in row.items()))


def append_csv(rows: list[dict], output: Path | None) -> None:
    """Appends rows to a CSV file, if there is one to write, with their names at its top; a row may lack some."""
    if output is None:
        return
    new = not output.exists()
    with output.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        if new:
            writer.writeheader()
        writer.writerows(rows)
