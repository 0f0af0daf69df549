"""The Python of the guides runs as it stands there, one block after the other."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM
from transformers.trainer_callback import TrainerState

import hf_rskip
from hf_rskip.probing.probe import probe

RECIPES = Path(__file__).parents[2] / "recipes"


def run_guide(name, folder, monkeypatch):
    """What the blocks of a guide leave, run in `folder`, where `recipes/` is as in the repository."""
    monkeypatch.chdir(folder)
    (folder / "recipes").symlink_to(RECIPES)
    torch.manual_seed(0)
    values = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", (RECIPES / name).read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block, values)
    return values


def test_every_public_name_is_there():
    assert all(getattr(hf_rskip, name) is not None for name in hf_rskip.__all__)
    shipped = {name for name in vars(hf_rskip.models) if name[0].isupper() and not name.startswith("Auto")}
    assert {name for name in shipped if not name.endswith("PreTrainedModel")} < set(hf_rskip.__all__)


def test_training_from_python(tmp_path, monkeypatch):
    values = run_guide("README.md", tmp_path, monkeypatch)
    assert values["scores"]["test_bleu"] >= 0
    for name in ("own", "stock"):
        model, loading = AutoModelForSeq2SeqLM.from_pretrained(f"outputs/{name}", output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        assert model.config.skip_recursions == 2 and model.generation_config.use_cache is not False
    last = max(tmp_path.glob("outputs/own/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = TrainerState.load_from_json(last / "trainer_state.json").log_history
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) > 1 and losses[-1] < losses[0]


@pytest.fixture(scope="module")
def own_models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return SimpleNamespace(**run_guide("own_models.md", tmp_path_factory.mktemp("own-models"), monkeypatch))


def test_a_gpt_of_ones_own(own_models):
    gpt, tokens = own_models.gpt.eval(), own_models.tokens
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100
    with torch.no_grad():
        before, after = gpt(tokens), gpt(changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert (before[:, -1] - after[:, -1]).abs().max() > 1e-2
    deep = own_models.GPT(100, layers=8, kind="deep_norm")
    assert {skip.scale for block in deep.h for skip in block.skips} == {16**0.25}
    bound = 64**-0.25 * (6 / (32 + 128)) ** 0.5  # Xavier's, with DeepNorm's gain
    assert 0.95 * bound < deep.h[0].mlp.fc1.weight.abs().max() <= bound
    for kind in ("pre_norm", "b2t"):
        gpt = own_models.GPT(100, kind=kind, norm="rms_norm", eps=1e-3)
        norms = [module for module in gpt.modules() if hasattr(module, "eps")]
        assert len(norms) > 3 and {(type(norm), norm.eps) for norm in norms} == {(hf_rskip.NORMS["rms_norm"], 1e-3)}
    assert all(block.around is not None for block in gpt.h)


class WithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return SimpleNamespace(loss=self.model(tokens).square().mean())


def test_the_probe_numbers_sublayers_by_layer(own_models):
    bert = probe(own_models.bert, {"input_ids": own_models.tokens, "labels": own_models.tokens})
    assert bert[1].name == "bert.encoder.layer.0.output.skip"
    gpt = probe(WithLoss(own_models.GPT(100)), {"tokens": own_models.tokens})
    assert gpt[1].name == "model.h.0.skips.1"
    for rows in (bert, gpt):
        assert [(row.layer, row.sublayer) for row in rows] == [(layer, place) for layer in range(3) for place in (0, 1)]
    assert all(row.gradient_norm_branch > 0 for row in gpt)


def test_a_vit_of_ones_own(own_models):
    vit, images = own_models.vit, torch.randn(2, 3, 32, 32)
    assert all(parameter.grad is not None for parameter in vit.parameters())
    copy = own_models.ViT(10, kind="rskip", recursions=2)
    copy.load_state_dict(vit.state_dict())
    assert torch.equal(copy(images), vit(images))


def test_a_bert_keeps_its_norms(own_models, tmp_path):
    grown, plain = own_models.bert.state_dict(), own_models.plain.state_dict()
    assert grown["bert.encoder.layer.1.output.skip.norm.0.weight"].eq(10).all()
    assert len(grown) == len(plain) + 3 * 2 * 2  # gain and bias of the added step of each sublayer
    bert = own_models.RSkipBertForMaskedLM(own_models.config)
    for parameter in bert.parameters():
        nn.init.uniform_(parameter, -1, 1)
    bert.eval().save_pretrained(tmp_path)
    loaded, loading = own_models.RSkipBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(own_models.tokens).logits, bert(own_models.tokens).logits)


def test_a_bert_of_one_recursion_is_a_bert(own_models):
    plain = own_models.plain.eval()
    bert = own_models.RSkipBertForMaskedLM(type(plain.config)(**plain.config.to_dict() | {"skip_recursions": 1}))
    weights = {name.replace("output.LayerNorm", "output.skip.norm.0"): w for name, w in plain.state_dict().items()}
    bert.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(bert.eval()(own_models.tokens).logits, plain(own_models.tokens).logits)
