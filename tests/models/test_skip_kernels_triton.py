"""The Triton kernels of recursive skip connections where there is no GPU: their numbers in Triton's interpreter, and whether
they compile for one.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_rskip.models import skip_kernels


def run(program, *arguments, **environment):
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


HAS_TRITON = pytest.mark.skipif(not skip_kernels.has_triton(), reason="needs the package triton")

INTERPRETED = """
    import importlib.util, sys
    import torch
    spec = importlib.util.spec_from_file_location("checks", sys.argv[1])
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    torch.use_deterministic_algorithms(True)
    for affine in checks.AFFINES:
        for recursions in (1, 3):
            for shape in ((37, 24), (2, 3, 100), (0, 16)):
                for dtypes in [(torch.float32, torch.float32), *checks.PRECISIONS[::2]]:
                    leaves, upstream = checks.random_leaves(shape, recursions, affine, dtypes)
                    checks.assert_equals_formula("triton", leaves, upstream, recursions, affine, 1.7)
    for kind, change in checks.EXTREMES.items():
        for affine in ("per_step", "last"):
            leaves, upstream = checks.random_leaves((5, 48), 3, affine)
            leaves[0], leaves[1] = change(leaves[0]), checks.EXTREMES["offset"](leaves[1])
            checks.assert_equals_formula("triton", leaves, upstream, 3, affine)
    print("equal")
"""


@HAS_TRITON
def test_triton_kernels_in_the_interpreter():
    result = run(INTERPRETED, str(Path(__file__).with_name("test_skip_kernels.py")), TRITON_INTERPRET="1")
    assert result.stdout == "equal\n", result.stderr


COMPILED = r"""
    import re, subprocess, sys
    from pathlib import Path
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from hf_rskip.models import skip_kernels_triton as kernels

    def build(kernel, size, steps, closed, architecture):
        options = kernels.launch_options(size)
        warps = {"num_warps": options.pop("num_warps")}
        per_step = steps > 1 and not closed
        constants = options | {"STEPS": steps, "PER_STEP": per_step, "CLOSED": closed}
        if "AFFINE" in kernel.arg_names:
            constants["AFFINE"] = steps if per_step else 1
        types, attributes = {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name.endswith("_ptr"):
                single = name.startswith(("weight", "bias", "stats", "partial"))
                types[name] = "*fp32" if single else "*bf16"
                attributes[index,] = [["tt.divisibility", 16]]
            else:
                types[name] = "constexpr" if name in constants else "fp32" if name in ("eps", "scale") else "i32"
        attributes[kernel.arg_names.index("n"),] = [["tt.divisibility", 16]]
        constants = {kernel.arg_names.index(name): value for name, value in constants.items()}
        source = ASTSource(kernel, types, constexprs={(index,): value for index, value in constants.items()},
                           attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=warps).asm["cubin"]

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        for size, steps, closed in ((512, 4, False), (1024, 4, False), (1024, 4, True)):
            for architecture in (80, 90):
                Path(sys.argv[1]).write_bytes(build(kernel, size, steps, closed, architecture))
                usage = subprocess.run([cuobjdump, "-res-usage", sys.argv[1]], capture_output=True, text=True).stdout
                print(*re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
"""


@HAS_TRITON
def test_triton_kernels_compile_without_spills(tmp_path):
    result = run(COMPILED, str(tmp_path / "kernel.cubin"), TRITON_INTERPRET="0")
    assert result.stdout.split() == ["0"] * 2 * 12, result.stdout + result.stderr
