"""The training keys of translation."""

import math
from dataclasses import dataclass

from transformers import SchedulerType, Seq2SeqTrainingArguments
from transformers.hf_argparser import HfArg

from ..errors import UserError
from ..evaluation.bleu import create_bleu
from ..models import RSkipConfig
from ..ranges import check_ranges
from .training import CommonTrainingArguments, make_model_arguments

# Set by the tokenizer and the data, or fixed.
_NOT_IN_RECIPES = {
    *("decoder_vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("is_encoder_decoder", "use_cache", "source_lang", "target_lang"),
}

ModelArguments = make_model_arguments("ModelArguments", RSkipConfig, _NOT_IN_RECIPES)


@dataclass
class GenerationArguments:
    """Keys of generation, saved in `generation_config.json`."""

    num_beams: int = HfArg(default=5, help="Number of beams; 1 is greedy search.")
    length_penalty: float = HfArg(default=1.0, help="Exponent of the length by which scores are divided.")
    gnmt_length_penalty: float | None = HfArg(
        default=None, help="In place of length_penalty: alpha of ((5 + length) / 6) ** alpha."
    )
    max_new_tokens: int | None = HfArg(
        default=None, help="Longest translation, in tokens; max_target_length unless this or max_len_a or _b is given."
    )
    max_len_a: float | None = HfArg(
        default=None, help="A sentence of n tokens gets at most max_len_a * n + max_len_b tokens."
    )
    max_len_b: int | None = HfArg(default=None, help="See max_len_a.")
    early_stopping: bool = HfArg(default=False, help="Whether a beam search ends when num_beams candidates have ended.")
    no_repeat_ngram_size: int = HfArg(default=0, help="Longest n-gram that may occur once only; 0 is off.")

    def __post_init__(self):
        check_ranges(self)
        if self.gnmt_length_penalty is not None and self.length_penalty != 1.0:
            raise UserError("length_penalty and gnmt_length_penalty are two forms of one thing: give one of them.")
        if self.num_beams == 1:
            for key in ("length_penalty", "gnmt_length_penalty", "early_stopping"):
                if getattr(self, key) != GenerationArguments.__dataclass_fields__[key].default:
                    raise UserError(f"{key} has no effect with num_beams 1, which is greedy search.")


@dataclass
class RSkipTrainingArguments(CommonTrainingArguments, Seq2SeqTrainingArguments):
    """Training keys of translation, with its usual defaults."""

    per_device_train_batch_tokens: int = HfArg(
        default=4096, help="Budget of a batch on one device: padded tokens of the source, and of the target."
    )
    chunked_cross_entropy: bool = HfArg(
        default=True, help="Compute the loss in chunks, without the logits of a whole batch: less memory and time."
    )
    global_batch_tokens: int | None = HfArg(
        default=None,
        help="Budget of an optimizer step over all processes: the same sentences form a step on any number of "
        "them. Decides gradient_accumulation_steps, so that no device exceeds its budget by more than a sentence.",
    )
    pad_to_multiple_of: int = HfArg(
        default=1, help="Pad batches to such lengths, which tensor cores and compiled kernels divide evenly."
    )
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="Whether DDP looks for parameters that a step did not use: there are none."
    )
    attn_implementation: str = HfArg(
        default="sdpa", help="eager, sdpa, flash_attention_2, flex_attention, or a kernel of the Hub."
    )
    bleu_tokenize: str | None = HfArg(
        default=None,
        help="sacreBLEU's `tokenize`, by default that of the target language; `none` for text that is tokenized "
        "already.",
    )
    learning_rate: float = HfArg(default=5e-4, help="Peak learning rate, reached after warmup_steps.")
    lr_scheduler_type: SchedulerType = HfArg(default=SchedulerType.INVERSE_SQRT, help="Learning-rate schedule.")
    warmup_steps: float = HfArg(
        default=0.1, help="Steps in which the learning rate rises to its peak, or this fraction of all."
    )
    adam_beta2: float = HfArg(default=0.98, help="Beta2 of Adam.")
    adam_epsilon: float = HfArg(default=1e-9, help="Epsilon of Adam.")
    label_smoothing_factor: float = HfArg(default=0.1, help="Label smoothing.")
    load_best_model_at_end: bool = HfArg(default=True, help="Whether to end with the best model.")
    metric_for_best_model: str = HfArg(default="bleu", help="By which metric the best model is chosen.")
    predict_with_generate: bool = HfArg(
        default=True, help="Whether evaluation during training translates, for BLEU and chrF."
    )
    generation_num_beams: int = HfArg(default=1, help="Number of beams of evaluation during training.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Sentences in an evaluation batch.")

    def __post_init__(self):
        super().__post_init__()
        if self.global_batch_tokens is not None:
            self._share_out_global_batch()
        if self.bleu_tokenize is not None:
            create_bleu(self.bleu_tokenize)
        if self.predict_with_generate:
            self.check_metric_for_best_model(("bleu", "chrf", "loss"))
        else:
            self.check_metric_for_best_model(("loss",), " without predict_with_generate")

    def _share_out_global_batch(self) -> None:
        steps = math.ceil(self.global_batch_tokens / (self.world_size * self.per_device_train_batch_tokens))
        if self.gradient_accumulation_steps not in (1, steps):
            raise UserError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} cannot be set with "
                "global_batch_tokens, which decides it: set per_device_train_batch_tokens, the budget of a device."
            )
        self.gradient_accumulation_steps = steps
