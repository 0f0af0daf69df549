"""Time and memory of a training step of a Transformer against the number of recursions, and of Transformers' Marian.

    python recipes/benchmarks/training_step.py --compile --bf16 --output training_step.csv

does alone what is the last part of `skip_kernels.py`. A step is forward, loss, backward and Adam, on a batch of random
tokens without padding. The models take turns, in an order that rotates from round to round; `total_to_K1` is the median
over the rounds of the ratio to this package's model with K = 1, and `marian_to_this` that of Marian's step to this one,
above 1 where this one is faster. On a GPU the clock runs around a synchronised step, on a CPU it counts processor time.
Marian is post-LN as K = 1 is, of the same sizes.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from report import append_csv, describe_run, print_table
from transformers import MarianConfig, MarianMTModel

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.models.skip_connections import SkipConnection

SHAPES = {
    "base": {
        "vocab_size": 32000,
        "d_model": 512,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "max_position_embeddings": 512,
        "dropout": 0.1,
    },
    "tiny": {  # for the tests
        "vocab_size": 100,
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "dropout": 0.1,
    },
    "small": {
        "vocab_size": 4000,
        "d_model": 512,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "max_position_embeddings": 512,
        "dropout": 0.1,
    },
}


def make_models(args):
    """Models by (name, affine, K)."""
    shape, models = SHAPES[args.shape], {}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    for recursions in args.recursions:
        for affine in args.affines:
            config = RSkipConfig(
                **shape, **special, skip_type="rskip", skip_recursions=recursions, skip_norm_affine=affine
            )
            models["fused", affine, recursions] = RSkipForConditionalGeneration(config)
            if recursions > 1 and not args.no_eager:
                eager = RSkipForConditionalGeneration(config)
                for module in eager.modules():
                    if isinstance(module, SkipConnection):
                        for norm in module.norm:
                            norm.normalize = norm.normalize  # it could be watched, so every step is a call
                models["eager", affine, recursions] = eager
    marian = MarianConfig(**shape, **special, activation_function="relu", static_position_embeddings=True)
    models["marian", "", 1] = MarianMTModel(marian)
    return models


def make_step(model, args, device):
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, args.length)
    tokens = {
        name: torch.randint(2, model.config.vocab_size, shape, generator=generator).to(device)
        for name in ("input_ids", "labels")
    }

    def loss_of(input_ids, labels):
        return model(input_ids=input_ids, labels=labels).loss

    if args.compile:
        loss_of = torch.compile(loss_of)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            loss = loss_of(**tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="base on a GPU, small on a CPU")
    parser.add_argument("--batch_size", type=int, help="sentences: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence, on both sides")
    parser.add_argument("--recursions", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--affines", nargs="+", default=["per_step", "last"])
    parser.add_argument("--no_eager", action="store_true", help="leave the unfused models out")
    parser.add_argument("--rounds", type=int, help="measured steps of each: 50 on a GPU, 5 on a CPU")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile of forward and loss")
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.shape = args.shape or {"cuda": "base", "cpu": "small"}[device]
    args.batch_size = args.batch_size or {"cuda": 256, "cpu": 8}[device]
    args.rounds = args.rounds or {"cuda": 50, "cpu": 5}[device]
    return args


def measure(args):
    """A row for each model."""
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = 256
    steps = {key: make_step(model, args, device) for key, model in make_models(args).items()}
    keys, seconds, peak = list(steps), {key: [] for key in steps}, {}

    def clock():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if device == "cpu" and args.threads == 1 else time.perf_counter()

    for index in range(-args.warmup, args.rounds):
        for key in keys[index % len(keys) :] + keys[: index % len(keys)]:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = clock()
            steps[key]()
            if index >= 0:
                seconds[key].append(clock() - start)
            if device == "cuda":
                peak[key] = torch.cuda.max_memory_allocated() - before

    def ratio(upper, lower):
        return f"{statistics.median(a / b for a, b in zip(seconds[upper], seconds[lower], strict=True)):.3f}"

    rows = []
    for key in keys:
        name, affine, recursions = key
        plain = "fused", affine, 1
        rows.append(
            {
                "what": "training step",
                "implementation": name,
                "affine": affine,
                "K": recursions,
                "total_ms": f"{1e3 * statistics.median(seconds[key]):.4g}",
                "total_to_K1": ratio(key, plain) if plain in seconds else "",
                "marian_to_this": ratio(("marian", "", 1), key),
                "peak_MiB": f"{peak[key] / 2**20:.0f}" if key in peak else "",
            }
        )
    settings = ("shape", "batch_size", "length", "rounds", "bf16", "compile")
    about = {name: getattr(args, name) for name in settings} | describe_run(device)
    print_table([{name: str(value) for name, value in row.items()} for row in rows], about)
    return [row | about for row in rows]


def main():
    args = parse_arguments()
    append_csv(measure(args), args.output)


if __name__ == "__main__":
    main()
