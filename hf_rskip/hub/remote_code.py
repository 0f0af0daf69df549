"""The code that travels with a checkpoint, so that it loads where this package is not installed."""

import sys
from pathlib import Path

from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import get_relative_import_files

from ..errors import UserError
from ..models import SKIP_CONNECTIONS

_AUTO_MODELS = {
    "AutoModel": MODEL_MAPPING,
    "AutoModelForSeq2SeqLM": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "AutoModelForImageClassification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    "AutoBackbone": MODEL_FOR_BACKBONE_MAPPING,
}


def find_code(config: PreTrainedConfig) -> tuple[dict[str, str], list[Path]]:
    """The `auto_map` for `config.json`, and the Python files that it names and needs.

    Transformers fills `auto_map` only with the class that saves itself; here every Auto class of the model gets its
    entry, so that each of them loads it.

    Raises:
        [`UserError`]: if the model uses a skip connection that is not defined in these files.
    """
    classes = {"AutoConfig": type(config)}
    classes |= {name: models[type(config)] for name, models in _AUTO_MODELS.items() if type(config) in models}
    auto_map = {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes.items()}
    modules = {Path(sys.modules[cls.__module__].__file__) for cls in classes.values()}
    needed = {Path(file) for module in modules for file in get_relative_import_files(module)}
    files = sorted(modules | needed)
    skip = SKIP_CONNECTIONS[config.skip_type]
    if Path(sys.modules[skip.__module__].__file__) not in files:
        raise UserError(
            f"The code of skip_type {config.skip_type!r} is in {skip.__module__}, and only that of hf_rskip.models "
            "travels: move the class there, or push without the code"
        )
    return auto_map, files
