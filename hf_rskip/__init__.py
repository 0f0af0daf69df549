"""Recursive skip connections with layer normalisation, as an extension of Hugging Face Transformers.

Importing the package registers its models with the Auto classes, and lets them use its kernels.
"""
# ruff: noqa: F405

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "B2T",
    "NORMS",
    "SKIP_CONNECTIONS",
    "Admin",
    "DeepNorm",
    "DetachedRSkip",
    "FixedAdmin",
    "Keel",
    "PeriNorm",
    "PreNorm",
    "RSkip",
    "RSkipConfig",
    "RSkipForConditionalGeneration",
    "RSkipModel",
    "RSkipResNetBackbone",
    "RSkipResNetConfig",
    "RSkipResNetForImageClassification",
    "RSkipResNetModel",
    "RSkipTrainer",
    "RSkipTrainingArguments",
    "ReZero",
    "SampleLayerNorm",
    "SampleRMSNorm",
    "SkipConnection",
    "SublayerPosition",
    "XSkip",
    "make_norm",
    "parse_recipe",
    "rskip_layer_norm",
    "rskip_rms_norm",
    "train",
]

_MODULES = {
    "RSkipTrainer": ".training.trainer",
    "RSkipTrainingArguments": ".recipe.translation",
    "parse_recipe": ".recipe.parsing",
    "rskip_layer_norm": ".kernels",
    "rskip_rms_norm": ".kernels",
    "train": ".training.train",
}
"""Modules of the public names that are not in `models`."""

if TYPE_CHECKING:
    from .kernels import rskip_layer_norm, rskip_rms_norm
    from .models import *  # noqa: F403
    from .recipe.parsing import parse_recipe
    from .recipe.translation import RSkipTrainingArguments
    from .training.train import train
    from .training.trainer import RSkipTrainer


def __getattr__(name: str):
    if name in __all__:
        from . import kernels  # noqa: F401  which the models use from then on

        return getattr(import_module(_MODULES.get(name, ".models"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})


# The command line imports this package first: without torch, so that `hf-rskip --help` is quick.
if PurePath(sys.argv[0]).stem != "hf-rskip" and "hf_rskip.cli" not in sys.orig_argv:
    from . import kernels  # noqa: F401
