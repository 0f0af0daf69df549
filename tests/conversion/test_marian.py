"""A converted MarianMT checkpoint computes and generates what the original does."""

import json
import logging
import shutil
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from plain_transformers import EXACT, make_model, random_batch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel, PreTrainedTokenizerFast

from hf_rskip import RSkipForConditionalGeneration
from hf_rskip.cli import main
from hf_rskip.conversion.marian import convert_marian_model, create_marian_model
from hf_rskip.data.text.tokenizer import train_tokenizer
from hf_rskip.errors import UserError

SEPARATE = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 33}
VARIANTS = [
    pytest.param({}, id="shared"),
    pytest.param({"bias": False}, id="no-bias"),
    pytest.param({"tie_word_embeddings": False}, id="shared-untied"),
    pytest.param(SEPARATE, id="separate"),
    pytest.param({**SEPARATE, "tie_word_embeddings": False}, id="separate-untied"),
    pytest.param({"activation_function": "silu", "scale_embedding": False}, id="silu-unscaled"),
    pytest.param({"activation_function": "relu", "max_position_embeddings": 512}, id="relu-512"),
    pytest.param({"activation_function": "gelu", "d_model": 24}, id="gelu"),
    pytest.param({"dtype": torch.float64}, id="float64"),
]


def tokens_equal(model, marian, batch, **options):
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    actual, expected = model.generate(**source, **options), marian.generate(**source, **options)
    assert torch.equal(actual, expected)
    return actual


@pytest.fixture(params=VARIANTS)
def marian_and_model(request, make_marian, tmp_path):
    """A random MarianMT model, and its conversion saved and loaded."""
    values = dict(request.param)
    dtype = values.pop("dtype", torch.float32)
    marian = make_marian(**values).to(dtype)
    convert_marian_model(marian).save_pretrained(tmp_path)
    return marian, AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_logits(marian_and_model, batch):
    marian, model = marian_and_model
    assert isinstance(model, RSkipForConditionalGeneration)
    assert model.dtype == marian.dtype
    with torch.no_grad():
        expected = marian(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.5  # not all the same


@pytest.mark.parametrize("num_beams", [1, 4])
def test_tokens_of_greedy_and_beam_search(marian_and_model, batch, num_beams):
    marian, model = marian_and_model
    if num_beams > 1 and Version(transformers.__version__) < Version("5.18") and marian.config.decoder_vocab_size == 33:
        pytest.skip("beam search of Transformers 5.17 takes the source vocabulary's size for the target's")
    tokens = tokens_equal(model, marian, batch, num_beams=num_beams, num_return_sequences=num_beams)
    assert tokens.shape[1] <= 12  # max_length
    assert 0 not in tokens[:, 1 : tokens.eq(1).int().argmax(1).min()]  # bad_words_ids
    tokens_equal(model, marian, batch, num_beams=num_beams, no_repeat_ngram_size=1, eos_token_id=[1, 2, 3])


def test_the_way_back(marian_and_model):
    marian, model = marian_and_model
    back = create_marian_model(model)
    assert back.dtype == marian.dtype
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in weights_read(marian).items())
    assert (back.generation_config.num_beams, back.generation_config.bad_words_ids) == (4, [[0]])
    again = convert_marian_model(back)
    assert again.config.to_diff_dict().items() <= model.config.to_diff_dict().items()  # it was not saved
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def weights_read(marian):
    """Without positions, whose last bits differ, and, where it is not read, the shared matrix."""
    return {
        name: weight
        for name, weight in marian.state_dict().items()
        if "embed_positions" not in name and (marian.config.tie_word_embeddings or "shared" not in name)
    }


MARIAN_KINDS = [case for case in EXACT if case.values[0]["skip_type"] != "admin" and "rms" not in case.id]


@pytest.mark.parametrize("kind", MARIAN_KINDS)
def test_other_kinds_as_marian(kind):
    model = make_model(**kind)
    marian = create_marian_model(model)
    batch = random_batch(model.config)
    with torch.no_grad():
        expected = model(**batch).logits.log_softmax(-1)
        torch.testing.assert_close(marian(**batch).logits.log_softmax(-1), expected, rtol=0, atol=1e-4)
    source = {name: batch[name][:8] for name in ("input_ids", "attention_mask")}
    tokens_equal(model, marian, source, num_beams=2, max_new_tokens=8)


