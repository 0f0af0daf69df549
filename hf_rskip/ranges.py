"""The ranges of the numbers in a recipe."""

import math
from dataclasses import fields
from typing import Any

from .errors import UserError

_LARGEST_SEED = 2**32 - 1  # numpy's limit
_RANGES = {
    "at least 0": (
        lambda value: value >= 0,
        "dataloader_num_workers learning_rate label_smoothing_factor weight_decay warmup_steps adam_epsilon "
        "max_grad_norm logging_steps eval_delay no_repeat_ngram_size crop_padding length_penalty gnmt_length_penalty "
        "max_len_a max_len_b",
    ),
    "at least 1": (lambda value: value >= 1, "max_length_ratio"),
    "a whole number of at least 1": (
        lambda value: isinstance(value, int) and value >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps early_stopping_patience "
        "loss_spike_window probe_steps average_checkpoints per_device_train_batch_tokens pad_to_multiple_of "
        "generation_num_beams global_batch_tokens num_beams max_new_tokens max_train_samples max_eval_samples "
        "max_predict_samples validation_size preprocessing_num_workers max_characters max_source_length "
        "max_target_length tokenizer_train_samples image_size shuffle_buffer_size",
    ),
    "a number from 0 to below 1": (lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 ema_decay momentum"),
    "a number from 0.1 to 1": (lambda value: 0.1 <= value <= 1, "crop_pct"),
    "a number above 0": (lambda value: value > 0, "num_train_epochs eval_steps save_steps lr_gamma"),
    "at least 1, or -1": (lambda value: value >= 1 or value == -1, "max_steps"),
    "below 1": (lambda value: value < 1, "label_smoothing_factor"),
    "above 1": (lambda value: value > 1, "loss_spike_factor"),
    f"from 0 to {_LARGEST_SEED}": (lambda value: 0 <= value <= _LARGEST_SEED, "seed data_seed"),
}
"""Each range as messages describe it, with its condition and the keys whose values must fulfil it."""


def check_ranges(arguments: Any) -> None:
    """Raises a [`UserError`] that names a field of the dataclass `arguments` whose number is out of its range or not
    finite; `None` passes where it is the default."""
    defaults = {part.name: part.default for part in fields(arguments)}
    for key in defaults:
        value = getattr(arguments, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} must be a finite number, not {value}.")
    for description, (holds, keys) in _RANGES.items():
        for key in filter(defaults.__contains__, keys.split()):
            value = getattr(arguments, key)
            is_allowed = defaults[key] is None if value is None else holds(value)
            if not is_allowed:
                raise UserError(f"{key} must be {description}, not {value}.")
