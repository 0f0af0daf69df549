"""`hf-rskip env`."""

import argparse
import platform


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace, rest: list[str]) -> None:
    """Prints one line each for the versions and devices that a bug report needs."""
    import torch

    from ..environment import describe_device, read_versions

    devices = [f"{torch.accelerator.current_accelerator().type}:{i}" for i in range(torch.accelerator.device_count())]
    facts = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **read_versions(),
        "device": ", ".join(map(describe_device, devices or ["cpu"])),
    }
    for name, fact in facts.items():
        print(f"- {name}: {fact}")
