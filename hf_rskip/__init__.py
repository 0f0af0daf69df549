"""Recursive skip connections with layer normalisation, as an extension of Hugging Face Transformers.

Importing the package registers its models with the Auto classes, and lets them use its kernels.
"""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "NORMS",
    "SKIP_CONNECTIONS",
    "PreNorm",
    "RSkip",
    "RSkipConfig",
    "RSkipForConditionalGeneration",
    "RSkipModel",
    "RSkipResNetBackbone",
    "RSkipResNetConfig",
    "RSkipResNetForImageClassification",
    "RSkipResNetModel",
    "SampleLayerNorm",
    "SampleRMSNorm",
    "SkipConnection",
    "SublayerPosition",
    "XSkip",
    "make_norm",
    "rskip_layer_norm",
    "rskip_rms_norm",
]

if TYPE_CHECKING:
    from .kernels import rskip_layer_norm, rskip_rms_norm
    from .models import (
        NORMS,
        SKIP_CONNECTIONS,
        PreNorm,
        RSkip,
        RSkipConfig,
        RSkipForConditionalGeneration,
        RSkipModel,
        RSkipResNetBackbone,
        RSkipResNetConfig,
        RSkipResNetForImageClassification,
        RSkipResNetModel,
        SampleLayerNorm,
        SampleRMSNorm,
        SkipConnection,
        SublayerPosition,
        XSkip,
        make_norm,
    )


def __getattr__(name: str):
    if name in __all__:
        from . import kernels, models

        return getattr(kernels if name in kernels.__all__ else models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})


# The command line imports this package before anything else, and `hf-rskip --help` is not to wait for torch.
if PurePath(sys.argv[0]).stem != "hf-rskip" and "hf_rskip.cli" not in sys.orig_argv:
    from . import kernels  # noqa: F401
