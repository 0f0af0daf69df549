"""Folds other skip connections into the weights of a post-LN Transformer (`rskip` with K = 1).

Up to the last norm, many kinds are linear in the input x of the sublayer and the output F of its branch: they are
LN(w x + A F + c), with w and c of shape `(d_model,)` and A of shape `(d_model, d_model)`. Post-LN is LN(x + F).

A and c go into the layer that F comes from, `out_proj` or `fc2`: W becomes A W, and its bias b becomes A b + c.

w goes into the norm before, which then gives w x in place of x (its gain and bias times w), and the columns of whatever
else reads that x are divided by w: q, k and v of self-attention, `fc1`, and in cross-attention q alone, as its k and v
read the encoder's output. This is exact.

Before the first sublayer of a stack there is no norm but the sum of embeddings and positions. There,

- if w is the same number for all features, LN(w z) = sign(w) LN(z) for each z, so that 1/w goes into `out_proj` and the
  sign into the gain. Embeddings stay tied and positions sinusoids. This is exact but for `layer_norm_eps`, which now is
  added to a variance w^2 times smaller: the output of this one norm changes by the factor 1 + (1 - w^2) eps / (2 v),
  where v is the variance of w x + F. With eps = 1e-5 and w near 2, v is around 5 and the change 3e-6. (In every
  sublayer it adds up: with random weights and w = 3 log-probabilities differed by 1.2e-4, and by 3.7e-5 as it is here.)
- if w differs between features, or eps is above 1e-5, both tables are scaled as the norms are. So the embeddings of
  encoder, decoder and output are no longer one matrix (`tie_word_embeddings: false`), and the positions no longer
  sinusoids (`learned_positions: true`).

| kind | w | A | c |
|---|---|---|---|
| `rskip` and `rskip_detached`, K = 1 | 1 | 1 | 0 |
| `xskip`, `deep_norm`, `admin_fixed` | s | 1 | 0 |
| `admin` | w for each feature | 1 | 0 |
| `rezero` | 1 | a | 0 |

**Freezing.** `rskip` with K > 1 divides by standard deviations sigma_k inside, a number for each token and step. With
each held at its mean over data, it is linear, too. Let z_1 = x + F and z_{k+1} = x + LN_k(z_k), with gain g_k and
bias b_k, and suppose z_k = w_k x + A_k F + c_k. With C = 1 - 11'/d, the matrix that subtracts the mean over features,

    z_{k+1} = x + (g_k / sigma_k) (C A_k F + C c_k + w_k x - mean(w_k x)) + b_k

so w_{k+1} = 1 + (g_k / sigma_k) w_k, A_{k+1} = diag(g_k / sigma_k) C A_k, and c_{k+1} = (g_k / sigma_k) (C c_k - m_k)
+ b_k, where m_k, the mean of w_k x over features, is held at its mean over data, as well. Of F the centring is exact,
since it is linear. With an RMS norm there is no centring, and sigma_k is the root of the mean square.
`rskip_detached` is frozen with its weight r_K of x held at its mean.
"""

import contextlib
import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from ..errors import UserError
from ..models import RSkipConfig, RSkipForConditionalGeneration
from ..models.skip_connections import DetachedRSkip, ReZero, RSkip, SkipConnection

_SCALED = ("xskip", "deep_norm", "admin", "admin_fixed")
_RECURSIVE = ("rskip", "rskip_detached")
_NOT_LINEAR = {
    "pre_norm": "it adds up the outputs of all branches and normalises only what the branches read",
    "peri_norm": "it adds up the normalised outputs of all branches without normalising the sum",
    "b2t": "the last norm of each layer also adds the input of the layer, past the norms between",
    "keel": "its branch reads x normalised once more, and x itself passes without that",
}
_READERS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "encoder_attn": ("q_proj",), "mlp": ("fc1",)}
"""The layers that read the x of each sublayer, in the order in which these run."""


