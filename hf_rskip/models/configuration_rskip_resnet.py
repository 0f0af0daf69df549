"""Configuration of the ResNet, and the architectures of the literature by name."""

from transformers.backbone_utils import BackboneConfigMixin

from .configuration_skip import ACTIVATION, COUNT, FLAG, MOST_FEATURES, MOST_LAYERS, RATE, SkipConfig, counts, one_of
from .skip_connections import SKIP_CONNECTIONS
from .skip_norms import NORM_AXES

# Section 4.2 of He et al. (2016): three stages of equally many blocks.
_CIFAR = {"stem_type": "cifar", "embedding_size": 16, "num_labels": 10}
_BASIC = {**_CIFAR, "layer_type": "basic", "hidden_sizes": [16, 32, 64], "shortcut_type": "A"}
# He et al. (2016b) project where the width changes.
_BOTTLENECK = {**_CIFAR, "layer_type": "bottleneck", "hidden_sizes": [64, 128, 256], "shortcut_type": "B"}
# Table 1 of He et al. (2016).
_IMAGENET_BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "num_labels": 1000}
_IMAGENET = {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048], "num_labels": 1000}

ARCHITECTURES: dict[str, dict] = {
    **{f"resnet{6 * n + 2}_cifar": {**_BASIC, "depths": [n] * 3} for n in (3, 5, 7, 9, 18)},
    **{f"preact_resnet{6 * n + 2}_cifar": {**_BASIC, "depths": [n] * 3, "preactivation": True} for n in (3, 9, 18)},
    "preact_resnet164_cifar": {**_BOTTLENECK, "depths": [18] * 3, "preactivation": True},
    "resnet18": {**_IMAGENET_BASIC, "depths": [2, 2, 2, 2]},
    "resnet34": {**_IMAGENET_BASIC, "depths": [3, 4, 6, 3]},
    "resnet50": {**_IMAGENET, "depths": [3, 4, 6, 3]},
    "resnet101": {**_IMAGENET, "depths": [3, 4, 23, 3]},
}
"""Fields of [`RSkipResNetConfig`] by the name of an architecture, for [`RSkipResNetConfig.from_name`]."""


