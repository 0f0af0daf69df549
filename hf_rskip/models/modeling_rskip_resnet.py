"""A ResNet whose residual blocks use a chosen skip connection.

Modules and weights have the names of Transformers' ResNet, which the plain network equals.
"""

import math
from collections import OrderedDict

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .checks import check_keywords
from .configuration_rskip_resnet import RSkipResNetConfig
from .skip_connections import SKIP_CONNECTIONS, SkipConnection, SublayerPosition
from .skip_norms import norm_of


def _norm_activation(channels: int, activation: str) -> nn.Sequential:
    """Batch normalisation and activation, where they come before a convolution."""
    return nn.Sequential(OrderedDict(normalization=nn.BatchNorm2d(channels), activation=ACT2FN[activation]))


class RSkipResNetConvLayer(nn.Sequential):
    """A convolution that keeps height and width up to its stride; then normalisation and activation, where wanted."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        normalize: bool = True,
        activation: str | None = None,
    ):
        super().__init__()
        padding = kernel_size // 2
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels) if normalize else nn.Identity()
        self.activation = nn.Identity() if activation is None else ACT2FN[activation]


class RSkipResNetEmbeddings(nn.Module):
    """The stem. Without activation where the first block begins with one."""

    def __init__(self, config: RSkipResNetConfig):
        super().__init__()
        self.num_channels = config.num_channels
        kernel_size, stride = {"imagenet": (7, 2), "cifar": (3, 1)}[config.stem_type]
        self.embedder = RSkipResNetConvLayer(
            config.num_channels,
            config.embedding_size,
            kernel_size,
            stride,
            normalize=not config.preactivation,
            activation=None if config.preactivation else config.hidden_act,
        )
        self.pooler = nn.MaxPool2d(3, stride=2, padding=1) if config.stem_type == "imagenet" else nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` must be of shape (batch, {self.num_channels}, height, width), not "
                f"{tuple(pixel_values.shape)}"
            )
        return self.pooler(self.embedder(pixel_values))


class RSkipResNetPadding(nn.Module):
    """Shortcut option A, without parameters: every `stride`-th position, and zeros for the channels that are added."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.added_channels, self.stride = out_channels - in_channels, stride

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(hidden_states, (0, 0, 0, 0, 0, self.added_channels))


class RSkipResNetDropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): zeroes the branch of a random part of the samples, in training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1, 1).bernoulli_(1 - self.rate)
        return branch * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class RSkipResNetLayer(nn.Module):
    """A residual block: a basic or a bottleneck branch, and the skip connection that joins it to the block's input."""

    def __init__(
        self,
        config: RSkipResNetConfig,
        in_channels: int,
        out_channels: int,
        stride: int,
        layer_idx: int,
        drop_path_rate: float,
    ):
        super().__init__()
        preactivation, activation = config.preactivation, config.hidden_act
        self.preactivation = _norm_activation(in_channels, activation) if preactivation else nn.Identity()
        self.shortcut = nn.Identity()
        self.reshapes = in_channels != out_channels or stride != 1
        if self.reshapes and config.shortcut_type == "A":
            self.shortcut = RSkipResNetPadding(in_channels, out_channels, stride)
        elif self.reshapes:
            self.shortcut = RSkipResNetConvLayer(in_channels, out_channels, 1, stride, normalize=not preactivation)
        if config.layer_type == "basic":
            convolutions = [(out_channels, 3, stride), (out_channels, 3, 1)]
        else:
            strides = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
            width = out_channels // 4
            convolutions = [(width, 1, strides[0]), (width, 3, strides[1]), (out_channels, 1, 1)]
        self.layer = nn.Sequential()
        channels = in_channels
        for width, kernel_size, stride in convolutions[:-1]:
            self.layer.append(RSkipResNetConvLayer(channels, width, kernel_size, stride, activation=activation))
            channels = width
        self.layer.append(RSkipResNetConvLayer(channels, *convolutions[-1], normalize=not preactivation))
        if config.zero_init_last_gain:
            last = self.layer[-1]
            (last.convolution if preactivation else last.normalization).init_gain = 0.0
        self.drop_path = RSkipResNetDropPath(drop_path_rate)
        position = SublayerPosition("encoder", layer_idx, 0, sum(config.depths), 1, branch_size=in_channels)
        self.skip = SKIP_CONNECTIONS[config.skip_type].from_config(config, out_channels, position)
        self.activation = nn.Identity() if preactivation else ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Skip connections have the features last; these are views.
        branch = self.preactivation(self.skip.before(hidden_states.movedim(1, -1)).movedim(-1, 1))
        # As in He et al. (2016b), a shortcut that changes the shape begins behind the activation, too.
        residual = self.shortcut(branch if self.reshapes else hidden_states)
        branch = self.drop_path(self.layer(branch))
        hidden_states = self.skip(residual.movedim(1, -1), branch.movedim(1, -1)).movedim(-1, 1)
        return self.activation(hidden_states)


