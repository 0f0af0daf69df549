"""Time and memory of recursive skip connections, of an encoder layer and of a training step, against K.

    python recipes/benchmarks/skip_kernels.py --output skip_kernels.csv --plot skip_kernels.pdf

measures everything on the GPU, or where there is none on the CPU, at fewer shapes: tokens, whose norms go over
features, and feature maps, whose norms go over whole samples. The training step is that of `training_step.py`, on a
GPU compiled and in bfloat16. All implementations and K take turns, in an order that rotates from round to round;
reported are medians. On a GPU each call is replayed from a CUDA graph, which leaves out what Python takes to launch it
(`--no_graphs` leaves that in), with cold caches, and times are those of its events; on a CPU with one thread they are
processor time, which other processes disturb less than the clock. `forward_of_copy_bandwidth` is what x, F and y (3
tensors) take of the bytes a second that copying a tensor of that size reaches.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
import training_step
from report import append_csv, describe_run, print_table
from torch import nn

from hf_rskip import RSkip, SampleLayerNorm, rskip_layer_norm

RECURSIONS = (1, 2, 3, 4, 8)
SHAPES = {
    "cuda": ["8192x512", "8192x1024", "65536x1024", "128x64x32x32", "128x64x56x56"],
    "cpu": ["8192x512", "128x16x32x32"],
}


def cpu_time():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class EncoderLayer(nn.Module):
    """Post-LN encoder layer with 64 features a head, on sentences of 64 tokens."""

    def __init__(self, size, skips):
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.fc1, self.fc2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.skips = skips

    def forward(self, x):
        heads = self.qkv(x).view(-1, 64, 3, x.shape[-1] // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        x = self.skips[0](x, self.out(mixed))
        return self.skips[1](x, self.fc2(self.fc1(x).relu()))


class Skip(nn.Module):
    """`rskip_layer_norm` with a fixed backend."""

    def __init__(self, size, recursions, affine, axes, backend):
        super().__init__()
        shape = (recursions, size) if affine == "per_step" else (size,)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.arguments = {"recursions": recursions, "affine": affine, "axes": axes, "backend": backend}

    def forward(self, x, branch):
        return rskip_layer_norm(x, branch, self.weight.to(x.dtype), self.bias.to(x.dtype), **self.arguments)


def make_skips(size, recursions, affine, axes, device):
    """Skip connections by the name of their implementation."""
    skips = {"reference": Skip(size, recursions, affine, axes, "reference")}
    fused = "closed_form" if axes == "sample" else "cpp" if device == "cpu" else None
    skips["auto"] = RSkip(size, recursions, SampleLayerNorm if axes == "sample" else "layer_norm", affine)
    skips["compile"] = torch.compile(Skip(size, recursions, affine, axes, "reference"))
    if fused:
        skips[fused] = Skip(size, recursions, affine, axes, fused)
        skips[f"compile {fused}"] = torch.compile(Skip(size, recursions, affine, axes, fused))
    return skips


class Case:
    """A module with inputs, and its two passes."""

    def __init__(self, module, inputs, upstream):
        self.module, self.inputs, self.upstream = module, inputs, upstream
        self.leaves = [*inputs, *module.parameters()]
        self.forward_times, self.total_times = [], []

    def forward(self):
        return self.module(*self.inputs)

    def both(self):
        return torch.autograd.grad(self.forward(), self.leaves, self.upstream)

    def measure_on_cpu(self):
        start = cpu_time()
        y = self.forward()
        middle = cpu_time()
        torch.autograd.grad(y, self.leaves, self.upstream)
        return middle - start, cpu_time() - start

    def kept_bytes(self):
        """Of the activations that wait for the backward pass, without inputs and parameters."""
        given = {tensor.untyped_storage().data_ptr() for tensor in self.leaves}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.forward()
        del y
        return sum(kept.values())


class Gpu:
    """Times calls by events, each with caches that hold something else; graphs share their memory."""

    def __init__(self, graphs):
        self.graphs, self.other = graphs, torch.empty(2**28, dtype=torch.int8, device="cuda")
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def prepare(self, function):
        if not self.graphs:
            return function
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            function()
        return graph.replay

    def measure(self, function):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.zero_()  # meanwhile what follows is put into the queue
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)


def take_turns(cases, rounds, warmup, gpu):
    if gpu:
        calls = {case: (gpu.prepare(case.forward), gpu.prepare(case.both)) for case in cases}
    for index in range(-warmup, rounds):
        start = index % len(cases)
        for case in cases[start:] + cases[:start]:
            forward, total = map(gpu.measure, calls[case]) if gpu else case.measure_on_cpu()
            if index >= 0:
                case.forward_times.append(forward)
                case.total_times.append(total)


def make_cases(args, shape, device, dtype):
    """All that is measured at one shape, by (what, implementation, affine, K)."""
    torch.manual_seed(0)
    given = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
    if len(shape) == 4 and args.channels_last:
        given = [tensor.contiguous(memory_format=torch.channels_last) for tensor in given]
    x, branch, upstream = (tensor.movedim(1, -1) for tensor in given)
    inputs, size = (x.requires_grad_(), branch.requires_grad_()), x.shape[-1]
    axes = "sample" if x.dim() == 4 else "channels"
    cases = {}
    for affine in args.affines:
        for recursions in args.recursions:
            for name, skip in make_skips(size, recursions, affine, axes, device).items():
                if args.implementations and name not in args.implementations:
                    continue
                skip.to(device, dtype)
                cases["skip", name, affine, recursions] = Case(skip, inputs, upstream)
                if args.layer and axes == "channels" and name in ("reference", "cpp", "auto"):
                    skips = nn.ModuleList([make_skips(size, recursions, affine, axes, device)[name] for _ in range(2)])
                    layer = EncoderLayer(size, skips).to(device, dtype)
                    cases["layer", name, affine, recursions] = Case(layer, (x,), upstream)
    return cases


def measure_copy(shape, device, dtype, gpu):
    """Bytes a second of reading and writing a tensor."""
    source = torch.randn(shape, device=device, dtype=dtype)
    target, seconds = torch.empty_like(source), []
    copy = gpu.prepare(lambda: target.copy_(source)) if gpu else None
    for _ in range(20):
        if gpu:
            seconds.append(gpu.measure(copy))
        else:
            start = cpu_time()
            target.copy_(source)
            seconds.append(cpu_time() - start)
    return 2 * source.nbytes / statistics.median(seconds)


def measure_training_steps(args, device):
    arguments = ["--recursions", *map(str, args.recursions), "--affines", *args.affines, f"--threads={args.threads}"]
    arguments += [f"--{name}={value}" for name, value in (("shape", args.step), ("rounds", args.rounds)) if value]
    arguments += ["--compile", "--bf16"] if device == "cuda" else []
    return training_step.measure(training_step.parse_arguments(arguments))


def plot(rows, path):
    """Forward and backward time of the skip connection against K, one panel a size and affine."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.style.use("tableau-colorblind10")
    rows = [row for row in rows if row["what"] == "skip"]
    panels = list(dict.fromkeys((row["shape"], row["affine"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        here = [row for row in rows if (row["shape"], row["affine"]) == panel]
        for name, marker in zip(dict.fromkeys(row["implementation"] for row in here), "osD^vP*X", strict=False):
            points = [(row["K"], float(row["total_ms"])) for row in here if row["implementation"] == name]
            axis.plot(*zip(*points, strict=True), marker=marker, label=name)
        axis.set(title=", ".join(panel), xlabel="recursions K", ylim=(0, None))
    axes[0][0].set_ylabel("forward and backward (ms)")
    axes[0][-1].legend()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", help="ROWSxFEATURES, or SAMPLESxCHANNELSxHEIGHTxWIDTH of feature maps")
    parser.add_argument("--channels_last", action="store_true", help="memory format of the maps")
    parser.add_argument("--recursions", type=int, nargs="+", default=RECURSIONS)
    parser.add_argument("--affines", nargs="+", default=["per_step", "last"])
    names = "reference", "cpp", "closed_form", "auto", "compile", "compile cpp", "compile closed_form"
    parser.add_argument("--implementations", nargs="+", choices=names, help="only these; `reference` is eager")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on a GPU, else float32")
    parser.add_argument("--rounds", type=int, help="measured calls of each: 100 on a GPU, 7 on a CPU")
    parser.add_argument("--warmup", type=int, default=3, help="calls before those")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--no_graphs", action="store_true", help="call from Python, on a GPU, rather than CUDA graphs")
    parser.add_argument("--no_layer", dest="layer", action="store_false", help="leave the encoder layer out")
    parser.add_argument("--step", choices=["none", *training_step.SHAPES], help="model: base on a GPU, small on a CPU")
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    parser.add_argument("--plot", type=Path, help="file of a plot of time against K")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or {"cuda": "bfloat16", "cpu": "float32"}[device])
    rounds = args.rounds or {"cuda": 100, "cpu": 7}[device]
    gpu = Gpu(not args.no_graphs) if device == "cuda" else None
    rows = []
    for label in args.shapes or SHAPES[device]:
        shape = tuple(map(int, label.split("x")))
        if len(shape) not in (2, 4):
            parser.error(f"--shapes takes shapes of 2 or 4 sizes, not {label}")
        torch._dynamo.reset()
        torch._dynamo.config.cache_size_limit = 256
        cases = make_cases(args, shape, device, dtype)
        copy = measure_copy(shape, device, dtype, gpu)
        take_turns(list(cases.values()), rounds, args.warmup, gpu)
        medians = {
            key: [statistics.median(times) for times in (case.forward_times, case.total_times)]
            for key, case in cases.items()
        }
        for key, (forward, total) in medians.items():
            what, name, affine, recursions = key
            one, eager = (what, name, affine, 1), (what, "reference", affine, recursions)
            moved = 3 * math.prod(shape) * dtype.itemsize / forward
            rows.append(
                {
                    "what": what,
                    "implementation": name,
                    "affine": affine,
                    "K": recursions,
                    "shape": label,
                    "forward_ms": f"{1e3 * forward:.4g}",
                    "backward_ms": f"{1e3 * (total - forward):.4g}",
                    "total_ms": f"{1e3 * total:.4g}",
                    "forward_to_K1": f"{forward / medians[one][0]:.3f}" if one in medians else "",
                    "total_to_K1": f"{total / medians[one][1]:.3f}" if one in medians else "",
                    "eager_to_this": f"{medians[eager][1] / total:.3f}" if eager in medians else "",
                    "forward_of_copy_bandwidth": f"{moved / copy:.3f}" if what == "skip" else "",
                    "kept_MiB": f"{cases[key].kept_bytes() / 2**20:.2f}",
                }
            )
    about = {"dtype": str(dtype).removeprefix("torch."), "rounds": rounds, **describe_run(device)}
    print_table([{name: str(value) for name, value in row.items()} for row in rows], about)
    of_steps = [] if args.step == "none" else measure_training_steps(args, device)
    append_csv([row | about for row in rows] + of_steps, args.output)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
