"""The part that travels to the Hub: flat files that import torch, transformers and each other, nothing else.

Importing it registers the models with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from .configuration_rskip import RSkipConfig
from .modeling_rskip import RSkipForConditionalGeneration, RSkipModel
from .skip_connections import NORMS, SKIP_CONNECTIONS, PreNorm, RSkip, SkipConnection, SublayerPosition, XSkip

AutoConfig.register(RSkipConfig.model_type, RSkipConfig)
AutoModel.register(RSkipConfig, RSkipModel)
AutoModelForSeq2SeqLM.register(RSkipConfig, RSkipForConditionalGeneration)

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
