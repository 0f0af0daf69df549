"""LoRA by PEFT on the translation model: trained by the stock Trainer, saved, loaded and merged."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

peft = pytest.importorskip("peft")


def test_lora(build, batch, tmp_path):
    torch.manual_seed(0)
    base = build()
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(3)]
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=0.1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(model=model, args=args, train_dataset=rows).train()
    model.eval()
    for name, weight in model.named_parameters():
        assert name not in frozen or torch.equal(weight, frozen[name])
    # The Trainer turns the cache off in the configuration.
    tokens = model.generate(**source, num_beams=2, max_new_tokens=8, use_cache=True)
    assert torch.equal(model.generate(**source, num_beams=2, max_new_tokens=8, use_cache=False), tokens)

    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, expected)
