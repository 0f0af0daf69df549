"""Time of a training step (forward, loss, backward, SGD) of the ResNet, relative to that of Transformers' ResNet.

    python recipes/benchmarks/resnet_step.py --shape resnet20-like --output resnet_step.csv

All models have the same stem, widths, depths and shortcuts. They take one step each in turn, in an order that rotates
from round to round, so that a disturbance of the machine meets all of them; reported are the median of a model's steps
and the median over the rounds of the ratio Transformers / model, above 1 where the model is faster. On a CPU set
`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` to 4000000000, or the system handing out pages is timed as well.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from report import append_csv, describe_run, print_table
from transformers import ResNetConfig, ResNetForImageClassification

from hf_rskip import RSkipResNetConfig, RSkipResNetForImageClassification

SHAPES = {
    "resnet20-like": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64],
        "depths": [3, 3, 3],
        "layer_type": "basic",
        "num_labels": 10,
    },
    "resnet18": {
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
        "num_labels": 1000,
    },
}
KINDS = {"plain": {"skip_type": "xskip", "skip_norm": "none"}} | {
    f"rskip K={recursions}": {"skip_type": "rskip", "skip_recursions": recursions} for recursions in (1, 2, 3)
}


def make_step(model, args, device):
    """A function that takes one training step, always on the same images."""
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(device, memory_format=memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    pixel_values = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(model.config.num_labels, (args.batch_size,), device=device)

    def loss_of(pixel_values, labels):
        return model(pixel_values, labels=labels).loss

    if args.compile:
        loss_of = torch.compile(loss_of)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            loss = loss_of(pixel_values, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(steps, rounds, warmup, device):
    """Seconds of each step by name and round."""

    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    names, seconds = list(steps), {name: [] for name in steps}
    for index in range(-warmup, rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            synchronize()
            before = time.perf_counter()
            steps[name]()
            synchronize()
            if index >= 0:
                seconds[name].append(time.perf_counter() - before)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="resnet20-like")
    parser.add_argument("--image_size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=100, help="measured steps of each model")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--channels_last", action="store_true", help="memory order of images and weights")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile of forward and loss")
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = SHAPES[args.shape]
    models = {"transformers": ResNetForImageClassification(ResNetConfig(**shape))}
    for name, kind in KINDS.items():
        models[name] = RSkipResNetForImageClassification(RSkipResNetConfig(**shape, **kind))
    models["plain"].load_state_dict(models["transformers"].state_dict())  # it is the same network
    steps = {name: make_step(model, args, device) for name, model in models.items()}
    seconds = time_steps(steps, args.rounds, args.warmup, device)

    rows = []
    for name, times in seconds.items():
        ratios = [peer / own for peer, own in zip(seconds["transformers"], times, strict=True)]
        lower, _, upper = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "model": name,
                "median_ms": f"{1e3 * statistics.median(times):.2f}",
                "images_per_s": f"{args.batch_size / statistics.median(times):.0f}",
                "ratio": f"{statistics.median(ratios):.3f}",
                "ratio_quartiles": f"{lower:.3f}-{upper:.3f}",
            }
        )
    about = {
        **{name: value for name, value in vars(args).items() if name not in ("output", "warmup", "threads")},
        **describe_run(device),
    }
    print_table(rows, about)
    append_csv([row | about for row in rows], args.output)


if __name__ == "__main__":
    main()
