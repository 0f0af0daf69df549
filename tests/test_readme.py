"""The Python of the README and of the guide to the kernels runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    example
    for guide in ("README.md", "hf_rskip/kernels/README.md")
    for example in re.findall(r"```python\n(.*?)```", (ROOT / guide).read_text(encoding="utf-8"), flags=re.DOTALL)
]


def test_readme_has_examples():
    assert len(EXAMPLES) == 3


PROGRAM = """
import sys
import torch

torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
for example in sys.argv[1:]:
    exec(example, {"__name__": "__main__"})
from hf_rskip import SKIP_CONNECTIONS

x, branch = torch.randn(2, 4, 8)
y = SKIP_CONNECTIONS["layer_scale"](8)(x, branch)
torch.testing.assert_close(y, torch.layer_norm(x + 0.1 * branch, [8]))
"""


def test_readme_examples_run(tmp_path):
    """Each by itself, in one process; its kind of skip connection is initialised outside the models, too."""
    command = [sys.executable, "-c", PROGRAM, *EXAMPLES]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