class RSkipResNetEncoder(nn.Module):
    """Stages of blocks, the first block of each changing the shape, then the final norm and activation, if any."""

    def __init__(self, config: RSkipResNetConfig):
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        channels, layer_idx = config.embedding_size, 0
        self.stages = nn.ModuleList()
        for depth, size in zip(config.depths, config.hidden_sizes, strict=True):
            stride = 2 if layer_idx or config.downsample_in_first_stage else 1
            layers = nn.Sequential()
            for _ in range(depth):
                layers.append(RSkipResNetLayer(config, channels, size, stride, layer_idx, rates[layer_idx]))
                channels, stride, layer_idx = size, 1, layer_idx + 1
            self.stages.append(nn.Sequential(OrderedDict(layers=layers)))
        self.final_norm = SKIP_CONNECTIONS[config.skip_type].final_norm(
            channels, norm_of(config), config.layer_norm_eps
        )
        self.final_activation = _norm_activation(channels, config.hidden_act) if config.preactivation else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The feature maps of the stem and of each stage, `(batch, channels, height, width)`."""
        feature_maps = [hidden_states]
        for stage in self.stages:
            feature_maps.append(stage(feature_maps[-1]))
        last = self.final_norm(feature_maps.pop().movedim(1, -1)).movedim(-1, 1)
        return *feature_maps, self.final_activation(last)


class RSkipResNetPreTrainedModel(PreTrainedModel):
    config_class = RSkipResNetConfig
    config: RSkipResNetConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["RSkipResNetLayer"]
    _can_compile_fullgraph = True

    def __init__(self, config: RSkipResNetConfig):
        super().__init__(config)
        config.check_values()  # again, as fields may have been set since it was made

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal convolutions with the variance of He et al. (2015), fan-out; then each skip connection's."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)  # as in torch and in Transformers' ResNet
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, SkipConnection):
            module.init_weights()
        else:
            super()._init_weights(module)
        if getattr(module, "init_gain", 1.0) == 0:
            init.zeros_(module.weight)


class RSkipResNetModel(RSkipResNetPreTrainedModel):
    """Stem, stages and global average pooling, without a head."""

    def __init__(self, config: RSkipResNetConfig):
        super().__init__(config)
        self.embedder = RSkipResNetEmbeddings(config)
        self.encoder = RSkipResNetEncoder(config)
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """
        Args:
            pixel_values: images as the image processor makes them, `(batch, num_channels, height, width)`.
            kwargs: of those of Transformers, `output_hidden_states`: whether to return the feature maps behind the stem
                and behind each stage, or the indices of those to return.

        Returns:
            `last_hidden_state` `(batch, hidden_sizes[-1], height / s, width / s)`, where s is the product of the
            strides (32 with an `"imagenet"` stem and four stages), and its mean over positions, `pooler_output`
            `(batch, hidden_sizes[-1], 1, 1)`.
        """
        check_keywords(self, kwargs, without_effect=["output_attentions"])
        feature_maps = self.encoder(self.embedder(pixel_values))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=feature_maps[-1],
            pooler_output=self.pooler(feature_maps[-1]),
            hidden_states=feature_maps,
        )


def image_classification_loss(
    labels: torch.Tensor,
    logits: torch.Tensor,
    config: RSkipResNetConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """The loss of `config.problem_type`, which the first labels decide, as in Transformers.

    That of Transformers ignores `num_items_in_batch` where there is more than one label, or a number, for an image, and
    gradient accumulation would multiply the gradient.

    Args:
        labels: `(batch,)` with the class of each image, or -100 to leave it out; `(batch, num_labels)` floating point
            for several labels each; `(batch,)` or the shape of the logits for regression.
        logits: `(batch, num_labels)`.
        num_items_in_batch: what the sum is divided by, rather than by the number of its terms.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    are_classes = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
    labels = labels.to(torch.long if are_classes and not labels.is_floating_point() else logits.dtype)
    loss = ForSequenceClassificationLoss(labels, logits, config, num_items_in_batch=num_items_in_batch)
    if num_items_in_batch is None or config.problem_type == "single_label_classification":
        return loss
    return loss * labels.numel() / torch.as_tensor(num_items_in_batch, device=loss.device)


class RSkipResNetForImageClassification(RSkipResNetPreTrainedModel):
    """An [`RSkipResNetModel`] with a linear classifier on the pooled features."""

    def __init__(self, config: RSkipResNetConfig):
        super().__init__(config)
        self.resnet = RSkipResNetModel(config)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(config.hidden_sizes[-1], config.num_labels))
        self.loss_function = image_classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutputWithNoAttention:
        """
        Args:
            pixel_values: images as the image processor makes them, `(batch, num_channels, height, width)`.
            labels: the class of each image, `(batch,)`, from 0 to `num_labels - 1`; with the `problem_type` of the
                configuration, numbers or several labels for each, as [`image_classification_loss`] says.
            kwargs: as of [`RSkipResNetModel`].

        Returns:
            `logits` `(batch, num_labels)` and, with `labels`, the cross-entropy `loss` in nats: the mean over the
            batch, or with `num_items_in_batch` the sum divided by it.
        """
        check_keywords(self, kwargs, without_effect=["output_attentions"])
        outputs = self.resnet(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class RSkipResNetBackbone(BackboneMixin, RSkipResNetPreTrainedModel):
    """Stem and stages, for models of Transformers that build on feature maps, such as DETR."""

    has_attentions = False

    def __init__(self, config: RSkipResNetConfig):
        super().__init__(config)
        self.num_features = [config.embedding_size, *config.hidden_sizes]
        self.embedder = RSkipResNetEmbeddings(config)
        self.encoder = RSkipResNetEncoder(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Returns `feature_maps`, `(batch, channels, height, width)` for each stage of `config.out_features`.

        For the arguments see [`RSkipResNetModel`].
        """
        check_keywords(self, kwargs, without_effect=["output_attentions"])
        hidden_states = self.encoder(self.embedder(pixel_values))
        named = zip(self.stage_names, hidden_states, strict=True)
        feature_maps = tuple(feature_map for stage, feature_map in named if stage in self.out_features)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=hidden_states)


__all__ = ["RSkipResNetBackbone", "RSkipResNetForImageClassification", "RSkipResNetModel", "RSkipResNetPreTrainedModel"]
