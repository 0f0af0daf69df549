"""The shape of the package: imports run downwards, and no file is too long to take in."""

import ast
from pathlib import Path

import pytest

import hf_rskip

ROOT = Path(hf_rskip.__file__).parent
BELOW = {
    "models": set(),
    "kernels": {"models"},
    "data": set(),
    "decoding": {"models", "data"},
    "evaluation": {"models", "data", "decoding"},
    "probing": {"models", "data"},
    "conversion": {"models", "data", "decoding"},
    "recipe": {"models", "data", "decoding", "evaluation"},
    "hub": {"models", "data", "recipe"},
    "training": {"models", "data", "decoding", "evaluation", "probing", "conversion", "recipe", "hub"},
    "studies": {"models", "data", "evaluation", "probing", "recipe", "training"},
}
"""The packages that each may import; the command line may import all of them."""


def imported_packages(package):
    for path in (ROOT / package).rglob("*.py"):
        place = path.relative_to(ROOT).parts[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = place[: len(place) + 1 - node.level]
                yield (*base, *(node.module or node.names[0].name).split("."))[0]


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_downwards(package):
    others = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {package}
    assert set(imported_packages(package)) & others <= BELOW[package]


def test_every_package_has_its_place():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == {*BELOW, "cli"}


def test_no_file_is_too_long():
    paths = [*ROOT.rglob("*.py"), *ROOT.rglob("*.cpp")]
    lengths = {path.name: path.read_text(encoding="utf-8").count("\n") for path in paths}
    assert lengths.pop("modeling_rskip.py") <= 620  # the model of one file that Transformers expects
    assert {name: length for name, length in lengths.items() if length > 450} == {}
