"""A study of made-up cells."""

import pytest
import yaml

from hf_rskip.studies.study import read_study


@pytest.fixture(autouse=True)
def safe_path(monkeypatch):
    """A study that runs in the process of the tests sets it for what that process starts."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")


@pytest.fixture
def make_study(write_recipe, tmp_path):
    def make(**keys):
        path = tmp_path / "study.yaml"
        values = {"recipe": str(write_recipe()), "output_dir": str(tmp_path / "output"), "seeds": [1, 2, 3], **keys}
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return read_study(path, [])

    return make
