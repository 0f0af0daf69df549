"""Adds recursions to a trained model, whose outputs hardly change."""

import copy
import re

from ..errors import UserError
from ..models import RSkipForConditionalGeneration

GAIN = 10.0
"""Gain of the added steps: the smallest measured that costs a trained model little (0.008 nats a token and 0.8 BLEU in
`recipes/studies/grow_recursions.py`, where 3 costs 0.10 and 9.1, and 1 everything)."""

_STEP = re.compile(r"(.*_skip\.norm\.)(\d+)(\..*)")


def grow_recursions(
    model: RSkipForConditionalGeneration, recursions: int, gain: float = GAIN
) -> RSkipForConditionalGeneration:
    """A copy of a trained rSkip model with more recursions, in evaluation mode, ready to be fine-tuned.

    The new steps come first, with gain a = `gain` and bias 0; the trained norms stay last. A new first step gives a n,
    where n is x + F normalised, and the old first step then computes LN(x + a n) in place of LN(x + F): the weight of
    the skip goes from 1 to 1 + std(x + F) / a, and n turns towards the part of x orthogonal to it, by an angle whose
    tangent is std(x_orthogonal) / (a + <x, n> / d). That is of order 1/a and never 0, for each further step, too. A
    larger gain keeps more of the function, and makes less of the recursion. Fine-tuning hardly changes it: the gradient
    that reaches a is of order 1/a^2, and Adam moves it by at most about the learning rate a step.

    As in Net2Net (Chen et al., 2016, https://arxiv.org/abs/1511.05641) a larger model starts as the trained one; 1/a
    has the role of the small weight in ReZero (Bachlechner et al., 2020, https://arxiv.org/abs/2003.04887). In
    bert2BERT (Chen et al., 2022, https://arxiv.org/abs/2110.07143) keeping the function exactly was not the fastest.

    Args:
        model: with `skip_type` `"rskip"`, a layer or RMS norm, and `per_step` affine, unless its K is 1.
        recursions: K of the copy, more than that of `model`.
        gain: a.

    Raises:
        [`UserError`]: if the model or the number of recursions is not such.
    """
    config = copy.deepcopy(model.config)
    added = recursions - config.skip_recursions
    if config.skip_type != "rskip" or config.skip_norm not in ("layer_norm", "rms_norm"):
        raise UserError(
            "Recursions can be added to `skip_type` 'rskip' with `skip_norm` 'layer_norm' or 'rms_norm', not to "
            f"{config.skip_type!r} with {config.skip_norm!r}"
        )
    if config.skip_norm_affine != "per_step" and config.skip_recursions > 1:
        raise UserError(f"`skip_norm_affine` must be 'per_step', not {config.skip_norm_affine!r}")
    if added < 1:
        raise UserError(f"`skip_recursions` must be more than the model's {config.skip_recursions}, not {recursions}")
    config.skip_recursions, config.skip_norm_affine = recursions, "per_step"
    grown = RSkipForConditionalGeneration(config).to(model.dtype)
    trained = {
        _STEP.sub(lambda match: f"{match[1]}{int(match[2]) + added}{match[3]}", name): weight
        for name, weight in model.state_dict().items()
    }
    # The norms of the new steps have gain 1 and bias 0 by now.
    new = {name: weight for name, weight in grown.state_dict().items() if name not in trained}
    grown.load_state_dict(trained | {n: w * gain for n, w in new.items()})
    grown.generation_config = copy.deepcopy(model.generation_config)
    return grown.eval()
