"""Descriptions of a recipe and its model, for the terminal and the model card."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..models import SKIP_CONNECTIONS
from .parsing import Recipe

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Values of `lr_scheduler_type` for which `warmup_steps` has no effect."""


def describe_model(model: PreTrainedModel, recipe: Recipe, shape: str) -> None:
    """Prints the skip connection and the size of a model, and which keys of the recipe have no effect."""
    config = model.config
    kind = SKIP_CONNECTIONS[config.skip_type]
    print(f"model: {kind.describe(config)}; {model.num_parameters():,} parameters, {shape}", flush=True)
    if config.skip_type == "rskip" and config.skip_norm == "none":
        print(f"note: without a norm, this is {config.skip_recursions} * x + F", flush=True)
    for key, condition in find_idle_keys(recipe, config):
        print(f"note: {key} has no effect {condition}", flush=True)


def find_idle_keys(recipe: Recipe, config: PreTrainedConfig) -> list[tuple[str, str]]:
    """Finds the keys of a recipe that have no effect beside its other keys or with its model; each with the reason."""
    values, options = recipe.values, SKIP_CONNECTIONS[config.skip_type].options
    schedule, optim = values["lr_scheduler_type"], values["optim"]
    is_adam = ("adam" in optim or "ademamix" in optim) and optim != "grokadamw"
    has_milestones = values.get("lr_milestones") is not None
    own_tokenizer = values.get("tokenizer_name") or values["model_name_or_path"]
    skip_keys = [key for key in ("skip_recursions", "skip_norm_affine", "skip_scale") if key not in options]
    hub_keys = [key for key in values if key.startswith("hub_")]
    rules = [
        ("eval_steps", values["eval_strategy"] != "steps", "unless eval_strategy is steps"),
        ("eval_delay", values["eval_strategy"] == "no", "with eval_strategy no"),
        ("save_steps", values["save_strategy"] != "steps", "unless save_strategy is steps"),
        ("save_total_limit", values["save_strategy"] == "no", "with save_strategy no"),
        ("logging_steps", values["logging_strategy"] != "steps", "unless logging_strategy is steps"),
        ("num_train_epochs", values["max_steps"] > 0, "with max_steps"),
        ("loss_spike_window", values["loss_spike_factor"] is None, "without loss_spike_factor"),
        ("average_checkpoints_by", values["average_checkpoints"] is None, "without average_checkpoints"),
        (" ".join(skip_keys), True, f"with skip_type {config.skip_type}"),
        ("warmup_steps", schedule in _WITHOUT_WARMUP and not has_milestones, f"with lr_scheduler_type {schedule}"),
        ("layer_norm_eps skip_norm_axes", config.skip_norm == "none", "with skip_norm none"),
        ("lr_gamma", not has_milestones, "without lr_milestones"),
        ("lr_scheduler_type lr_scheduler_kwargs", has_milestones, "with lr_milestones"),
        ("adam_beta1 adam_beta2", not is_adam and "lion" not in optim, f"with optim {optim}"),
        ("adam_epsilon", not is_adam, f"with optim {optim}"),
        ("momentum nesterov", optim != "sgd", f"with optim {optim}"),
        (" ".join(hub_keys), not values["push_to_hub"], "without push_to_hub"),
        ("generation_num_beams", not values.get("predict_with_generate"), "without predict_with_generate"),
        ("vocab_size tokenizer_train_samples lowercase", own_tokenizer, "with a tokenizer that is there"),
        ("shuffle_buffer_size", not values.get("streaming"), "without streaming"),
        ("crop_padding", values.get("random_resized_crop"), "with random_resized_crop"),
    ]
    return [
        (key, condition)
        for keys, is_idle, condition in rules
        for key in keys.split()
        if is_idle and key in recipe.given
    ]


def describe_schedule(args: TrainingArguments, steps: int) -> str:
    """Describes the learning-rate schedule of so many steps in one line."""
    name, warmup = args.lr_scheduler_type.value, args.get_warmup_steps(steps)
    if getattr(args, "lr_milestones", None) is not None:
        milestones = [f"{epoch:g}{' (not reached)' * (epoch >= args.num_train_epochs)}" for epoch in args.lr_milestones]
        name = f"times {args.lr_gamma:g} after epochs {', '.join(milestones)}"
    elif name in _WITHOUT_WARMUP:
        return f"learning rate: {args.learning_rate:g}, {name}, {steps:,} steps"
    if warmup > steps:
        name += " (its peak is never reached: lower warmup_steps)"
    return f"learning rate: {args.learning_rate:g}, {name}, warm-up in {warmup:,} of {steps:,} steps"


def describe_resumption(resumption: dict[str, Any]) -> str:
    """Describes one entry of a record's `resumed`, as `step 4 with num_train_epochs 8 (before: 4)`."""
    changes = [f"{key} {now} (before: {before})" for key, (before, now) in resumption["changed"].items()]
    return f"step {resumption['step']:,}" + (f" with {', '.join(changes)}" if changes else "")
