"""Time to translate a test set with beam search, relative to Transformers' Marian with the same weights.

    python recipes/benchmarks/decoding.py MODEL DATASET --output decoding.csv

MODEL is a trained model of this package that `hf-rskip export --format marian` takes. As a `MarianMTModel` it
translates as its documentation shows: batches of `--batch_size` sentences in the order of the corpus, padded, through
`generate`. The model itself goes through `hf_rskip.decoding.translate`. Both tokenize,
search with the same options, and decode; they take turns for `--rounds` rounds. Reported are median seconds, the median
of the ratio Marian / ours, above 1 where ours is faster, and how many translations agree token by token.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers
from report import append_csv, describe_run, print_row

from hf_rskip.conversion.marian import create_marian_model
from hf_rskip.data.text.arguments import DataArguments
from hf_rskip.data.text.corpora import load_translation_dataset
from hf_rskip.decoding.loading import load_model
from hf_rskip.decoding.translate import search


def translate_stock(marian, tokenizer, sentences, batch_size, **options):
    tokens = []
    for start in range(0, len(sentences), batch_size):
        inputs = tokenizer(sentences[start : start + batch_size], return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = marian.generate(**inputs.to(marian.device), **options)
        tokens += output.tolist()
        tokenizer.batch_decode(output, skip_special_tokens=True)
    return tokens


def translate_ours(model, tokenizer, sentences, max_batch_tokens, **options):
    tokens = [None] * len(sentences)
    for batch, _, output in search(model, tokenizer, sentences, max_batch_tokens, **options):
        tokenizer.batch_decode(output, skip_special_tokens=True)
        for index, row in zip(batch, output.tolist(), strict=True):
            tokens[index] = row
    return tokens


def until_end(rows, eos):
    """The tokens of each translation up to its end token; beam search fills up with that one where padding is 0."""
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model with K = 1")
    parser.add_argument("dataset", help="folder or Hub id with a `translation` column and a test split")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32, help="sentences in a batch of Marian")
    parser.add_argument("--max_batch_tokens", type=int, default=4096, help="of translate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_model(args.model)
    marian = create_marian_model(model).to(model.device)
    data = DataArguments(
        dataset_name=args.dataset,
        source_lang=model.config.source_lang,
        target_lang=model.config.target_lang,
        max_predict_samples=args.sentences,
    )
    corpus = load_translation_dataset(data, splits=("test",))["test"]
    sentences = [pair[data.source_lang] for pair in corpus["translation"]]
    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    options |= {"length_penalty": 1.0, "early_stopping": False}
    ways = {
        "marian": lambda: translate_stock(marian, tokenizer, sentences, args.batch_size, **options),
        "hf_rskip": lambda: translate_ours(model, tokenizer, sentences, args.max_batch_tokens, **options),
    }
    # On a CPU the time of this process alone, whatever else the machine does.
    clock = time.process_time if model.device.type == "cpu" and args.threads == 1 else time.perf_counter
    seconds, tokens = {way: [] for way in ways}, {}
    for number in range(args.rounds):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            start = clock()
            rows = ways[way]()
            seconds[way].append(clock() - start)
            tokens[way] = until_end(rows, tokenizer.eos_token_id)

    ratio = statistics.median(peer / own for peer, own in zip(seconds["marian"], seconds["hf_rskip"], strict=True))
    agree = sum(peer == own for peer, own in zip(tokens["marian"], tokens["hf_rskip"], strict=True))
    row = {
        "sentences": len(sentences),
        "tokens": sum(len(row) for row in tokens["hf_rskip"]),
        "agree": agree,
        **{f"{way}_seconds": f"{statistics.median(times):.2f}" for way, times in seconds.items()},
        "ratio": f"{ratio:.2f}",
        "num_beams": args.num_beams,
        "batch_size": args.batch_size,
        "max_batch_tokens": args.max_batch_tokens,
        "rounds": args.rounds,
        **describe_run(model.device.type),
    }
    print_row(row)
    append_csv([row], args.output)


if __name__ == "__main__":
    main()
