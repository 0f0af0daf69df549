"""Models, and the only files that are pushed with them: flat, importing torch, transformers and each other.

Importing it registers the models with the Auto classes.
"""
# ruff: noqa: F403, F405

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForSeq2SeqLM

from .configuration_rskip import *
from .configuration_rskip_resnet import *
from .modeling_rskip import *
from .modeling_rskip_resnet import *
from .skip_connections import *
from .skip_norms import *

AutoConfig.register(RSkipConfig.model_type, RSkipConfig)
AutoModel.register(RSkipConfig, RSkipModel)
AutoModelForSeq2SeqLM.register(RSkipConfig, RSkipForConditionalGeneration)

AutoConfig.register(RSkipResNetConfig.model_type, RSkipResNetConfig)
AutoModel.register(RSkipResNetConfig, RSkipResNetModel)
AutoModelForImageClassification.register(RSkipResNetConfig, RSkipResNetForImageClassification)
AutoBackbone.register(RSkipResNetConfig, RSkipResNetBackbone)
