"""Facts about the environment of a run: device, versions of packages, commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

_PACKAGES = (
    *("hf_rskip", "torch", "transformers", "datasets", "accelerate"),
    *("evaluate", "tokenizers", "sacrebleu", "pillow"),
)


def describe_device(device: torch.device | str | None = None) -> str:
    """Name of an accelerator, or of the CPU with its number of threads.

    Args:
        device: by default the current accelerator, or the CPU if there is none.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    count = torch.get_num_threads()
    return f"CPU {_processor()}, {count} thread{'s' * (count > 1)}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def read_versions() -> dict[str, str]:
    """Installed version of each package on which results depend."""
    return {package: version(package) for package in _PACKAGES}


def find_commit() -> str | None:
    """Commit of this package if it runs from a working tree of git, with `-dirty` if that was changed.

    An installed package may lie in the working tree of another project.
    """
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for command in (["ls-files", "--error-unmatch", __file__], describe):
            answer = subprocess.run(
                ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
