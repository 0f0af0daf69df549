"""Target tokens a second of training, against the stock Seq2SeqTrainer with Transformers' Marian of the same shape.

    python recipes/benchmarks/training_throughput.py recipes/multi30k-en-de/cpu-small.yaml --dataset_name FOLDER

Both train a post-LN model (K = 1) of the recipe's dimensions on the recipe's data with its tokenizer and smoothing:
`marian` in random batches of `--batch_size` sentences, as the stock Trainer makes them, `hf_rskip` in its own batches
of `--batch_tokens` padded tokens. Padding does not count. They take turns for `--rounds` rounds of `--steps` steps in
one process; reported are the medians, and the median over the rounds of the ratio hf_rskip / marian.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from report import append_csv, describe_run, print_table
from transformers import (
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from hf_rskip.data.text.corpora import load_translation_dataset
from hf_rskip.data.text.preprocessing import filter_by_length, tokenize_corpus
from hf_rskip.data.text.tokenizer import train_tokenizer
from hf_rskip.models import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.recipe.parsing import parse_recipe
from hf_rskip.recipe.translation import RSkipTrainingArguments
from hf_rskip.training.trainer import RSkipTrainer

DIMENSIONS = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "activation_function",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "max_position_embeddings",
)


class Clock(TrainerCallback):
    """The times at the ends of some steps."""

    def __init__(self, *steps: int, now):
        self.steps, self.now, self.times = steps, now, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(self.now())


class CountingCollator:
    """Counts target tokens and cells of the batches that it makes."""

    def __init__(self, collator):
        self.collator, self.tokens, self.cells = collator, [], []

    def __call__(self, examples):
        batch = self.collator(examples)
        self.tokens.append(int((batch["labels"] != -100).sum()))
        self.cells.append(batch["labels"].numel())
        return batch


def read_data(recipe):
    """The tokenizer and the tokenized training pairs of a recipe."""
    data = recipe.data
    corpus = load_translation_dataset(data, splits=("train",))["train"]
    sentences = (text for pair in corpus["translation"] for text in (pair[data.source_lang], pair[data.target_lang]))
    tokenizer = train_tokenizer(
        sentences, recipe.model.vocab_size, data.lowercase, model_max_length=recipe.model.max_position_embeddings
    )
    return tokenizer, filter_by_length(tokenize_corpus(corpus, tokenizer, data), data)[0]


def create_models(recipe, tokenizer):
    fields = {name: getattr(recipe.model, name) for name in DIMENSIONS}
    fields |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    fields |= {"eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    marian = MarianConfig(**fields, scale_embedding=True, tie_word_embeddings=True)
    ours = RSkipConfig(**fields, bos_token_id=None, skip_type="rskip", skip_recursions=1)
    return {
        "marian": lambda: MarianMTModel(marian),
        "hf_rskip": lambda: RSkipForConditionalGeneration(ours),
    }


def measure(name, create_model, recipe, tokenizer, dataset, args, folder, now=time.perf_counter):
    """Target tokens a second, and the part of the cells that are tokens."""
    set_seed(args.seed)
    model = create_model()
    common = {
        "output_dir": folder,
        "max_steps": args.warmup + args.steps,
        "learning_rate": 1e-4,
        "label_smoothing_factor": recipe.training.label_smoothing_factor,
        "bf16": args.bf16,
        "torch_compile": args.compile,
        "save_strategy": "no",
        "logging_steps": 1000,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": args.seed,
    }
    clock = Clock(args.warmup, args.warmup + args.steps, now=now)
    collator = CountingCollator(DataCollatorForSeq2Seq(tokenizer, model=model))
    if name == "marian":
        training = Seq2SeqTrainingArguments(**common, per_device_train_batch_size=args.batch_size)
        columns = dataset.remove_columns(["source_length", "target_length"])
        trainer_class = Seq2SeqTrainer
    else:
        training = RSkipTrainingArguments(
            **common,
            per_device_train_batch_tokens=args.batch_tokens,
            eval_strategy="no",
            load_best_model_at_end=False,
        )
        columns, trainer_class = dataset, RSkipTrainer
    trainer = trainer_class(
        model=model, args=training, data_collator=collator, train_dataset=columns, callbacks=[clock]
    )
    trainer.train()
    start, end = clock.times
    measured = slice(args.warmup, args.warmup + args.steps)
    tokens = sum(collator.tokens[measured])
    return tokens / (end - start), tokens / sum(collator.cells[measured])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="of translation; further --key value are its keys")
    parser.add_argument("--batch_size", type=int, default=64, help="sentences in a batch of the stock Trainer")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="padded tokens in a batch of hf_rskip")
    parser.add_argument("--steps", type=int, default=40, help="measured steps a round")
    parser.add_argument("--warmup", type=int, default=4, help="steps before those")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    args, rest = parser.parse_known_args()

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe(args.recipe, [*rest, "--output_dir", folder])
        tokenizer, dataset = read_data(recipe)
        for _ in range(args.rounds):
            for name, create_model in create_models(recipe, tokenizer).items():
                result = measure(name, create_model, recipe, tokenizer, dataset, args, folder)
                results.setdefault(name, []).append(result)
    speeds = {name: [speed for speed, _ in rounds] for name, rounds in results.items()}
    rows = [
        {
            "trainer": name,
            "target_tokens_per_s": f"{statistics.median(speeds[name]):.0f}",
            "not_padding": f"{statistics.median(part for _, part in rounds):.3f}",
            "ratio": f"{statistics.median(x / y for x, y in zip(speeds[name], speeds['marian'], strict=True)):.3f}",
        }
        for name, rounds in results.items()
    ]
    about = {
        "dataset": Path(recipe.data.dataset_name).name,
        **{name: value for name, value in vars(args).items() if name != "output"},
        **describe_run("cuda" if torch.cuda.is_available() else "cpu"),
    }
    print_table(rows, about)
    append_csv([row | about for row in rows], args.output)


if __name__ == "__main__":
    main()