class RSkipResNetConfig(BackboneConfigMixin, SkipConfig):
    r"""
    Configuration of an [`RSkipResNetModel`], a ResNet whose residual blocks use a chosen skip connection. Names are
    those of `ResNetConfig`; the defaults are a ResNet-50 (He et al., 2016) with rSkip+LN, K = 2.

    With `skip_type="xskip"` and `skip_norm="none"` it is the plain ResNet, as `ResNetConfig` describes it. The branches
    have their batch normalisation whatever the skip connection.

    Args:
        num_channels: Number of channels of the images.
        embedding_size: Number of channels behind the stem.
        hidden_sizes: Number of channels of each stage.
        depths: Number of blocks of each stage.
        layer_type: `"basic"`, two 3x3 convolutions, or `"bottleneck"`, 1x1, 3x3 and 1x1, the first two a quarter as
            wide.
        hidden_act: Name of a function of `transformers.activations.ACT2FN`.
        preactivation: Whether norm and activation come before each convolution (He et al., 2016b), rather than after
            it.
        stem_type: `"imagenet"`, a 7x7 convolution and max pooling, which shrink an image fourfold, or `"cifar"`, a 3x3
            convolution.
        shortcut_type: Where a block changes the shape of its input: `"A"`, subsampling and zero channels, without
            parameters, or `"B"`, a 1x1 convolution (options A and B of He et al., 2016), with batch normalisation
            unless `preactivation`.
        downsample_in_first_stage: Whether the first stage halves height and width, as the others do.
        downsample_in_bottleneck: Whether a bottleneck halves them in its first convolution rather than in its second.
        zero_init_last_gain: Whether each branch starts at zero, by the gain of its last norm (with `preactivation`, by
            the weight of its last convolution, behind which there is no norm).
        drop_path_rate: Stochastic depth: the rate at which the branch of the last block is dropped; those before it in
            proportion to their depth (Huang et al., 2016).
        skip_norm_axes: What layer and RMS norms of a feature map go over: `"sample"`, channels and positions together,
            or `"channels"`, those of each position. Gain and bias belong to a channel in both.
        image_column, label_column: Columns of the dataset that a classifier was trained on, where its training named
            them.
        out_features, out_indices: The stages of which a backbone returns the feature maps, by name (`"stem"`,
            `"stage1"`, ...) or index; the last one unless given.

    Example:

    ```python
    >>> from hf_rskip import RSkipResNetConfig, RSkipResNetForImageClassification

    >>> config = RSkipResNetConfig.from_name("preact_resnet110_cifar", skip_type="rskip", skip_recursions=2)
    >>> model = RSkipResNetForImageClassification(config)

    ```
    """

    model_type = "rskip_resnet"

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    preactivation: bool = False
    stem_type: str = "imagenet"
    shortcut_type: str = "B"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    zero_init_last_gain: bool = False
    drop_path_rate: float = 0.0
    skip_norm_axes: str = "sample"
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, len(self.depths) + 1))]
        self.set_output_features_output_indices(out_indices=out_indices, out_features=out_features)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        if config_dict.get("out_features") == config_dict.get("stage_names", [])[-1:]:
            config_dict = config_dict | {"out_features": None, "out_indices": None}  # follow `depths` of the keywords
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_name(cls, name: str, **kwargs) -> "RSkipResNetConfig":
        """The configuration of an architecture of the literature, a key of [`ARCHITECTURES`].

        Unless a `skip_type` is given it is the plain network: `skip_type="xskip"` with `skip_norm="none"`.

        Args:
            name: such as `"resnet50"` or `"preact_resnet110_cifar"`.
            kwargs: fields that differ.

        Raises:
            `ValueError`: if there is no architecture of that name, or an option has no effect without a `skip_type`.
        """
        if name not in ARCHITECTURES:
            raise ValueError(f"`name` must be one of {', '.join(ARCHITECTURES)}, not {name!r}")
        fields = ARCHITECTURES[name] | kwargs
        if "id2label" in kwargs or "label2id" in kwargs:
            del fields["num_labels"]
        for field in ("skip_recursions", "skip_norm_affine"):
            if field in kwargs and "skip_type" not in kwargs:
                raise ValueError(f"`{field}` has no effect on the plain network: give a `skip_type`, too")
        if "skip_type" not in kwargs:
            fields = {"skip_type": "xskip", "skip_norm": "none"} | fields
        return cls(**fields)

    def check_values(self) -> None:
        super().check_values()
        self._check("skip_norm_axes", one_of(NORM_AXES))
        self._check("skip_type", one_of([name for name, kind in SKIP_CONNECTIONS.items() if kind.for_images]))
        self._check("num_channels embedding_size", COUNT)
        self._check("hidden_sizes", counts(MOST_FEATURES))
        self._check("depths", counts(MOST_LAYERS))
        stages = len(self.hidden_sizes)
        self._check("depths", (lambda depths: len(depths) == stages, f"a list of {stages}, as `hidden_sizes`"))
        self._check("layer_type", one_of(("basic", "bottleneck")))
        self._check("stem_type", one_of(("imagenet", "cifar")))
        self._check("shortcut_type", one_of(("A", "B")))
        self._check("hidden_act", ACTIVATION)
        self._check("preactivation downsample_in_first_stage downsample_in_bottleneck zero_init_last_gain", FLAG)
        self._check("drop_path_rate", RATE)
        if self.problem_type is not None:
            problems = ("regression", "single_label_classification", "multi_label_classification")
            self._check("problem_type", one_of(problems))
        if self.layer_type == "bottleneck":
            what = "multiples of 4 with `layer_type` 'bottleneck'"
            self._check("hidden_sizes", (lambda sizes: not any(size % 4 for size in sizes), what))
        if self.shortcut_type == "A":
            stem = self.embedding_size
            what = f"in ascending order from the stem's {stem} on with `shortcut_type` 'A', which only adds channels"
            self._check("hidden_sizes", (lambda sizes: sorted([stem, *sizes]) == [stem, *sizes], what))


__all__ = ["RSkipResNetConfig"]
