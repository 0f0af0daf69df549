"""Builds `rskip.cpp`, in which a row stays in the cache while it passes through its K steps.

The C++ needs no headers of torch and no ninja, so that any `c++` builds it in some seconds. It is compiled for the
processor at hand when a precision is first used, and kept in torch's folder of extensions (`TORCH_EXTENSIONS_DIR`);
processes that do so at once each build for themselves, and the last one's file stays. Size and hash stand beside a
library, which is built anew where it does not have them: what is torn or damaged would end the process at its first
call. A folder that others can write to is not used.
"""

import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SOURCE = resources.files(__package__).joinpath("rskip.cpp").read_text(encoding="utf-8")
FLAGS = "-std=c++17 -O3 -march=native -Wno-psabi -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "_Float16"}


@functools.cache
def load(types: tuple[torch.dtype, torch.dtype, torch.dtype], source: str = SOURCE) -> ctypes.CDLL | None:
    """The compiled functions of `source` for x, F and y of these precisions, or `None`, with one line of log, where
    they cannot be built."""
    from torch.utils.cpp_extension import get_default_build_root  # which imports setuptools

    names = zip(("TYPE_OF_X", "TYPE_OF_BRANCH", "TYPE_OF_Y"), types, strict=True)
    options = [*FLAGS.split(), *(f"-D{name}={_NAMES[dtype]}" for name, dtype in names)]
    try:
        command = [*_compiler(), *options]
        key = hashlib.sha256("\0".join([source, *command, _processor()]).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "hf_rskip"
        library = folder / f"skip_kernels-{key}.so"
        record = library.with_suffix(".json")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        if not _is_whole(library, record):
            with tempfile.TemporaryDirectory(dir=folder) as build:
                built = Path(build) / library.name
                command += ["-x", "c++", "-", "-o", str(built)]
                subprocess.run(command, input=source, check=True, capture_output=True, text=True, timeout=120)
                described = built.with_suffix(".json")
                with built.open("rb") as file:
                    os.fsync(file.fileno())
                described.write_text(json.dumps(_describe(built)), encoding="utf-8")
                built.replace(library)
                described.replace(record)
        return ctypes.CDLL(str(library))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = said.strip().partition("\n")[0]
        logger.warning(f"Skip connections run unfused on this CPU: their operator could not be built ({reason}).")
        return None


def _check_owner(folder: Path) -> None:
    """Raises a `PermissionError` if others could put a library into the folder, which would be run."""
    status = folder.stat()
    if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"{str(folder)!r} must belong to this user, and nobody else may write to it")


def _describe(library: Path) -> dict[str, int | str]:
    content = library.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _is_whole(library: Path, record: Path) -> bool:
    """Whether there is a library that is as it was built."""
    try:
        return json.loads(record.read_bytes()) == _describe(library)
    except (OSError, ValueError):
        return False


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]


def _processor() -> str:
    """Description of this processor, for which `-march=native` builds: machines may share the folder."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.findall(r"^(?:flags|Features|model name)\s*:.*", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(found))])
