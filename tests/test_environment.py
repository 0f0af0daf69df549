"""Facts about the environment of a run."""

import torch

from hf_rskip.environment import describe_device


def test_names_of_devices():
    assert describe_device("cpu").endswith((" 1 thread", f" {torch.get_num_threads()} threads"))
    assert not hasattr(torch.mps, "get_device_name")
    assert describe_device("mps") == "mps"
