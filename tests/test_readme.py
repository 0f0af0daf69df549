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


def test_readme_examples_run(tmp_path):
    """Each by itself, in one process."""
    program = "import sys\nfor example in sys.argv[1:]:\n    exec(example, {'__name__': '__main__'})"
    command = [sys.executable, "-c", program, *EXAMPLES]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