def test_exporting_a_folder(tmp_path, capsys):
    tokenizer = train_tokenizer(["a mouse", "the old cat"], 270)
    model = make_model(vocab_size=len(tokenizer), skip_type="rezero", source_lang="en", target_lang="de")
    model.generation_config.update(num_beams=2, gnmt_length_penalty=0.6, max_len_a=1.0)
    model.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    assert main(["export", str(tmp_path / "old"), str(tmp_path / "new"), "--format", "marian"]) == 0
    marian, loaded = MarianMTModel.from_pretrained(tmp_path / "new"), AutoTokenizer.from_pretrained(tmp_path / "new")
    assert marian.generation_config.max_new_tokens == 29
    assert not hasattr(marian.generation_config, "gnmt_length_penalty")
    inputs = loaded(["the old cat", "a mouse"], padding=True, return_tensors="pt")
    expected = model.generate(**inputs, num_beams=2, gnmt_length_penalty=None, length_penalty=1.0, max_new_tokens=29)
    assert torch.equal(marian.generate(**inputs), expected)
    words = ["export", str(tmp_path / "old"), str(tmp_path / "other"), "--format", "marian", "--quantization", "int8"]
    assert main(words) == 2
    assert "--quantization has no effect with --format marian: leave it out." in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"skip_recursions": 2}, "`skip_type` 'rskip' with `skip_recursions` 2 is not a plain Transformer"),
        ({"skip_type": "pre_norm"}, "`skip_type` 'pre_norm' cannot be folded"),
        ({"skip_type": "admin"}, "`learned_positions` of a MarianMT model is always False, and here it is True"),
        ({"skip_type": "xskip", "skip_norm": "rms_norm"}, "`skip_norm` of a MarianMT model is always 'layer_norm'"),
        ({"skip_type": "xskip", "layer_norm_eps": 1e-6}, "`layer_norm_eps` of a MarianMT model is always 1e-05"),
    ],
)
def test_models_that_are_no_marian(values, sentence):
    with pytest.raises(UserError, match=sentence):
        create_marian_model(make_model(**values))


def test_generation_configuration(marian_and_model):
    marian, model = marian_and_model
    expected, actual = marian.generation_config.to_dict(), model.generation_config.to_dict()
    for name in ("_from_model_config", "transformers_version"):
        expected.pop(name, None), actual.pop(name, None)
    assert actual == expected
    assert actual["forced_eos_token_id"] == 1
    assert actual["num_beams"] == 4


