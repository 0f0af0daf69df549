"""The code that travels with a checkpoint, so that it loads where this package is not installed."""

import sys
from collections.abc import Container
from pathlib import Path

from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import get_relative_import_files

from .. import models
from ..errors import UserError
from ..models import SKIP_CONNECTIONS
from ..models.skip_norms import norm_of
from .own_code import own_modules

_ENTRY = """

from .{module} import {name}  # noqa: E402
from .skip_connections import SKIP_CONNECTIONS  # noqa: E402

SKIP_CONNECTIONS["{skip_type}"] = {name}
"""

_AUTO_MODELS = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForSeq2SeqLM": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "AutoModelForImageClassification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    "AutoBackbone": MODEL_FOR_BACKBONE_MAPPING,
}


def find_code(config: PreTrainedConfig) -> tuple[dict[str, str], dict[str, bytes]]:
    """The `auto_map` for `config.json`, and the Python files that it names and needs, by name.

    Transformers fills `auto_map` only with the class that saves itself; here every Auto class of the model gets its
    entry, so that each of them loads it.

    The module of a residual kind of one's own goes along, and the file of the configuration enters the kind.

    Raises:
        [`UserError`]: if the model uses a skip connection or a norm whose code cannot go along; see [`own_modules`].
    """
    classes = {"AutoConfig": type(config)}
    classes |= {name: found[type(config)] for name, found in _AUTO_MODELS.items() if type(config) in found}
    auto_map = {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes.items()}
    modules = {Path(sys.modules[cls.__module__].__file__) for cls in classes.values()}
    needed = {Path(file) for module in modules for file in get_relative_import_files(module)}
    files = {path.name: path.read_bytes() for path in sorted(modules | needed)}
    skip, norm = SKIP_CONNECTIONS[config.skip_type], norm_of(config)
    module = sys.modules[skip.__module__]
    if not _travels(skip, files):
        if getattr(module, skip.__name__, None) is not skip:
            raise UserError(f"The code of {skip.__qualname__} does not travel: its module has no such name.")
        files |= {name: source.encode() for name, source in own_modules(module, files.keys()).items()}
        entry = _ENTRY.format(module=Path(module.__file__).stem, name=skip.__name__, skip_type=config.skip_type)
        files[f"{type(config).__module__.rpartition('.')[2]}.py"] += entry.encode()
    if not (_travels(norm, files) or norm.__module__ == skip.__module__):
        raise UserError(
            f"The code of skip_norm {config.skip_norm!r} is in {norm.__module__} and does not travel: move it to the "
            "module of the skip connection, or push without the code"
        )
    return auto_map, files


def _travels(cls: type, files: Container[str]) -> bool:
    package, _, name = cls.__module__.rpartition(".")
    return package == models.__name__ and f"{name}.py" in files
