"""Recursive skip connections with layer normalisation, as an extension of Hugging Face Transformers.

Importing the package registers its models with the Auto classes.
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
    "SkipConnection",
    "SublayerPosition",
    "XSkip",
]

# The console script imports this package before anything else, and `hf-rskip --help` is not to wait for torch.
if TYPE_CHECKING or PurePath(sys.argv[0]).stem != "hf-rskip":
    from .models import (
        NORMS,
        SKIP_CONNECTIONS,
        PreNorm,
        RSkip,
        RSkipConfig,
        RSkipForConditionalGeneration,
        RSkipModel,
        SkipConnection,
        SublayerPosition,
        XSkip,
    )
