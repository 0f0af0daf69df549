"""Manifests: lists of the files of a folder with size and checksum, by which damage is found."""

import json
import os
import zlib
from collections.abc import Collection
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME

from .atomic import replace_text
from .errors import UserError

MANIFEST_NAME = "manifest.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
    *("source.spm", "target.spm", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
CONFIGURATIONS = (CONFIG_NAME, GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME)
MODEL_FILES = (*CONFIGURATIONS, SAFE_WEIGHTS_INDEX_NAME, "model*.safetensors", *TOKENIZER_FILES)
"""Patterns of the names of the files that make a model."""


def write_manifest(folder: str | Path, patterns: Collection[str] | None = None) -> None:
    """Writes `manifest.json`, which lists the files of a folder; it replaces an older one in one step.

    Until then the older one stays, so that a folder whose files were replaced in part does not pass.

    Args:
        folder: what is complete but for its manifest.
        patterns: of the names of the files to list; all files unless given, those in subfolders, too.
    """
    folder = Path(folder)
    found = folder.rglob("*") if patterns is None else chain.from_iterable(map(folder.glob, patterns))
    paths = sorted(path for path in found if path.is_file() and path.name != MANIFEST_NAME)
    listed = {path.relative_to(folder).as_posix(): _describe(path) for path in paths}
    replace_text(folder / MANIFEST_NAME, json.dumps({"files": listed}, indent=2) + "\n")


def check_manifest(folder: str | Path) -> bool:
    """Checks that all files are those of the manifest, if there is one.

    Returns:
        Whether there is a manifest.

    Raises:
        [`UserError`]: names a file that is missing, cannot be read, or is not as it was written.
    """
    listed = _read_manifest(folder)
    for name, expected in (listed or {}).items():
        _check_file(Path(folder, name), expected)
    return listed is not None


def check_model(name: str | Path, patterns: Collection[str] = MODEL_FILES) -> None:
    """Checks the files of a model or a tokenizer that is to be used; a Hub id passes.

    Configurations may have been edited: they must be there if the manifest lists them, and be JSON.

    Args:
        name: the folder or id.
        patterns: of the names of the files.

    Raises:
        [`UserError`]: names a file that is missing, cannot be read, or is not as it was written.
    """
    listed = _read_manifest(name) or {}
    present = {file for file in CONFIGURATIONS if Path(name, file).exists()}
    for file in sorted(present | listed.keys()):
        if not any(fnmatch(file, pattern) for pattern in patterns):
            continue
        path = Path(name, file)
        if file in CONFIGURATIONS:
            read_json(path)
            continue
        try:
            _check_file(path, listed[file])
        except UserError as error:
            hint = f"if you changed it yourself, remove {str(Path(name, MANIFEST_NAME))!r}"
            raise UserError(f"{error}; {hint}") from error


def _read_manifest(folder: str | Path) -> dict[str, dict] | None:
    """Size and checksum of each file, or `None` where there is no manifest."""
    path = Path(folder, MANIFEST_NAME)
    if not os.path.lexists(path):
        return None
    content = read_json(path)
    try:
        listed = {name: {key: file[key] for key in ("size", "crc32")} for name, file in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(path)!r} is damaged") from error
    if not listed:
        raise UserError(f"{str(path)!r} is damaged: it lists no file")
    return listed


def read_json(path: Path) -> dict:
    """Reads a JSON file; raises a [`UserError`] that names it if it cannot be read or is no mapping in JSON."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged: it is not JSON") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is damaged: it is not a mapping")
    return content


def _check_file(path: Path, expected: dict) -> None:
    try:
        found = _describe(path)
    except FileNotFoundError as error:
        raise UserError(f"{str(path)!r} is missing") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if found["size"] != expected["size"]:
        sizes = f"it has {found['size']:,} bytes, not {expected['size']:,}"
        raise UserError(f"{str(path)!r} is not as it was written: {sizes}")
    if found != expected:
        raise UserError(f"{str(path)!r} is not as it was written: its checksum is another")


def unreadable(path: str | Path, error: OSError) -> UserError:
    """The error for a file or folder that could not be read."""
    return UserError(f"{str(path)!r} cannot be read ({error.strerror})")


def _describe(path: Path) -> dict[str, int | str]:
    """Size in bytes and CRC-32, which takes less than half the time of SHA-256 and is enough against accidents: .18 to
    .28 of the time of writing 400 MB of weights and optimizer state, on two busy cores."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"size": size, "crc32": f"{checksum:08x}"}
