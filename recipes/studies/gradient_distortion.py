"""How skip connections distort gradients at initialisation, against depth (claims 1 and 2 of the rSkip paper).

    python recipes/studies/gradient_distortion.py --output_dir recipes/studies/gradient-distortion

For each form, network, depth and seed: a new model, one batch of random tokens or noise images, one backward pass,
and the gradient norm of the loss at the input of every sublayer (see `hf_rskip.probing.probe`). Two numbers sum a
network up: the gradient norm at the input of the first sublayer over that at the output of the last, and the factor by
which the norm grows with each sublayer on its way down (regression of the logarithm on depth): 1 is no distortion, more
explodes, less vanishes. All is in float64; "overflow" is what has no number even there.

Transformers have d_model 64, 4 heads, a feed-forward of 256, and 8 sentences of 16 tokens of 1,000; the stack that is
not measured has one layer. An encoder layer has two sublayers, a decoder layer three. The ResNets are those for CIFAR
with 8 images of 16 x 16; their branches have batch normalisation inside, whatever the skip connection. Dropout is off,
the loss is the cross-entropy.

Writes `gradients.csv` (norms at every sublayer, relative to the top), `summary.csv`, `summary.md` and `gradients.png`.
What is in `recipes/studies/gradient-distortion` took four minutes of one x86-64 core (13 on a busy machine), torch
2.13.0, transformers 5.23.0.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from transformers import set_seed

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration, RSkipResNetConfig, RSkipResNetForImageClassification
from hf_rskip.probing.batches import random_batch
from hf_rskip.probing.probe import probe
from hf_rskip.probing.table import gradient_growth, gradient_ratio

FORMS = {
    **{f"xSkip, s = {s}": {"skip_type": "xskip", "skip_norm": "none", "skip_scale": s} for s in (0.5, 1.0, 2.0)},
    **{f"xSkip+LN, s = {s}": {"skip_type": "xskip", "skip_scale": s} for s in (0.5, 1.0, 2.0, 2.414)},
    "xSkip+BN, s = 1.0": {"skip_type": "xskip", "skip_norm": "batch_norm"},
    **{f"rSkip+LN, K = {k}": {"skip_type": "rskip", "skip_recursions": k} for k in (1, 2, 3)},
    "pre-LN": {"skip_type": "pre_norm"},
}
STACKS = {"Transformer encoder": "encoder", "Transformer decoder": "decoder"}
ARCHITECTURES = [
    *(f"resnet{depth}_cifar" for depth in (20, 32, 44, 56, 110)),
    *(f"preact_resnet{depth}_cifar" for depth in (20, 56, 110, 164)),
]
COLORS = {"xSkip": "#D55E00", "xSkip+LN": "#0072B2", "xSkip+BN": "#009E73", "rSkip+LN": "#000000", "pre-LN": "#CC79A7"}
LIMIT = 1e12
"""Of the picture: what goes beyond it is cut off, lest all else look flat."""
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "v")]


def measure(network: str, depth: int, form: str, seed: int):
    """The probe of one new model, from the bottom of the stack to the top."""
    set_seed(seed)
    if network in STACKS:
        layers = {f"{stack}_layers": depth if stack == STACKS[network] else 1 for stack in STACKS.values()}
        config = RSkipConfig(
            vocab_size=1000, d_model=64, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=256,
            decoder_ffn_dim=256, **layers, **FORMS[form],
        )  # fmt: skip
        model = RSkipForConditionalGeneration(config)
    else:
        config = RSkipResNetConfig.from_name(f"{network}{depth}_cifar", **FORMS[form])
        model = RSkipResNetForImageClassification(config)
    batch = random_batch(config, samples=8, size=16, seed=seed)
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    rows = probe(model.double(), batch, label_smoothing=0.0)
    return [row for row in rows if row.stack == STACKS.get(network, "encoder")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[6, 12, 24, 48, 96], help="of the Transformers")
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    networks = [(stack, layers) for stack in STACKS for layers in args.layers]
    for name in args.architectures:
        family = name.removesuffix("_cifar").rstrip("0123456789")
        networks.append((family, int(name.removesuffix("_cifar").removeprefix(family))))
    args.output_dir.mkdir(parents=True, exist_ok=True)

    start, profiles, summary = time.perf_counter(), {}, []
    for network, depth in networks:
        for form in FORMS:
            runs = [measure(network, depth, form, seed) for seed in args.seeds]
            key = (network, depth, form)
            profiles[key] = np.array([[*(r.relative_gradient_norm_x for r in run), 1.0] for run in runs])
            for seed, run in zip(args.seeds, runs, strict=True):
                summary.append((*key, seed, gradient_ratio(run), gradient_growth(run), run[-1].std_y))
        print(f"{network} {depth}: {time.perf_counter() - start:.0f} s", flush=True)

    write_csv(args.output_dir / "gradients.csv", ["network", "depth", "form", "sublayer"], args.seeds, profiles)
    with open(args.output_dir / "summary.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["network", "depth", "form", "seed", "gradient_ratio", "gradient_growth", "std_y_at_the_top"])
        writer.writerows([*row[:4], *(f"{value:.5g}" for value in row[4:])] for row in summary)
    text = "\n\n".join(format_summary(network, summary) for network in dict(networks))
    (args.output_dir / "summary.md").write_text(f"{text}\n")
    print(text)
    draw(profiles, args.output_dir / "gradients.png")


def write_csv(path: Path, columns: list[str], seeds: list[int], profiles: dict) -> None:
    """A row for each sublayer: the gradient norm at its input relative to that at the top of the stack, by seed."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *(f"seed_{seed}" for seed in seeds)])
        for key, profile in profiles.items():
            writer.writerows([*key, i, *(f"{value:.4g}" for value in column)] for i, column in enumerate(profile.T))


