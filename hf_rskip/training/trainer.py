"""The Trainer for translation: token-budget batches, a chunked loss, and scores of translations."""

from collections.abc import Callable

import torch
from datasets import Dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType, fully_shard
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, TrainOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..data.text.batching import TokenBatchSampler
from ..data.text.columns import read_column
from ..errors import UserError
from ..models import RSkipForConditionalGeneration
from ..probing.batches import Batch, training_sentences
from .chunked_loss import chunked_cross_entropy
from .recipe_trainer import RecipeTrainer


class RSkipTrainer(RecipeTrainer):
    """[`RecipeTrainer`] for datasets with `source_length` and `target_length` columns.

    Training batches are those of [`TokenBatchSampler`]. An evaluation adds the scores of translations to the loss. Logs
    gain `target_tokens_per_second`, over all processes and without the time of evaluations.

    Args:
        compute_translation_metrics: scores of the model in evaluation mode, by name; called on every process. Needed
            for evaluations with `predict_with_generate`.
        kwargs: of `Trainer`; `args` are [`RSkipTrainingArguments`].

    Raises:
        [`UserError`]: if `train_dataset` has no such columns, if the scores of an evaluation are missing or given as
            `compute_metrics`, or if the arguments do not go with FSDP.
    """

    throughput_name = "target_tokens_per_second"

    def __init__(
        self, *, compute_translation_metrics: Callable[[PreTrainedModel], dict[str, float]] | None = None, **kwargs
    ):
        super().__init__(**kwargs)
        self._check_arguments(compute_translation_metrics)
        # So that loading the best checkpoint does not report the tied weights as missing.
        self.model._keys_to_ignore_on_save = list(self.model.all_tied_weights_keys)
        # The Trainer turns the cache off in the configuration; checkpoints are to have it on.
        self.model.config.use_cache = True
        self.compute_translation_metrics = compute_translation_metrics
        if self.is_fsdp_enabled:
            self._check_fsdp()
        if self.args.chunked_cross_entropy and self.compute_loss_func is None:
            self.compute_loss_func = self._chunked_loss
            # The loss needs hidden states: hooks installed in the first step would break the graph of a compiled model.
            maybe_install_capturing_hooks(self.model)

    def _check_arguments(self, compute_translation_metrics: Callable | None) -> None:
        columns = () if self.train_dataset is None else getattr(self.train_dataset, "column_names", None)
        if columns is None:
            raise UserError(f"train_dataset must be a datasets.Dataset, not a {type(self.train_dataset).__name__}.")
        for name in ("source_length", "target_length"):
            if columns and name not in columns:
                raise UserError(f"train_dataset has no column {name}, by which sentences are put into batches.")
        if self.compute_metrics is not None:
            raise UserError(
                "compute_metrics is not called: give compute_translation_metrics, which scores translations."
            )
        evaluates = self.args.eval_strategy != IntervalStrategy.NO
        if evaluates and self.args.predict_with_generate and compute_translation_metrics is None:
            raise UserError("predict_with_generate needs compute_translation_metrics, which translates and scores.")

    def _check_fsdp(self) -> None:
        if self.args.probe_steps:
            raise UserError("probe_steps does not go with FSDP: probe the checkpoints by `hf-rskip probe`.")
        if self.args.ema_decay is not None:
            raise UserError("ema_decay does not go with FSDP: average_checkpoints does.")
        if self.args.average_checkpoints is not None:
            kind = self.accelerator.state.fsdp_plugin.state_dict_type
            if kind != StateDictType.FULL_STATE_DICT:
                raise UserError(f"average_checkpoints needs fsdp_state_dict_type FULL_STATE_DICT, not {kind.name}.")

    def train(self, *args, **kwargs) -> TrainOutput:
        if self.is_fsdp_enabled:
            self._shard_tied_embeddings()
        return super().train(*args, **kwargs)

    def _shard_tied_embeddings(self) -> None:
        """Shards the modules that share a weight together, as FSDP2 demands; accelerate finds two of the three."""
        encoder, decoder = self.model.model.encoder, self.model.model.decoder
        embeddings = [encoder.embed_tokens, decoder.embed_tokens, self.model.lm_head]
        tied = [module for module in embeddings if module.weight is decoder.embed_tokens.weight]
        if isinstance(decoder.embed_tokens, FSDPModule):
            return
        plugin = self.accelerator.state.fsdp_plugin
        fully_shard(
            tied,
            reshard_after_forward=False,
            mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
            offload_policy=plugin.cpu_offload,
        )

    def make_sampler(self) -> TokenBatchSampler:
        """Creates the sampler of this process's training batches."""
        whole_steps = self.args.global_batch_tokens is not None
        return TokenBatchSampler(
            read_column(self.train_dataset, "source_length"),
            read_column(self.train_dataset, "target_length"),
            max_tokens=self.args.global_batch_tokens if whole_steps else self.args.per_device_train_batch_tokens,
            shares=self.args.gradient_accumulation_steps if whole_steps else None,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TokenBatchSampler:
        return self.make_sampler()

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {**inputs, "use_cache": False}
        if "labels" in inputs and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
            # Losses outside the model take the labels out.
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        if self.compute_loss_func == self._chunked_loss and "labels" in inputs:
            inputs |= {"logits_to_keep": 1, "output_hidden_states": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _chunked_loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        head = self.accelerator.unwrap_model(self.model).lm_head
        hidden = outputs.decoder_hidden_states[-1]
        total = chunked_cross_entropy(hidden, head.weight, head.bias, labels, self.args.label_smoothing_factor)
        return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    def probe_batch(self) -> Batch:
        return training_sentences(self.data_collator, self.train_dataset)

    def describe_batch(self, inputs: dict) -> str:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        source, target = mask.sum(1), (inputs["labels"] != -100).sum(1)
        description = (
            f"{len(source)} pairs of {source.min()} to {source.max()} source tokens and {target.min()} to "
            f"{target.max()} target tokens"
        )
        if self.processing_class is None:
            return description
        first = self.processing_class.decode(inputs["input_ids"][0], skip_special_tokens=True)
        return f"{description}, the first {first!r}"

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.compute_translation_metrics is not None:
            scores = self.compute_translation_metrics(self.whole_model())
            output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
        return output

    def whole_model(self) -> PreTrainedModel:
        """Returns the model without the wrappers of accelerate, in evaluation mode; to be called on every process.

        Under FSDP a copy with all weights: processes that translate different sentences, and so differ in their number
        of steps, would wait for each other's weights for ever.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_fsdp_enabled:
            return model.eval()
        whole = RSkipForConditionalGeneration(model.config)
        whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        whole.generation_config = model.generation_config
        return whole.to(self.args.device).eval()