def is_frozen(config: RSkipConfig) -> bool:
    """Whether folding a model of that configuration needs what [`measured`] yields, and so is an approximation.

    Raises:
        [`UserError`]: if it cannot be folded, which names why.
    """
    if config.model_type != RSkipConfig.model_type:
        raise UserError(
            f"A model of type {config.model_type!r} cannot be folded into post-LN, only one of type 'rskip'"
        )
    kind, norm = config.skip_type, config.skip_norm
    reason = _NOT_LINEAR.get(kind)
    if reason is None and kind not in (*_SCALED, *_RECURSIVE, "rezero"):
        reason = "it is a kind that was added to those of this package"
    if reason:
        raise UserError(f"`skip_type` {kind!r} cannot be folded into post-LN: {reason}")
    if norm not in ("layer_norm", "rms_norm"):
        what = "without a norm" if norm == "none" else "with a norm that divides by constants"
        raise UserError(f"`skip_norm` {norm!r} cannot be folded into post-LN: {what} a scale of x does not vanish")
    return kind in _RECURSIVE and config.skip_recursions > 1


@contextlib.contextmanager
def measured(model: RSkipForConditionalGeneration) -> Iterator[dict[str, torch.Tensor]]:
    """Measures each skip connection, by its name in the model, over the real tokens of the calls inside the block.

    Yields:
        Sums over tokens in float64, one after another: of x, `d_model` numbers; of sigma_1 to sigma_{K-1} of an rSkip,
        or r_K of a detached one; of 1, which is how many tokens they are.
    """
    sums, hooks = {}, []

    def add(name: str, skip: SkipConnection, args: tuple, output: torch.Tensor) -> None:
        x, branch, mask = args
        keep = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        x, branch = x[keep].double(), branch[keep].double()
        row = torch.cat([x, *_scales(skip, x, branch), torch.ones_like(x[:, :1])], dim=-1).sum(0).cpu()
        sums[name] = sums.get(name, 0) + row

    for name, module in model.named_modules():
        if isinstance(module, SkipConnection):
            hooks.append(module.register_forward_hook(partial(add, name)))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def fold(
    model: RSkipForConditionalGeneration, statistics: dict[str, torch.Tensor] | None = None
) -> RSkipForConditionalGeneration:
    """A post-LN model (`rskip`, K = 1) with the outputs of `model`, in evaluation mode; see this module for how.

    Args:
        model: of a kind that folds; it is left as it is.
        statistics: of [`measured`], where [`is_frozen`] says that they are needed.

    Raises:
        [`UserError`]: if the model cannot be folded, because of its kind, of a weight of x that is 0, or for lack of
            statistics.
    """
    skips = {name: skip for name, skip in model.named_modules() if isinstance(skip, SkipConnection)}
    statistics = statistics or {}
    if is_frozen(model.config) and not statistics.keys() >= skips.keys():
        raise UserError(
            f"`skip_type` {model.config.skip_type!r} with `skip_recursions` {model.config.skip_recursions} is folded "
            "with means over data, and there are no sentence pairs to measure them"
        )
    linear = {name: _linear_form(skip, statistics.get(name)) for name, skip in skips.items()}
    for name, (w, _, _) in linear.items():
        if (w == 0).any():
            raise UserError(f"{name} multiplies x, or a feature of it, by 0, which post-LN never does")
    config = copy.deepcopy(model.config)
    first = [linear[f"model.{stack}.layers.0.self_attn_skip"][0] for stack in ("encoder", "decoder")]
    if not all(_keeps_tables(w, config) for w in first):
        config.tie_word_embeddings, config.learned_positions = False, True
    config.update({"skip_type": "rskip", "skip_recursions": 1, "skip_scale": 1.0, "skip_norm_affine": "per_step"})
    folded = RSkipForConditionalGeneration(config).to(model.device).double()
    kept = {name: weight for name, weight in model.state_dict().items() if "_skip." not in name}
    folded.load_state_dict(folded.state_dict() | kept)
    for stack in ("encoder", "decoder"):
        _fold_stack(f"model.{stack}", folded, skips, linear)
    folded.generation_config = copy.deepcopy(model.generation_config)
    return folded.to(model.dtype).eval()


def fold_exactly(model: RSkipForConditionalGeneration) -> RSkipForConditionalGeneration:
    """[`fold`], or a [`UserError`] if it would be an approximation or is not possible."""
    if is_frozen(model.config):
        raise UserError(
            f"`skip_type` {model.config.skip_type!r} with `skip_recursions` {model.config.skip_recursions} is not a "
            "plain Transformer: `hf-rskip convert fold` makes it one"
        )
    return fold(model)