def format_summary(network: str, summary: list[tuple]) -> str:
    """Gradient ratios, geometric means over seeds, by form and depth; then the factor a sublayer of the deepest."""
    rows = [row for row in summary if row[0] == network]
    depths = list(dict.fromkeys(row[1] for row in rows))
    table = []
    for form in FORMS:
        line = [form]
        for depth in depths:
            ratios = [row[4] for row in rows if row[1:3] == (depth, form)]
            finite = np.isfinite(ratios).all()
            line.append(f"{np.exp(np.mean(np.log(ratios))):.3g}" if finite else "overflow")
        growths = [row[5] for row in rows if row[1:3] == (depths[-1], form)]
        spread = f" ± {statistics.stdev(growths):.4f}" if len(growths) > 1 and np.isfinite(growths).all() else ""
        table.append([*line, f"{statistics.mean(growths):.4f}{spread}" if np.isfinite(growths).all() else "overflow"])
    header = ["form", *map(str, depths), f"factor a sublayer at {depths[-1]}"]
    title = f"{network}, by layers: gradient norm at the bottom over that at the top (geometric mean of the seeds)\n\n"
    return title + tabulate(table, header, tablefmt="github", disable_numparse=True)


def draw(profiles: dict, path: Path) -> None:
    """For each network the profile of the deepest, and the ratio of bottom to top against depth."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(network for network, _, _ in profiles))
    figure = Figure(figsize=(12, 1.2 + 3.6 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), 2, squeeze=False)
    for (left, right), network in zip(grid, networks, strict=True):
        depths = list(dict.fromkeys(depth for name, depth, _ in profiles if name == network))
        for form in FORMS:
            family = form.split(",")[0]
            line, marker = STYLES[[name for name in FORMS if name.split(",")[0] == family].index(form)]
            style = {"color": COLORS[family], "linestyle": line, "marker": marker, "markersize": 4, "label": form}
            deepest = profiles[network, depths[-1], form]
            position = np.arange(deepest.shape[1]) / (deepest.shape[1] - 1)
            band(left, position, deepest, style | {"markevery": max(1, len(position) // 10)})
            band(right, depths, np.array([profiles[network, depth, form][:, 0] for depth in depths]).T, style)
        left.set_title(f"{network} {depths[-1]}, by depth", fontsize="medium")
        left.set_xlabel("position in the stack (0: input, 1: output)")
        left.set_ylabel("gradient norm, relative to the top")
        right.set_title(f"{network}, bottom of the stack over its top", fontsize="medium")
        right.set_xlabel("layers")
        right.set_ylabel("gradient norm, bottom / top")
        right.set_xscale("log")
        right.set_xticks(depths, map(str, depths))
        right.minorticks_off()
        for axes in (left, right):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, 1 / LIMIT), min(high, LIMIT))
            axes.axhline(1, color="gray", linewidth=0.8)
            axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def band(axes, x, values: np.ndarray, style: dict) -> None:
    """The geometric mean over seeds (rows), and their range; what overflows is left out."""
    values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    axes.plot(x, np.exp(np.log(values).mean(0)), **style, linewidth=1.3)
    axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.12, linewidth=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
