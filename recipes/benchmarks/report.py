"""What the benchmarks say of a run, and how they write it down."""

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch
import transformers


def describe_run(device: str) -> dict[str, str]:
    """Where and with what a benchmark ran."""
    return {
        "device": describe_device(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": describe_commit(),
    }


def describe_device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def describe_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


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
