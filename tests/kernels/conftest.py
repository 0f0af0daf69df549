import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_empty_memory():
    """What a kernel does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
