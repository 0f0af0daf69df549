"""Proof that a folder holds what was written: a list of its files with size and checksum."""

import json
import zlib
from collections.abc import Collection
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
)

from .errors import UserError

MANIFEST_NAME = "manifest.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "source.spm",
    "target.spm",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
MODEL_FILES = (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    "model*.safetensors",
    *TOKENIZER_FILES,
    IMAGE_PROCESSOR_NAME,
)
"""Patterns of the names of what makes a model, as it is loaded and pushed."""


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
    written = folder / f".{MANIFEST_NAME}"
    written.write_text(json.dumps({"files": listed}, indent=2) + "\n", encoding="utf-8")
    written.replace(folder / MANIFEST_NAME)


def check_manifest(folder: str | Path, patterns: Collection[str] | None = None) -> bool:
    """Checks that the files are those of the manifest, if there is one.

    Args:
        folder: any; that of a model from elsewhere, or a Hub id, has no manifest.
        patterns: of the names of the files to check; all that are listed unless given.

    Returns:
        Whether there is a manifest.

    Raises:
        [`UserError`]: names a file that is missing, cannot be read, or is not as it was written.
    """
    manifest = Path(folder, MANIFEST_NAME)
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        listed = {name: (file["size"], file["crc32"]) for name, file in files.items()}
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{str(manifest)!r} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{str(manifest)!r} is damaged") from error
    for name, expected in listed.items():
        if patterns is not None and not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        path = Path(folder, name)
        try:
            size = path.stat().st_size
            if size != expected[0]:
                raise UserError(
                    f"{str(path)!r} is damaged: it has {size:,} bytes, and was written with {expected[0]:,}"
                )
            if _describe(path)["crc32"] != expected[1]:
                raise UserError(f"{str(path)!r} is not as it was written: its checksum differs from {MANIFEST_NAME}'s")
        except FileNotFoundError as error:
            raise UserError(f"{str(path)!r} is missing, and {MANIFEST_NAME} lists it") from error
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    return True


def check_model(name: str | Path, patterns: Collection[str] = MODEL_FILES) -> None:
    """[`check_manifest`] of a model or tokenizer that is to be used, which may also be a Hub id.

    Raises:
        [`UserError`]: names the wrong file, and says what to do if it was changed on purpose.
    """
    try:
        check_manifest(name, patterns)
    except UserError as error:
        raise UserError(
            f"{error}; if you changed it yourself, remove {str(Path(name, MANIFEST_NAME))!r}, which notices"
        ) from error


def _describe(path: Path) -> dict[str, int | str]:
    """Size in bytes and CRC-32: 3 times as fast as SHA-256 here, and enough against accidents."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"size": size, "crc32": f"{checksum:08x}"}
