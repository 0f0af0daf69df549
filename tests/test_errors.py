"""What is quoted of the errors of other packages."""

import json

import pytest
from torch.utils.data import DataLoader, Dataset

from hf_rskip.errors import UserError, first_line, require


def test_a_package_that_is_required():
    assert require("json", "none") is json
    with pytest.raises(UserError, match=r"^This needs no_such_package: `pip install 'hf_rskip\[extra\]'`\.$"):
        require("no_such_package", "extra")


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\nno such file.\nTry another one.")) == "no such file"
    assert first_line(RuntimeError("Sizes differ:\n\t2 and 3")) == "Sizes differ"
    assert first_line(OSError()) == "OSError"


def test_an_error_of_a_worker_is_one_sentence():
    class Broken(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise UserError(f"Row {index} is broken.") from ValueError("no image")

    with pytest.raises(UserError, match=r"^Row 0 is broken\.$"):
        next(iter(DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")))
