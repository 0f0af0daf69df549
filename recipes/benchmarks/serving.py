"""Target tokens a second of processor time with each engine that runs a model, on one thread.

    hf-rskip export MODEL FOLDER/ctranslate2 --format ctranslate2
    hf-rskip export MODEL FOLDER/ctranslate2-int8 --format ctranslate2 --quantization int8
    hf-rskip export MODEL FOLDER/onnx
    hf-rskip export MODEL FOLDER/onnx-int8 --quantization int8
    python recipes/benchmarks/serving.py MODEL DATASET --exports FOLDER --output serving.csv --plot serving.png

MODEL is one that `hf-rskip convert fold` made where K > 1. The engines are `torch`, which runs MODEL itself, and
those of which FOLDER has an export of that name: all of them, or those that `--engines` names. They translate the
first sentences of the test set with the same options, and take turns for `--rounds` rounds. Seconds are of the
processor, with tokenizing and decoding of the text; the median is reported, and the median of the ratio first engine
/ engine of each round, above 1 where the engine is faster. `same` is the share of translations that are the first
engine's token by token. A beam search ends a sentence at as many finished translations as there are beams
(`early_stopping`), as it does in CTranslate2.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers
from decoding import translate_ours, until_end
from report import append_csv, describe_run, print_table

from hf_rskip.data.text.arguments import DataArguments
from hf_rskip.data.text.corpora import load_translation_dataset
from hf_rskip.decoding.loading import load_config, load_translator
from hf_rskip.evaluation.bleu import choose_tokenizer
from hf_rskip.evaluation.evaluate import split_languages
from hf_rskip.evaluation.metric import TranslationMetric

ENGINES = ("torch", "ctranslate2", "ctranslate2-int8", "onnx", "onnx-int8")


def find_folders(model, exports, asked):
    """The folder of each engine; one that is asked for must be there."""
    folders = {name: Path(model) if name == "torch" else Path(exports or "", name) for name in asked or ENGINES}
    missing = [name for name, folder in folders.items() if name != "torch" and not (exports and folder.is_dir())]
    if asked and missing:
        raise SystemExit(f"{missing[0]} needs an export in {str(folders[missing[0]])!r}: give --exports")
    return {name: str(folder) for name, folder in folders.items() if name not in missing}


def plot(rows, path):
    """A bar of tokens a second for each engine."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.style.use("tableau-colorblind10")
    figure, axis = plt.subplots(figsize=(6, 0.6 + 0.4 * len(rows)), layout="constrained")
    bars = axis.barh([row["engine"] for row in rows], [float(row["tokens_per_second"]) for row in rows])
    axis.bar_label(bars, [f"{row['tokens_per_second']} ({row['ratio']})" for row in rows], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.4)
    axis.set_xlabel(f"target tokens a second of processor time (ratio to {rows[0]['engine']})")
    figure.savefig(path)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument("dataset", help="folder or Hub id with a `translation` column and a test split")
    parser.add_argument("--exports", type=Path, help="folder that has a folder for each other engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: torch and all that --exports has")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--length_penalty", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_batch_tokens", type=int, default=4096, help="of translate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    parser.add_argument("--plot", type=Path, help="file of a picture")
    args = parser.parse_args()

    if torch.accelerator.is_available():
        raise SystemExit("This measures a CPU: hide the GPU (CUDA_VISIBLE_DEVICES=)")
    folders = find_folders(args.model, args.exports, args.engines)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    config = load_config(args.model)
    data = DataArguments(
        dataset_name=args.dataset,
        source_lang=config.source_lang,
        target_lang=config.target_lang,
        max_predict_samples=args.sentences,
    )
    corpus = load_translation_dataset(data, splits=("test",))["test"]
    sources, references = split_languages(corpus, data.source_lang, data.target_lang)
    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    if args.num_beams > 1:
        options |= {"length_penalty": args.length_penalty, "early_stopping": True}

    engines = {name: load_translator(folder) for name, folder in folders.items()}
    seconds, tokens = {name: [] for name in engines}, {}
    for number in range(args.rounds):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            rows = translate_ours(*engines[name], sources, args.max_batch_tokens, **options)
            seconds[name].append(time.process_time() - start)
            tokens[name] = [row[1:] for row in until_end(rows, engines[name][1].eos_token_id)]

    first, tokenize, rows = next(iter(engines)), choose_tokenizer(None, data.target_lang), []
    for name, (_, tokenizer) in engines.items():
        texts = tokenizer.batch_decode(tokens[name], skip_special_tokens=True)
        scores = TranslationMetric().compute(predictions=texts, references=references, tokenize=tokenize)
        taken, count = statistics.median(seconds[name]), sum(map(len, tokens[name]))
        ratio = statistics.median(base / own for base, own in zip(seconds[first], seconds[name], strict=True))
        same = sum(ours == theirs for ours, theirs in zip(tokens[name], tokens[first], strict=True))
        rows.append(
            {
                "engine": name,
                "seconds": f"{taken:.2f}",
                "tokens": str(count),
                "tokens_per_second": f"{count / taken:.1f}",
                "ratio": f"{ratio:.2f}",
                "same": f"{same / len(sources):.3f}",
                "bleu": f"{scores['bleu']:.2f}",
            }
        )
    about = {"sentences": len(sources), **{name: getattr(args, name) for name in ("num_beams", "length_penalty")}}
    about |= {name: getattr(args, name) for name in ("max_new_tokens", "max_batch_tokens", "rounds")}
    about |= describe_run("cpu")
    print_table(rows, about)
    append_csv([row | about for row in rows], args.output)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
