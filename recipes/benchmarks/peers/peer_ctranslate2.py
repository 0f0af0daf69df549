"""Time to translate a test set with beam search on one thread, relative to CTranslate2 with the same weights in fp32.

    python recipes/benchmarks/peers/peer_ctranslate2.py MODEL DATASET --environment FOLDER --output decoding_peers.csv

MODEL is as in `decoding.py`. CTranslate2 is installed into an environment of its own at FOLDER and gets the weights of
the same MarianMTModel. The two take turns for `--rounds` rounds. Seconds are of the processor, with tokenizing and
decoding of the text; the ratio CTranslate2 / ours is above 1 where ours is faster.

CTranslate2 stops at as many finished translations as there are beams; ours does the same here (`early_stopping`).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch
from environments import Worker, create_environment

sys.path.append(str(Path(__file__).parent.parent))
from decoding import translate_ours, until_end
from report import append_csv, describe_run, print_row

from hf_rskip.conversion.marian import create_marian_model
from hf_rskip.data.text.arguments import DataArguments
from hf_rskip.data.text.corpora import load_translation_dataset
from hf_rskip.decoding.loading import load_model


def save_marian(marian, tokenizer, folder):
    """What the worker reads."""
    weights = {name: tensor.numpy() for name, tensor in marian.state_dict().items()}
    for part in ("encoder", "decoder"):  # sinusoids, which a checkpoint need not hold
        weights[f"model.{part}.embed_positions.weight"] = getattr(marian.model, part).embed_positions.weight.numpy()
    numpy.savez(folder / "weights.npz", **weights)
    (folder / "config.json").write_text(marian.config.to_json_string())
    vocabulary = tokenizer.convert_ids_to_tokens(range(marian.config.vocab_size))
    (folder / "tokens.json").write_text(json.dumps(vocabulary))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model with K = 1")
    parser.add_argument("dataset", help="folder or Hub id with a `translation` column and a test split")
    parser.add_argument("--environment", type=Path, required=True, help="folder of the peer's virtual environment")
    parser.add_argument("--requirement", default="ctranslate2==4.8.5")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32, help="sentences in a batch of CTranslate2, which sorts")
    parser.add_argument("--max_batch_tokens", type=int, default=4096, help="of translate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="CSV file to which the row is appended")
    args = parser.parse_args()

    torch.set_num_threads(1)
    python = create_environment(args.environment, [args.requirement])
    model, tokenizer = load_model(args.model)
    data = DataArguments(
        dataset_name=args.dataset,
        source_lang=model.config.source_lang,
        target_lang=model.config.target_lang,
        max_predict_samples=args.sentences,
    )
    corpus = load_translation_dataset(data, splits=("test",))["test"]
    sentences = [pair[data.source_lang] for pair in corpus["translation"]]

    def run_ours():
        start = time.process_time()
        options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
        options |= {"length_penalty": 1.0, "early_stopping": True}
        rows = translate_ours(model, tokenizer, sentences, args.max_batch_tokens, **options)
        seconds = time.process_time() - start
        return [row[1:] for row in until_end(rows, tokenizer.eos_token_id)], seconds

    def run_peer():
        options = {"beam_size": args.num_beams, "max_decoding_length": args.max_new_tokens}
        options |= {"length_penalty": 1.0, "max_batch_size": args.batch_size}
        start = time.process_time()
        sources = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(sentences)["input_ids"]]
        seconds = time.process_time() - start
        answer = worker({"sources": sources, "options": options})
        start = time.process_time()
        rows = [tokenizer.convert_tokens_to_ids(tokens) for tokens in answer["tokens"]]
        tokenizer.batch_decode(rows, skip_special_tokens=True)
        return rows, seconds + answer["seconds"] + time.process_time() - start

    ways = {"hf_rskip": run_ours, "ctranslate2": run_peer}
    seconds, tokens = {way: [] for way in ways}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_marian(create_marian_model(model), tokenizer, Path(folder))
        worker = Worker(python, Path(__file__).with_name("ctranslate2_worker.py"), folder)
        for number in range(args.rounds):
            for way in list(ways)[:: 1 if number % 2 else -1]:
                tokens[way], time_taken = ways[way]()
                seconds[way].append(time_taken)
        worker.close()

    ratio = statistics.median(peer / own for peer, own in zip(seconds["ctranslate2"], seconds["hf_rskip"], strict=True))
    row = {
        "peer": args.requirement,
        "sentences": len(sentences),
        "tokens": sum(map(len, tokens["hf_rskip"])),
        "agree": sum(peer == own for peer, own in zip(tokens["ctranslate2"], tokens["hf_rskip"], strict=True)),
        "peer_seconds": f"{statistics.median(seconds['ctranslate2']):.2f}",
        "hf_rskip_seconds": f"{statistics.median(seconds['hf_rskip']):.2f}",
        "ratio": f"{ratio:.2f}",
        **{name: getattr(args, name) for name in ("num_beams", "batch_size", "max_batch_tokens", "rounds")},
        **describe_run("cpu"),
    }
    print_row(row)
    append_csv([row], args.output)


if __name__ == "__main__":
    main()
