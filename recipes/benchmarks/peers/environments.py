"""An environment of its own for each peer, and a process in it that answers requests."""

import json
import subprocess
import sys
import venv
from pathlib import Path


def create_environment(folder: Path, requirements: list[str]) -> Path:
    """The Python of a virtual environment with `requirements`; one that is there is used again."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python


class Worker:
    """A script in another environment: one line of JSON in, one line of JSON out."""

    def __init__(self, python: Path, script: Path, *arguments):
        self.process = subprocess.Popen(
            [python, script, *map(str, arguments)],
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):  # what a peer prints by itself goes on to the terminal
                return json.loads(line)
            sys.stderr.write(line)
        raise SystemExit(f"The peer ended with status {self.process.wait()}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def describe_packages(python: Path, names: list[str]) -> str:
    """The versions of packages in another environment."""
    code = "import sys; from importlib.metadata import version; print(*(f'{n}=={version(n)}' for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True).stdout.strip()
