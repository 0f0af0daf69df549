"""Attention weights against the formula, and the picture of the command."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_rskip import RSkipConfig, RSkipForConditionalGeneration
from hf_rskip.cli.main import main
from hf_rskip.decoding.attention_plot import cross_attention, plot_attention
from hf_rskip.decoding.translate import translate
from hf_rskip.errors import UserError


def test_weights_against_the_formula(model_and_tokenizer, pairs):
    model, tokenizer = model_and_tokenizer
    pair = pairs["test"][0]
    before = model.config._attn_implementation
    weights, target_tokens, source_tokens = cross_attention(model, tokenizer, pair["en"], pair["de"])
    assert model.config._attn_implementation == before
    assert weights.shape == (len(target_tokens), len(source_tokens))
    assert source_tokens[-1] == target_tokens[-1] == "</s>"
    assert "".join(source_tokens[:-1]) == pair["en"].replace(" ", "")
    attention = model.get_decoder().layers[-1].encoder_attn
    seen = {}
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(query=args[0], key=args[2]), with_kwargs=True
    )
    with torch.no_grad():
        model(
            tokenizer(pair["en"], return_tensors="pt").input_ids,
            labels=tokenizer(text_target=pair["de"], return_tensors="pt").input_ids,
        )
        hook.remove()
        query, key = attention.q_proj(seen["query"][0]), attention.k_proj(seen["key"][0])
    heads = zip(query.split(attention.head_dim, -1), key.split(attention.head_dim, -1), strict=True)
    expected = [(q @ k.T / attention.head_dim**0.5).softmax(-1) for q, k in heads]
    torch.testing.assert_close(weights, torch.stack(expected).mean(0), atol=1e-5, rtol=1e-4)


def test_the_command(trained, model_and_tokenizer, tmp_path, capfd):
    sentence = "the old cat sees $a mouse$ ."
    assert main(["attention", str(trained.folder), sentence, str(tmp_path / "attention.png")]) == 0
    assert capfd.readouterr().out.splitlines() == translate(*model_and_tokenizer, [sentence])
    with Image.open(tmp_path / "attention.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_a_sentence_beyond_the_positions(model_and_tokenizer):
    with pytest.raises(UserError, match="Sentence 1 has 202 tokens, more than the 64 positions of the model"):
        cross_attention(*model_and_tokenizer, "cat " * 200, "die Katze")


@pytest.mark.parametrize("name", ["no/attention.png", "attention.xyz"])
def test_a_picture_that_cannot_be_written(trained, tmp_path, capfd, name):
    assert main(["attention", str(trained.folder), "the cat", str(tmp_path / name), "--translation", "die Katze"]) == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert "cannot be written" in line


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("ending", ["png", "svg", "jpg"])
def test_scripts_that_the_font_of_matplotlib_lacks(tmp_path, ending):
    """Are drawn in another font, or as boxes without a warning, in every format."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "猫", "고양이"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    config = RSkipConfig(
        vocab_size=6, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    path = tmp_path / f"attention.{ending}"
    plot_attention(RSkipForConditionalGeneration(config).eval(), tokenizer, "猫 猫", "고양이", str(path))
    assert path.stat().st_size > 1000