def test_settings_of_an_old_configuration(make_marian, batch, marian_tokenizer, tmp_path):
    """Before there was a generation_config.json its values stood in config.json."""
    make_marian(vocab_size=len(marian_tokenizer), bias=False).save_pretrained(tmp_path / "old")
    marian_tokenizer.save_pretrained(tmp_path / "old")
    (tmp_path / "old/generation_config.json").unlink()
    path = tmp_path / "old/config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"num_beams": 3, "bad_words_ids": [[0], [5]], "max_length": 9})
    )
    assert main(["convert", "marian", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new")
    assert (model.generation_config.num_beams, model.generation_config.bad_words_ids) == (3, [[0], [5]])
    assert tokens_equal(model, MarianMTModel.from_pretrained(tmp_path / "old"), batch).shape[1] <= 9


def test_loss_and_gradients(make_marian, batch):
    marian = make_marian(dropout=0.0, bias=True).train()
    model = convert_marian_model(marian).train()
    batch = {**batch, "labels": batch["decoder_input_ids"].masked_fill(batch["decoder_input_ids"] == 0, -100)}
    actual, expected = model(**batch).loss, marian(**batch).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    actual.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bias_through_resizing_and_tying(make_marian, batch, tmp_path):
    model = convert_marian_model(make_marian())
    bias = model.lm_head.bias.detach().clone()
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(45)
        torch.testing.assert_close(model(**batch).logits[..., :40], before, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.lm_head.bias, torch.cat([bias, torch.zeros(5)]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.bias, model.lm_head.bias)
    loaded.resize_token_embeddings(40)
    assert torch.equal(loaded.lm_head.bias, bias)
    assert loaded.lm_head.weight is loaded.model.encoder.embed_tokens.weight


def test_no_bias_without_one(make_marian):
    model = convert_marian_model(make_marian(bias=False))
    assert model.lm_head.bias is None
    assert not model.config.lm_head_bias


def test_layer_drop_is_dropped_with_a_warning(make_marian, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        convert_marian_model(make_marian(encoder_layerdrop=0.1))
    assert "`encoder_layerdrop` 0.1 is dropped" in caplog.text
    assert "decoder_layerdrop" not in caplog.text


def test_realistic_size(make_marian, batch):
    marian = make_marian(
        vocab_size=8000,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        max_position_embeddings=512,
    )
    with torch.no_grad():  # perturbing every weight by 0.3 is too much at this width
        for parameter in marian.parameters():
            if parameter.dim() == 2 and parameter.requires_grad:
                parameter.mul_(0.1)
    model = convert_marian_model(marian)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, marian(**batch).logits, rtol=1e-5, atol=1e-5)
    tokens_equal(model, marian, batch)


@pytest.fixture(scope="module")
def converted(marian_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "new"
    assert main(["convert", "marian", str(marian_folder), str(folder)]) == 0
    return folder


def test_the_command_keeps_translations_and_languages(marian_folder, converted, pairs):
    marian, model = MarianMTModel.from_pretrained(marian_folder), AutoModelForSeq2SeqLM.from_pretrained(converted)
    assert (model.config.source_lang, model.config.target_lang) == ("en", "de")
    sentences = [pair["en"] for pair in pairs["test"][:6]]
    old, new = AutoTokenizer.from_pretrained(marian_folder), AutoTokenizer.from_pretrained(converted)
    inputs = new(sentences, padding=True, return_tensors="pt")
    assert torch.equal(inputs.input_ids, old(sentences, padding=True, return_tensors="pt").input_ids)
    assert inputs.input_ids.ne(new.unk_token_id).all()
    tokens = tokens_equal(model, marian, inputs)
    assert new.batch_decode(tokens, skip_special_tokens=True) == old.batch_decode(tokens, skip_special_tokens=True)


def test_translating_with_the_converted_folder(converted, marian_folder, pairs, tmp_path, capsys):
    sentence = pairs["test"][0]["en"]
    (tmp_path / "source.txt").write_text(f"{sentence}\n\n", encoding="utf-8")
    assert main(["translate", str(converted), "--input_file", str(tmp_path / "source.txt")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(marian_folder)
    tokens = MarianMTModel.from_pretrained(marian_folder).generate(**tokenizer([sentence], return_tensors="pt"))
    expected = tokenizer.batch_decode(tokens, skip_special_tokens=True)[0] + "\n\n"
    assert capsys.readouterr().out == expected


def test_the_command_in_a_process_of_its_own(run_cli, marian_folder, tmp_path):
    result = run_cli("convert", "marian", marian_folder, tmp_path / "k2", "--skip_recursions", "2")
    assert (result.code, result.out) == (0, f"{tmp_path / 'k2'}: rskip, K = 2\n"), result.err
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "k2").config.skip_recursions == 2


def test_fast_tokenizer(make_marian, pairs, tmp_path):
    tokenizer = train_tokenizer((pair["en"] for pair in pairs["train"]), 320)
    make_marian(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    assert main(["convert", "marian", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded("the old cat").input_ids == tokenizer("the old cat").input_ids


def error_of(capsys, *words):
    assert main(["convert", "marian", *map(str, words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-rskip: error: ")
    return error


def test_errors_of_folders(capsys, marian_folder, converted, tmp_path):
    assert "There is no model" in error_of(capsys, tmp_path / "missing", tmp_path / "new")
    assert "is a model of type 'rskip', not a Marian checkpoint" in error_of(capsys, converted, tmp_path / "new")
    assert "already exists and is not an empty folder" in error_of(capsys, marian_folder, converted)
    assert "`skip_recursions` must be" in error_of(capsys, marian_folder, tmp_path / "n", "--skip_recursions", 0)
    assert list(tmp_path.iterdir()) == []


def test_without_a_tokenizer_the_weights_are_converted(run_cli, make_marian, tmp_path):
    make_marian().save_pretrained(tmp_path / "old")
    result = run_cli("convert", "marian", tmp_path / "old", tmp_path / "new")
    assert (result.code, result.out) == (0, f"{tmp_path / 'new'}: rskip, K = 1\n")
    assert f"No tokenizer is written, since there is none in '{tmp_path / 'old'}'" in result.err
    assert not list(tmp_path.glob("new/tokenizer*"))
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "new").config.skip_recursions == 1


def test_error_without_sentencepiece(capsys, marian_folder, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("MarianTokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr(sys.modules["hf_rskip.data.text.tokenizer"].AutoTokenizer, "from_pretrained", missing)
    error = error_of(capsys, marian_folder, tmp_path / "new")
    assert "most often sentencepiece" in error
    assert "pip install 'hf_rskip[marian]'" in error


UNACCOUNTED = "lacks weights of a MarianMT model, or has others: model.encoder.layer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda weights: weights.pop("model.encoder.layers.0.fc1.bias"), UNACCOUNTED, id="missing"),
        pytest.param(
            lambda weights: weights.update({"model.encoder.layer_norm.weight": torch.ones(16)}), UNACCOUNTED, id="more"
        ),
        pytest.param(
            lambda weights: weights.update({"model.encoder.layers.0.fc1.bias": torch.ones(3)}),
            "No model could be loaded from ",
            id="another-shape",
        ),
    ],
)
def test_error_of_weights(capsys, marian_folder, tmp_path, change, message):
    shutil.copytree(marian_folder, tmp_path / "old")
    weights = load_file(tmp_path / "old/model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    assert message in error_of(capsys, tmp_path / "old", tmp_path / "new")


def test_error_of_learned_positions(make_marian):
    marian = make_marian()
    marian.model.encoder.embed_positions.weight.data[3, 2] += 0.1
    with pytest.raises(UserError, match="model.encoder.embed_positions.weight is not a table of sinusoids"):
        convert_marian_model(marian)
