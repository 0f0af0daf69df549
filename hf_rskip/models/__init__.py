"""Models, and the only files that are pushed with them: flat, importing torch, transformers and each other.

Importing it registers the models with the Auto classes.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
)

from .configuration_rskip import RSkipConfig
from .configuration_rskip_resnet import RSkipResNetConfig
from .modeling_rskip import RSkipForConditionalGeneration, RSkipModel
from .modeling_rskip_resnet import RSkipResNetBackbone, RSkipResNetForImageClassification, RSkipResNetModel
from .skip_connections import (
    B2T,
    SKIP_CONNECTIONS,
    Admin,
    DeepNorm,
    DetachedRSkip,
    FixedAdmin,
    Keel,
    PeriNorm,
    PreNorm,
    ReZero,
    RSkip,
    SkipConnection,
    SublayerPosition,
    XSkip,
)
from .skip_norms import NORMS, SampleLayerNorm, SampleRMSNorm, make_norm

AutoConfig.register(RSkipConfig.model_type, RSkipConfig)
AutoModel.register(RSkipConfig, RSkipModel)
AutoModelForSeq2SeqLM.register(RSkipConfig, RSkipForConditionalGeneration)

AutoConfig.register(RSkipResNetConfig.model_type, RSkipResNetConfig)
AutoModel.register(RSkipResNetConfig, RSkipResNetModel)
AutoModelForImageClassification.register(RSkipResNetConfig, RSkipResNetForImageClassification)
AutoBackbone.register(RSkipResNetConfig, RSkipResNetBackbone)

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
    "ReZero",
    "SampleLayerNorm",
    "SampleRMSNorm",
    "SkipConnection",
    "SublayerPosition",
    "XSkip",
    "make_norm",
]
