"""The ranges of the numbers in a recipe."""

from typing import Any

from ..errors import UserError

_LARGEST_SEED = 2**32 - 1  # numpy's limit
_RANGES = {
    "at least 0": (
        lambda value: value >= 0,
        "dataloader_num_workers learning_rate label_smoothing_factor weight_decay warmup_steps adam_epsilon "
        "max_grad_norm logging_steps no_repeat_ngram_size",
    ),
    "at least 1": (
        lambda value: value >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps early_stopping_patience "
        "loss_spike_window probe_steps average_checkpoints per_device_train_batch_tokens pad_to_multiple_of "
        "generation_num_beams global_batch_tokens num_beams max_new_tokens",
    ),
    "a number from 0 to below 1": (lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 ema_decay momentum"),
    "a number above 0": (lambda value: value > 0, "num_train_epochs lr_gamma"),
    "below 1": (lambda value: value < 1, "label_smoothing_factor"),
    "above 1": (lambda value: value > 1, "loss_spike_factor"),
    f"from 0 to {_LARGEST_SEED}": (lambda value: 0 <= value <= _LARGEST_SEED, "seed data_seed"),
    "a finite number of at least 0": (
        lambda value: 0 <= value < float("inf"),
        "length_penalty gnmt_length_penalty max_len_a max_len_b",
    ),
}
"""Each range as messages describe it, with its condition and the keys whose values must fulfil it."""


def check_ranges(arguments: Any) -> None:
    """Raises a [`UserError`] that names a key of `arguments` whose value is out of its range; `None` passes."""
    for description, (holds, keys) in _RANGES.items():
        for key in keys.split():
            value = getattr(arguments, key, None)
            if value is not None and not holds(value):
                raise UserError(f"{key} must be {description}, not {value}.")
