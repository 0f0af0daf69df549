"""Target tokens a second of training on one thread, against another toolkit with a model of the same dimensions.

    python recipes/benchmarks/peers/peer_training.py joeynmt recipes/multi30k-en-de/cpu-small.yaml \
        --dataset_name FOLDER --environment FOLDER --output training_peers.csv

The peer is installed into an environment of its own and trains, by its own loop, on the recipe's data in the tokens of
the recipe's tokenizer, in batches of the same budget: `--batch_tokens` padded tokens of either side. Padding does not
count. The two take turns for `--rounds` rounds of `--steps` steps. Time is of the processor.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from environments import Worker, create_environment, describe_packages

sys.path.append(str(Path(__file__).parent.parent))
from report import append_csv, describe_run, print_row
from training_throughput import create_models, measure, read_data

from hf_rskip.recipe.parsing import parse_recipe

PEERS = {
    # With packages that they import without requiring them.
    "joeynmt": ["joeynmt==2.3.0", "importlib_metadata", "setuptools<81"],
    "eole": ["eole==0.6.4", "aiohttp"],
}


def write_corpus(dataset, tokenizer, folder):
    """The tokens of the corpus as words of text, and the vocabulary without what each toolkit adds itself."""
    special = set(tokenizer.all_special_ids)
    for column, ending in (("input_ids", "src"), ("labels", "trg")):
        with (folder / f"corpus.{ending}").open("w") as file:
            for ids in dataset[column]:
                words = tokenizer.convert_ids_to_tokens([token for token in ids if token not in special])
                file.write(" ".join(words) + "\n")
    vocabulary = [token for token in range(len(tokenizer)) if token not in special]
    words = tokenizer.convert_ids_to_tokens(vocabulary)
    (folder / "vocabulary.txt").write_text("".join(f"{word}\n" for word in words))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("recipe", help="of translation; further --key value are its keys")
    parser.add_argument("--environment", type=Path, required=True, help="folder of the peer's virtual environment")
    parser.add_argument("--batch_tokens", type=int, default=3072, help="padded tokens of the source, and of the target")
    parser.add_argument("--steps", type=int, default=40, help="measured steps a round")
    parser.add_argument("--warmup", type=int, default=4, help="steps before those")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file to which the row is appended")
    args, rest = parser.parse_known_args()
    args.bf16 = args.compile = False

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    requirements = [f"torch=={torch.__version__.partition('+')[0]}", *PEERS[args.peer]]
    python = create_environment(args.environment, requirements)
    results = {"hf_rskip": [], args.peer: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = parse_recipe(args.recipe, [*rest, "--output_dir", str(folder / "ours")])
        tokenizer, dataset = read_data(recipe)
        write_corpus(dataset, tokenizer, folder)
        create_model = create_models(recipe, tokenizer)["hf_rskip"]
        request = {
            "corpus": str(folder / "corpus"),
            "vocabulary": str(folder / "vocabulary.txt"),
            "vocabulary_size": len(tokenizer),
            "layers": recipe.model.encoder_layers,
            "heads": recipe.model.encoder_attention_heads,
            "d_model": recipe.model.d_model,
            "ffn_dim": recipe.model.encoder_ffn_dim,
            "dropout": recipe.model.dropout,
            "label_smoothing": recipe.training.label_smoothing_factor,
            "learning_rate": 1e-4,
            **{key: getattr(args, key) for key in ("batch_tokens", "steps", "warmup", "seed")},
        }
        for number in range(args.rounds):
            results["hf_rskip"].append(
                measure("hf_rskip", create_model, recipe, tokenizer, dataset, args, name, now=time.process_time)
            )
            output = folder / str(number)
            output.mkdir()
            worker = Worker(python, Path(__file__).with_name(f"{args.peer}_worker.py"))
            answer = worker(request | {"folder": str(output)})
            worker.close()
            results[args.peer].append((answer["tokens"] / answer["seconds"], answer["tokens"] / answer["cells"]))

    own, peer = ([speed for speed, _ in rounds] for rounds in results.values())
    own_part, peer_part = (statistics.median(part for _, part in rounds) for rounds in results.values())
    row = {
        "peer": describe_packages(python, [args.peer, "torch"]),
        "dataset": Path(recipe.data.dataset_name).name,
        "peer_tokens_per_s": f"{statistics.median(peer):.0f}",
        "hf_rskip_tokens_per_s": f"{statistics.median(own):.0f}",
        "ratio": f"{statistics.median(x / y for x, y in zip(own, peer, strict=True)):.3f}",
        "peer_not_padding": f"{peer_part:.3f}",
        "hf_rskip_not_padding": f"{own_part:.3f}",
        **{key: getattr(args, key) for key in ("batch_tokens", "steps", "warmup", "rounds", "seed")},
        **describe_run("cpu"),
    }
    print_row(row)
    append_csv([row], args.output)


if __name__ == "__main__":
    main()
