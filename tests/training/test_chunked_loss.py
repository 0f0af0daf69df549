"""The projection and cross-entropy in chunks against those of PyTorch and Transformers over whole logits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import LabelSmoother

from hf_rskip.cli.main import main
from hf_rskip.training.chunked_loss import chunked_cross_entropy


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 4, 7, 1000])
def test_values_and_gradients(rows, smoothing, bias):
    """In float64; the weight is also that of an embedding, so that its gradient has two parts."""
    torch.manual_seed(0)
    vocabulary, size = 31, 8
    tokens, labels = torch.randint(vocabulary, (2, 5, 6))
    labels[0, 3:] = labels[4] = -100
    weight = torch.randn(vocabulary, size, dtype=torch.float64, requires_grad=True)
    parameters = [weight] + [torch.randn(vocabulary, dtype=torch.float64, requires_grad=True)] * bias

    def hidden():
        return torch.nn.functional.embedding(tokens, weight).tanh()

    logits = torch.nn.functional.linear(hidden(), *parameters)
    expected = LabelSmoother(smoothing)({"logits": logits}, labels, num_items_in_batch=17)
    head = (weight, parameters[1] if bias else None)
    loss = chunked_cross_entropy(hidden(), *head, labels, smoothing, rows) / 17
    assert loss.dtype == torch.float64
    # The smoother itself sums in float32.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6 if smoothing else 1e-12)
    upstream = torch.tensor(1.7, dtype=torch.float64)
    direct = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="sum"
    )
    assert loss.item() == pytest.approx(direct.item() / 17, rel=1e-12)
    gradients = torch.autograd.grad(loss, parameters, upstream)
    for gradient, other in zip(gradients, torch.autograd.grad(direct / 17, parameters, upstream), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


def test_autocast():
    """Products in bfloat16, as those of a linear layer; the loss, and the sum of its gradients, in float32."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    labels, parameters = torch.randint(300, (200,)), (hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        loss = chunked_cross_entropy(hidden, weight, None, labels, 0.1, rows=8)
    direct = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(direct.item(), rel=1e-6)
    for gradient, other in zip(*(torch.autograd.grad(value, parameters) for value in (loss, direct)), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - other).norm() < 0.01 * other.norm()


def test_no_labels_at_all():
    hidden = torch.randn(2, 3, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(5, 3), None, torch.full((2,), -100))
    assert loss == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_the_logits_are_never_whole():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        cells = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.cells = max(self.cells, result.numel())
            return result

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with Largest() as largest:
        chunked_cross_entropy(hidden, weight, None, torch.arange(64), 0.1, rows=8).backward()
    assert largest.cells == 8 * 500


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_training_is_the_same(smoothing, write_recipe, capfd):
    """Twelve steps with gradient accumulation, evaluated too."""
    changes = {"max_steps": 12, "gradient_accumulation_steps": 2, "num_beams": 1, "early_stopping_patience": None}
    changes |= {"label_smoothing_factor": smoothing, "per_device_train_batch_tokens": 256}
    ends, losses = [], []
    for chunked in (False, True):
        recipe = write_recipe(**changes, chunked_cross_entropy=chunked)
        assert main(["train", str(recipe)]) == 0, capfd.readouterr().err
        ends.append(load_file(recipe.parent / "output" / "checkpoint-12" / "model.safetensors"))
        history = json.loads((recipe.parent / "output" / "trainer_state.json").read_text())["log_history"]
        losses.append([log.get("loss", log.get("eval_loss")) for log in history if "train_loss" not in log])
    assert len(losses[0]) == 9 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in ends[0].items():
        if not name.endswith("k_proj.bias"):  # no part of the loss: Adam follows the rounding of a zero gradient
            torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=2e-4)
