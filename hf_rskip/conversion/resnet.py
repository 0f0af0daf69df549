"""Converts ResNets of Transformers, torchvision and timm to plain ResNets of this package with the same outputs."""

import math
import re
from pathlib import Path

from transformers import (
    BaseImageProcessor,
    BitImageProcessorPil,
    PreTrainedConfig,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

# Not from `transformers`, where that of 5.17 asks for torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME, cached_file, logging

from ..data.names import check_name
from ..decoding.loading import load_with_report, not_loaded
from ..errors import UserError
from ..models import RSkipResNetConfig, RSkipResNetForImageClassification
from .resnet_state_dicts import convert_resnet_state_dict, read_state_dict

logger = logging.get_logger(__name__)

_SAME_FIELDS = RSkipResNetConfig.__annotations__.keys() & ResNetConfig.__annotations__.keys()
_SAME_FIELDS |= {"id2label", "label2id", "out_features", "problem_type"}
# Others, such as resnetaa50 and resnetblur50, can have the same weights and compute something else.
_TIMM_ARCHITECTURES = re.compile(r"(?:tv_|ssl_|swsl_)?resnet(?:18|26|34|50|101|152|200)|gluon_resnet\d+_v1b")
_TIMM_ARGUMENTS = {"num_classes", "in_chans"}  # known from the shapes of the weights


def convert_resnet_config(config: ResNetConfig) -> RSkipResNetConfig:
    """The configuration of the same model: plain sums (`xskip` without norm).

    Raises:
        [`UserError`]: if there is no classifier, or if a field has a value that `RSkipResNetConfig` does not allow.
            That goes for activations too: those inside the blocks of Transformers' ResNet are ReLU whatever
            `hidden_act` is.
    """
    if config.num_labels < 1:
        raise UserError("it has no classifier, since `num_labels` is 0")
    if config.hidden_act != "relu":
        raise UserError(
            f"with `hidden_act` {config.hidden_act!r} the ResNet of Transformers still has ReLU inside its blocks, "
            "which an RSkipResNet has not"
        )
    try:
        return RSkipResNetConfig(
            **{field: getattr(config, field) for field in _SAME_FIELDS}, skip_type="xskip", skip_norm="none"
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def convert_resnet_model(resnet: ResNetForImageClassification) -> RSkipResNetForImageClassification:
    """The same function as a plain `RSkipResNetForImageClassification`, in evaluation mode and of the same dtype.

    Raises:
        [`UserError`]: see [`convert_resnet_config`].
    """
    model = RSkipResNetForImageClassification(convert_resnet_config(resnet.config)).to(resnet.dtype)
    model.load_state_dict(resnet.state_dict())
    return model.eval()


def convert_resnet_checkpoint(source: str) -> tuple[RSkipResNetForImageClassification, BaseImageProcessor | None]:
    """The ResNet `source` as a model of this package, and its image processor if one is known.

    Args:
        source: folder or Hub id of a `ResNetForImageClassification` or of one of timm's models, or a file with the
            state dict of a ResNet of torchvision or timm. With a file goes the usual processor of ImageNet: the
            shorter edge to 256 pixels, bilinear, and the central 224 x 224; for other weights it is to be adapted.

    Raises:
        [`UserError`]: if `source` is not a complete checkpoint of a plain ResNet with a classifier.
    """
    try:
        if Path(source).is_file():
            model = convert_resnet_state_dict(read_state_dict(source))
            logger.warning(
                f"{source!r} is taken for a ResNet of torchvision, with its usual preprocessing: a state dict does not "
                "tell dilation, anti-aliasing or how images are prepared"
            )
            processor = _make_processor({"interpolation": "bilinear"}, model.config.num_channels)
        else:
            model, processor = _convert_folder(source)
    except UserError as error:
        raise UserError(f"{source!r} cannot be converted: {error}") from error
    if processor is None:
        logger.warning(f"No image processor is written, since none is known that fits {source!r}")
    return model, processor


def _convert_folder(source: str) -> tuple[RSkipResNetForImageClassification, BaseImageProcessor | None]:
    check_name(source, "model")
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
        if "architecture" in config:
            return _convert_timm(source, config)
    except OSError as error:
        raise not_loaded(source, error) from error
    model_type = config.get("model_type")
    if model_type != ResNetConfig.model_type:
        raise UserError(f"it is a model of type {model_type!r}, not {ResNetConfig.model_type!r}")
    resnet, report = load_with_report(ResNetForImageClassification, source)
    missing = {name for name in report["missing_keys"] if not name.endswith("num_batches_tracked")}
    if missing and all(name.startswith("classifier.") for name in missing):
        raise UserError("it has no classifier")
    unaccounted = sorted({*missing, *report["unexpected_keys"]})
    if unaccounted:
        raise UserError(f"it lacks weights of a ResNet, or has others: {', '.join(unaccounted)}")
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        processor = None
    return convert_resnet_model(resnet), processor


def _convert_timm(source: str, config: dict) -> tuple[RSkipResNetForImageClassification, BaseImageProcessor | None]:
    """Converts a folder of `timm.models.push_to_hf_hub` or `save_for_hf`, with a configuration of timm's own."""
    architecture = str(config["architecture"]).partition(".")[0]
    if not _TIMM_ARCHITECTURES.fullmatch(architecture):
        raise UserError(f"timm's architecture {architecture!r} is not a plain ResNet")
    others = (config.get("model_args") or {}).keys() - _TIMM_ARGUMENTS
    if others:
        raise UserError(f"timm's {architecture!r} is changed by the `model_args` {', '.join(sorted(others))}")
    if config.get("global_pool", "avg") != "avg":
        raise UserError(f"its `global_pool` is {config['global_pool']!r}, not 'avg'")
    files = (
        cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
    )
    file = next(filter(None, files), None)
    if file is None:
        raise UserError(f"there is neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}")
    preprocessing = config.get("pretrained_cfg", config)  # timm's first configurations had one level
    label_names = config.get("label_names", preprocessing.get("label_names"))
    if not isinstance(label_names, list):
        label_names = None
    model = convert_resnet_state_dict(read_state_dict(file), label_names)
    return model, _make_processor(preprocessing, model.config.num_channels)


def _make_processor(preprocessing: dict, num_channels: int) -> BaseImageProcessor | None:
    """The evaluation transform of a `pretrained_cfg`, with timm's defaults; `None` where it is not the usual one."""
    _, height, width = preprocessing.get("input_size", (3, 224, 224))
    interpolation = preprocessing.get("interpolation", "bicubic").upper()
    if (
        num_channels != 3
        or height != width
        or preprocessing.get("crop_mode", "center") != "center"
        or interpolation not in PILImageResampling.__members__
    ):
        return None
    return BitImageProcessorPil(
        size={"shortest_edge": math.floor(height / preprocessing.get("crop_pct", 0.875))},
        crop_size={"height": height, "width": width},
        resample=PILImageResampling[interpolation],
        image_mean=list(preprocessing.get("mean", IMAGENET_DEFAULT_MEAN)),
        image_std=list(preprocessing.get("std", IMAGENET_DEFAULT_STD)),
    )