def _fold_stack(stack_name: str, folded: RSkipForConditionalGeneration, skips: dict, linear: dict) -> None:
    stack = folded.get_submodule(stack_name)
    emitting = [stack.embed_tokens.weight, stack.embed_positions.weight]  # the weights that x is proportional to
    for index, layer in enumerate(stack.layers):
        for name, readers in _READERS.items():
            if not hasattr(layer, name):
                continue
            branch, norm = getattr(layer, name), getattr(layer, f"{name}_skip").norm[0]
            w, matrix, constant = linear[f"{stack_name}.layers.{index}.{name}_skip"]
            gain, bias = _gains_and_biases(skips[f"{stack_name}.layers.{index}.{name}_skip"])[-1]
            norm.weight.copy_(gain)
            if norm.bias is not None:
                norm.bias.copy_(bias)
            last = branch.fc2 if name == "mlp" else branch.out_proj
            last.weight.copy_(matrix @ last.weight)
            last.bias.copy_(matrix @ last.bias + constant)
            if index == 0 and name == "self_attn" and _keeps_tables(w, folded.config):
                last.weight /= w[0]
                last.bias /= w[0]
                norm.weight *= w[0].sign()
            else:
                for weight in emitting:
                    weight *= w
                for reader in readers:
                    getattr(branch, reader).weight.div_(w)
            emitting = [weight for weight in (norm.weight, norm.bias) if weight is not None]


def _keeps_tables(w: torch.Tensor, config: RSkipConfig) -> bool:
    """Whether w goes into `out_proj` before the first norm; with a larger eps the change would be seen."""
    return bool((w == w[0]).all()) and (config.layer_norm_eps <= 1e-5 or bool((w == 1).all()))


def _gains_and_biases(skip: SkipConnection) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gain and bias of each norm, in float64; ones and zeros where it has none."""
    norms = list(skip.norm) if isinstance(skip, RSkip) else [skip.norm]
    if getattr(skip, "affine", None) == "shared":
        norms = norms[:1] * len(norms)
    ones = next(skip.parameters()).new_ones(norms[0].normalized_shape, dtype=torch.float64)
    gains = [ones if norm.weight is None else norm.weight.detach().double() for norm in norms]
    biases = [torch.zeros_like(ones) if norm.bias is None else norm.bias.detach().double() for norm in norms]
    return list(zip(gains, biases, strict=True))


def _is_centred(skip: RSkip) -> bool:
    return isinstance(skip.norm[0], nn.LayerNorm)


def _scales(skip: SkipConnection, x: torch.Tensor, branch: torch.Tensor) -> list[torch.Tensor]:
    """sigma_1 to sigma_{K-1} of an rSkip, or r_K of a detached one, each `(tokens, 1)`; none of another kind."""
    if isinstance(skip, DetachedRSkip):
        return [skip.weight_of_x(x, branch)]
    if not isinstance(skip, RSkip):
        return []
    y, scales = branch, []
    for (gain, bias), norm in zip(_gains_and_biases(skip)[:-1], skip.norm, strict=False):
        z = x + y
        if _is_centred(skip):
            z = z - z.mean(-1, keepdim=True)
        scales.append((z.square().mean(-1, keepdim=True) + norm.eps).sqrt())
        y = gain * z / scales[-1] + bias
    return scales


def _linear_form(skip: SkipConnection, sums: torch.Tensor | None):
    """w, A and c of this module's docstring, in float64, by the sums of [`measured`]."""
    gain, bias = _gains_and_biases(skip)[0]
    w, matrix, constant = torch.ones_like(gain), torch.eye(len(gain)).to(gain), torch.zeros_like(gain)
    x, scales = (None, []) if sums is None else (sums[:-1] / sums[-1]).to(w).tensor_split([len(w)])
    if isinstance(skip, RSkip):
        for (gain, bias), sigma in zip(_gains_and_biases(skip)[:-1], scales, strict=True):
            if _is_centred(skip):
                matrix, constant = matrix - matrix.mean(0), constant - constant.mean() - (w * x).mean()
            gain = gain / sigma
            w, matrix, constant = 1 + gain * w, gain[:, None] * matrix, gain * constant + bias
    elif isinstance(skip, DetachedRSkip):
        w = w * (1.0 if sums is None else scales[0])  # r_1
    elif isinstance(skip, ReZero):
        matrix = matrix * skip.branch_scale.double()
    else:
        w = w * skip.scale  # a number; for `admin` a vector
    return w, matrix, constant
