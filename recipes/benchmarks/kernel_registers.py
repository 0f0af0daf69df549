"""Registers and spills of the Triton kernels of skip connections, compiled for GPUs that need not be there.

    python recipes/benchmarks/kernel_registers.py --output kernel_registers.csv

It needs the package triton (`pip install triton`), which a torch for CPUs comes without.

`spills` are bytes of a thread's stack, 0 where all that it works on stays in registers; `shared` are bytes a program.
`blocks` is how many programs registers and threads let run at once on a multiprocessor, which gives
`warps`.
"""

import argparse
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch

os.environ["TRITON_INTERPRET"] = "0"

import triton  # noqa: E402
from report import append_csv, print_table  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_rskip.environment import find_commit  # noqa: E402
from hf_rskip.kernels import triton as kernels  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KERNELS = {"forward": kernels.forward_kernel, "backward": kernels.backward_kernel}
SINGLE = ("weight", "bias", "stats", "partial")


def compile_kernel(name, size, steps, architecture, dtype="bf16"):
    """The `forward` or `backward` kernel, compiled for rows of `size` values of `dtype` and float32 gains."""
    constants = {"N": size, "STEPS": steps, "CENTRED": True} | getattr(kernels, f"{name}_options")(size)
    warps = {"num_warps": constants.pop("num_warps")}
    kernel, types, attributes = KERNELS[name], {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            types[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            types[argument] = "*fp32" if argument.startswith(SINGLE) else f"*{dtype}"
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            types[argument] = "i32" if argument == "rows" else "fp32"
    values = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=warps)


def resources(compiled) -> dict[str, int]:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    warps = compiled.metadata.num_warps
    blocks = min(64 // warps, 65536 // (32 * warps * -(-found["REG"] // 8) * 8))
    return {
        "registers": found["REG"],
        "spills": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
        "blocks": blocks,
        "warps": blocks * warps,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--recursions", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90], help="80 is an A100, 90 an H100")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of all but the gains")
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")
    args = parser.parse_args()

    rows = []
    for grid in itertools.product(args.kernels, args.sizes, args.recursions, args.architectures):
        name, size, steps, architecture = grid
        compiled = compile_kernel(name, size, steps, architecture, args.dtype)
        rows.append(
            {"kernel": name, "size": size, "K": steps, "architecture": f"sm_{architecture}"} | resources(compiled)
        )
    about = {
        "dtype": args.dtype,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "commit": find_commit() or "",
    }
    print_table([{name: str(value) for name, value in row.items()} for row in rows], about)
    append_csv([row | about for row in rows], args.output)


if __name__ == "__main__":
    main()
