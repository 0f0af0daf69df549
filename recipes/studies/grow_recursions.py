"""What a trained K = 1 model loses when it gets a second recursion, and what a short fine-tuning makes of it.

    hf-rskip train recipes/quickstart.yaml --skip_recursions 1 --num_train_epochs 10 --learning_rate 1.5e-3 \\
        --warmup_steps 300 --output_dir outputs/k1
    python recipes/studies/grow_recursions.py outputs/k1 --gains 1 3 10 30 100 --max_steps 60

Prints a line for K = 1 as it is, and one for each gain a of `hf_rskip.conversion.growth.grow_recursions` (1 is what
plain new norms would be): cross-entropy (nats a token) and greedy BLEU on the validation split; the gradient that
reaches a before the first step (summed over the features of a sublayer, mean of the absolute values over the
sublayers); loss and BLEU after fine-tuning, with the same steps and batches for all; mean and standard deviation of
the added gains then.

| start           | loss   | BLEU  | gradient | loss after | BLEU after | gain after      |
|-----------------|--------|-------|----------|------------|------------|-----------------|
| K = 1           | 0.0888 | 98.71 |          | 0.0974     | 98.18      |                 |
| K = 2, gain 1   | 2.2380 | 0.11  | 5.3e-01  | 0.3067     | 70.99      | 1.005 ± 0.005   |
| K = 2, gain 3   | 0.1896 | 89.63 | 6.9e-03  | 0.1081     | 97.71      | 3.001 ± 0.002   |
| K = 2, gain 10  | 0.0966 | 97.91 | 1.1e-04  | 0.0923     | 98.50      | 10.000 ± 0.002  |
| K = 2, gain 30  | 0.0894 | 98.79 | 7.4e-06  | 0.0893     | 99.05      | 30.000 ± 0.002  |
| K = 2, gain 100 | 0.0887 | 98.65 | 8.7e-07  | 0.0882     | 99.11      | 100.000 ± 0.002 |

60 steps, peak learning rate 5e-4, Adam started anew, seed 1; 500 sentences, BLEU
nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0; x86-64 CPU, one thread, torch 2.13.0, transformers 5.23.0.
With seed 2 (of the fine-tuning) the last columns of K = 1 and gains 10 and 100 are 0.0928, 0.0925, 0.0914 and 98.75,
98.49, 98.59: differences of 0.005 nats or 0.6 BLEU between rows are noise.

The rows were run in three processes at a time, each row from the same seed.

What it shows: plain norms undo the training; from a gain of 10 on little is lost, and it is back after 60 steps. What
it also shows: the gains did not move, so that these models stay close to K = 1, and the larger the gain the closer.
What a second recursion is good for in fine-tuning, over longer runs or with a learning rate of its own for the gains,
was not measured.
"""

import argparse
import copy
import tempfile

import numpy as np
import torch
from transformers import DataCollatorForSeq2Seq, set_seed

from hf_rskip.conversion.growth import grow_recursions
from hf_rskip.data.text.cleaning import clean_corpus
from hf_rskip.data.text.corpora import hold_out, load_translation_dataset
from hf_rskip.data.text.preprocessing import filter_by_length, tokenize_corpus
from hf_rskip.decoding.loading import load_model
from hf_rskip.evaluation.evaluate import evaluate_translation, split_languages
from hf_rskip.recipe.parsing import parse_recipe
from hf_rskip.training.progress import TrainingLog
from hf_rskip.training.trainer import RSkipTrainer


def added_gains(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith("_skip.norm.0.weight")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a trained model with K = 1")
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--gains", type=float, nargs="+", default=[1, 3, 10, 30, 100])
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    folder = tempfile.TemporaryDirectory()
    options = {
        **{name: getattr(args, name) for name in ("max_steps", "learning_rate", "seed")},
        **{"warmup_steps": args.max_steps // 10, "output_dir": folder.name, "report_to": "none"},
        **{"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": "false", "disable_tqdm": "true"},
        "early_stopping_patience": "null",
    }
    recipe = parse_recipe(args.recipe, [f"--{name}={value}" for name, value in options.items()])
    trained, tokenizer = load_model(args.model)
    corpus = load_translation_dataset(recipe.data, ("train", "validation"))
    corpus["train"], _ = clean_corpus(corpus["train"], recipe.data)
    if recipe.data.validation_size is not None:
        corpus["train"], corpus["validation"] = hold_out(corpus["train"], recipe.data)
    splits = {split: tokenize_corpus(corpus[split], tokenizer, recipe.data) for split in corpus}
    splits["train"], _ = filter_by_length(splits["train"], recipe.data)
    splits["validation"] = splits["validation"].select(np.argsort(splits["validation"]["target_length"]))
    sentences = split_languages(corpus["validation"], recipe.data.source_lang, recipe.data.target_lang)

    def scores(trainer) -> list[float]:
        smoother, trainer.label_smoother = trainer.label_smoother, None  # the plain cross-entropy
        loss = trainer.evaluate()["eval_loss"]
        trainer.label_smoother = smoother
        return [loss, evaluate_translation(trainer.model, tokenizer, *sentences, num_beams=1)[0]["bleu"]]

    def gradient_of_gain(trainer) -> float:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model(**batch).loss.backward()
        gradient = np.mean([gain.grad.sum().abs().item() for gain in added_gains(trainer.model)])
        trainer.model.zero_grad()
        return gradient

    print("| start | loss | BLEU | gradient | loss after | BLEU after | gain after |\n" + "|---" * 7 + "|")
    for gain in [None, *args.gains]:
        model = copy.deepcopy(trained) if gain is None else grow_recursions(trained, 2, gain).to(trained.device)
        set_seed(args.seed)
        trainer = RSkipTrainer(
            model=model,
            args=copy.deepcopy(recipe.training),
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
        )
        trainer.remove_callback(TrainingLog)  # the table is all there is to print
        model.eval()
        before, gradient = scores(trainer), float("nan") if gain is None else gradient_of_gain(trainer)
        trainer.train()
        after = scores(trainer)
        gains = torch.cat(added_gains(model)) if gain is not None else torch.full((2,), torch.nan)
        start = "K = 1" if gain is None else f"K = 2, gain {gain:g}"
        print(
            f"| {start} | {before[0]:.4f} | {before[1]:.2f} | {gradient:.1e} | {after[0]:.4f} | {after[1]:.2f} | "
            f"{gains.mean():.3f} ± {gains.std():.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
