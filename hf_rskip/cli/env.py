"""`hf-rskip env`."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("hf_rskip", "torch", "transformers", "datasets", "accelerate", "evaluate", "sacrebleu", "tokenizers")


def describe_environment() -> str:
    """One line each for the versions and devices that a bug report needs."""
    facts = {"platform": platform.platform(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if torch.accelerator.is_available():
        facts["device"] = ", ".join(
            f"{torch.get_device_module().get_device_name(index)}" for index in range(torch.accelerator.device_count())
        )
    else:
        facts["device"] = f"CPU, {torch.get_num_threads()} threads"
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
