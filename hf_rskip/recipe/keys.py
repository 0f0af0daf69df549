"""The supported keys of a recipe, and which of them may change when a run is resumed.

A key of Transformers that stands in none of the three sets is refused: it would have no effect, or a wrong one.
"""

from dataclasses import fields

from .images import ImageModelArguments
from .translation import GenerationArguments, ModelArguments


def _names(*parts: type | str) -> frozenset[str]:
    return frozenset(
        name
        for part in parts
        for name in (part.split() if isinstance(part, str) else [field.name for field in fields(part)])
    )


MUST_STAY = _names(
    ModelArguments,
    ImageModelArguments,
    # the model and the data
    "task model_name_or_path dataset_name dataset_config_name source_lang target_lang image_column label_column",
    "train_files validation_files train_split validation_split validation_size max_train_samples max_eval_samples",
    "max_characters remove_duplicates max_source_length max_target_length max_length_ratio",
    "tokenizer_name tokenizer_train_samples lowercase",
    "streaming shuffle_buffer_size image_size crop_pct image_mean image_std crop_padding random_resized_crop",
    "horizontal_flip",
    # the optimizer steps
    "seed data_seed full_determinism per_device_train_batch_size per_device_train_batch_tokens global_batch_tokens",
    "gradient_accumulation_steps pad_to_multiple_of dataloader_drop_last",
    "learning_rate lr_scheduler_type lr_scheduler_kwargs lr_milestones lr_gamma warmup_steps",
    "optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon momentum nesterov max_grad_norm",
    "label_smoothing_factor ema_decay bf16 fp16",
    # the choice of the best model
    "metric_for_best_model predict_with_generate generation_num_beams bleu_tokenize",
)
"""Must be the same in a resumed run, which would ignore another value or become a mixture of two runs."""

MAY_CHANGE = _names(
    GenerationArguments,
    "num_train_epochs max_steps early_stopping_patience load_best_model_at_end",
    "test_files test_split max_predict_samples",
    "average_checkpoints average_checkpoints_by loss_spike_factor loss_spike_window probe_steps",
    "logging_strategy logging_steps logging_first_step eval_strategy eval_steps eval_delay eval_on_start",
    "save_strategy save_steps save_total_limit save_only_model",
    "attn_implementation chunked_cross_entropy channels_last tf32 use_cpu",
    "torch_compile torch_compile_backend torch_compile_mode",
    "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs",
)
"""May change in a resumed run, which follows the new value, says so, and keeps both in its record."""

CANNOT_MATTER = _names(
    "output_dir resume_from_checkpoint preprocessing_num_workers per_device_eval_batch_size save_on_each_node",
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
    "log_level log_level_replica disable_tqdm report_to run_name",
    "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision",
)
"""Change neither the trained model nor its record."""

_SUPPORTED = MUST_STAY | MAY_CHANGE | CANNOT_MATTER

_KEYS_OF_REASON = {
    "there are no Liger kernels for these models": "use_liger_kernel liger_kernel_config",
    "training needs no cache, and the finished model has one": "use_cache",
    "it is for instruction tuning": "neftune_noise_alpha",
    "a smaller batch would be another training": "auto_find_batch_size",
    "low-rank optimizers are not supported": "optim_target_modules",
    "the loss is always the mean over all devices": "average_tokens_across_devices",
    "it only slows training down": "torch_empty_cache_steps",
    "evaluations run in the precision of the weights": "bf16_full_eval fp16_full_eval",
    "the main process alone logs": "log_on_each_node",
    "a loss that is not finite always ends the run": "logging_nan_inf_filter",
    "it would count padding": "include_num_input_tokens_seen",
    "it is for Trackio alone": "project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "evaluations predict in their own way": (
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics"
    ),
    "SIGTERM always saves a checkpoint": "enable_jit_checkpoint",
    "it follows from metric_for_best_model": "greater_is_better",
    "a resumed run always goes on where it was": "ignore_data_skip restore_callback_states_from_checkpoint",
    "launch by `--accelerate_config`": "accelerator_config parallelism_config fsdp fsdp_config local_rank",
    "DeepSpeed is not supported": "deepspeed",
    "the order of batches is part of the run": "dataloader_in_order",
    "the data are made for the model": "remove_unused_columns label_names",
    "batches are always drawn at random, those of translation by length": "train_sampling_strategy length_column_name",
    "a loss that is not finite always ends the run and names the batch": "debug",
    "memory is not measured": "skip_memory_metrics",
    "`hf-rskip train` always trains": "do_train",
    "eval_strategy says when to evaluate": "do_eval",
    "`hf-rskip train` always ends with the test split": "do_predict",
    "batches are always drawn by length": "sortish_sampler",
    "max_new_tokens, max_len_a and max_len_b say how long a translation may be": "generation_max_length",
    "num_beams, length_penalty and the other generation keys say how to translate": "generation_config",
}
REFUSED = {key: reason for reason, keys in _KEYS_OF_REASON.items() for key in keys.split()}
"""Keys of Transformers that a recipe cannot have, with the reason."""

REFUSED_BY_TASK = {
    "translation": {
        "per_device_train_batch_size": "per_device_train_batch_tokens is the budget of a batch",
        "dataloader_drop_last": "no batch is incomplete",
    },
    "image-classification": {},
}


def is_supported(key: str, task: str) -> bool:
    """Whether a recipe of the task may have the key."""
    return key in _SUPPORTED and key not in REFUSED_BY_TASK[task]


def why_refused(key: str, task: str) -> str:
    """Returns the reason why a key of Transformers is not supported, for the end of a sentence."""
    return {**REFUSED, **REFUSED_BY_TASK[task]}.get(key, "this version of hf_rskip does not know it")
