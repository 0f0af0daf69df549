"""What a run says of its model before it trains."""

from transformers import PreTrainedModel

from ..models import SKIP_CONNECTIONS
from .recipe import Recipe


def describe_model(model: PreTrainedModel, recipe: Recipe, shape: str) -> None:
    """Prints the skip connection and the size of a model, and which keys of the recipe have no effect."""
    config = model.config
    kind = SKIP_CONNECTIONS[config.skip_type]
    print(f"model: {kind.describe(config)}; {model.num_parameters():,} parameters, {shape}", flush=True)
    if config.skip_type == "rskip" and config.skip_norm == "none":
        print(f"note: without a norm, this is {config.skip_recursions} * x + F", flush=True)
    for key in ("skip_recursions", "skip_norm_affine", "skip_scale"):
        if key in recipe.keys and key not in kind.options:
            print(f"note: {key} has no effect with skip_type {config.skip_type}", flush=True)
