"""An export to CTranslate2 computes and finds what the model in torch does, and refuses what it cannot do."""

import copy
import logging
import random
import sys

import pytest
import torch
from plain_transformers import EMBEDDINGS, EXACT, make_model

from hf_rskip.cli import main
from hf_rskip.conversion.ctranslate2 import export_ctranslate2
from hf_rskip.data.text.tokenizer import train_tokenizer
from hf_rskip.decoding.beam_search import beam_search
from hf_rskip.decoding.loading import load_translator
from hf_rskip.decoding.score import score_tokens
from hf_rskip.decoding.translate import translate_n_best
from hf_rskip.errors import UserError

PRE_NORM = [
    pytest.param({"skip_type": kind, "skip_norm": norm, "activation_function": activation}, id=f"{kind}-{norm}")
    for kind, norm, activation in (
        ("pre_norm", "layer_norm", "gelu"),
        ("pre_norm", "rms_norm", "silu"),
        ("peri_norm", "layer_norm", "gelu_new"),
        ("peri_norm", "rms_norm", "quick_gelu"),
    )
]
SENTENCES = ["a cat", "the old cat sees a mouse .", "", "a mouse likes the cat ."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES, 270)


def export(model, tokenizer, folder, **options):
    export_ctranslate2(model, tokenizer, folder, **options)
    return load_translator(str(folder))[0]


def random_tokens(sizes):
    """200 sources and targets of 1 to 12 tokens, every fourth target without its end."""
    rng = random.Random(0)
    sources, targets = ([[rng.randrange(3, n) for _ in range(rng.randint(1, 12))] for _ in range(200)] for n in sizes)
    return sources, [target if row % 4 == 0 else [*target, 2] for row, target in enumerate(targets)]


@pytest.mark.parametrize("embeddings", EMBEDDINGS[::2])  # of `admin` they are untied in the folded model
@pytest.mark.parametrize("kind", EXACT + PRE_NORM)
def test_log_probabilities_and_tokens(kind, embeddings, tokenizer, tmp_path):
    model = make_model(**kind, **embeddings)
    exported = export(model, tokenizer, tmp_path / "new")
    pairs = random_tokens((model.config.vocab_size, model.config.decoder_vocab_size))
    expected, actual = ([v for row in score_tokens(each, tokenizer, *pairs) for v in row] for each in (model, exported))
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=0, atol=1e-4)
    assert torch.tensor(expected).std() > 0.5  # not all the same
    batch = tokenizer.pad({"input_ids": pairs[0][:16]}, return_tensors="pt")
    beams = {"num_beams": 4, "early_stopping": True, "num_return_sequences": 2, "custom_generate": beam_search}
    for options in ({"num_beams": 1}, beams):
        tokens = model.generate(**batch, **options, max_new_tokens=8)
        assert torch.equal(exported.generate(**batch, **options, max_new_tokens=8), tokens)


@pytest.fixture(scope="module")
def ending(tokenizer, tmp_path_factory):
    """A model whose translations end after 1 to 20 tokens, and its export."""
    model = make_model(
        1, vocab_size=len(tokenizer), lm_head_bias=True, skip_type="pre_norm", max_position_embeddings=60
    )
    with torch.no_grad():
        model.lm_head.bias[2] += 3.5
    return model, export(model, tokenizer, tmp_path_factory.mktemp("ctranslate2") / "new")


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "gnmt_length_penalty": None, "max_len_a": 1.3},
        {"length_penalty": 0.0},
        {"length_penalty": 2.0, "max_new_tokens": 5},
        {"length_penalty": -0.5, "max_len_a": 0.5, "max_len_b": 2},
        {"max_len_b": 6, "max_new_tokens": 9},
        {"max_length": 7},
        {"eos_token_id": [2, 5, 70]},
        {"no_repeat_ngram_size": 0, "do_sample": False},
    ],
    ids=str,
)
def test_options_have_the_effect_that_they_have_in_torch(ending, tokenizer, options):
    options = {"num_beams": 4, **options}
    count, early = min(3, options["num_beams"]), {"early_stopping": True} if options["num_beams"] > 1 else {}
    actual, expected = (
        translate_n_best(each, tokenizer, SENTENCES, count, **options, **early) for each in reversed(ending)
    )
    assert [[text for text, _ in row] for row in actual] == [[text for text, _ in row] for row in expected]
    scores = [torch.tensor([score for row in rows for _, score in row]) for rows in (actual, expected)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name, value",
    {
        "gnmt_length_penalty": 0.6,
        "early_stopping": "never",
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2,
        "do_sample": True,
        "bad_words_ids": [[5]],
        "forced_eos_token_id": 0,
        "decoder_start_token_id": 4,
    }.items(),
)
def test_options_of_another_effect_are_refused(ending, name, value):
    with pytest.raises(UserError, match=f"`{name}` "):
        ending[1].generate(torch.tensor([[5, 2]]), torch.ones(1, 2), num_beams=2, **{name: value})


@pytest.mark.parametrize("name, value", [("max_new_tokens", 0), ("max_len_a", -1.0)])
def test_wrong_options_are_errors_as_in_torch(ending, name, value):
    for model in ending:
        with pytest.raises(ValueError, match=name):
            model.generate(torch.tensor([[5, 2]]), attention_mask=torch.ones(1, 2), **{name: value})


def test_a_source_without_tokens(ending):
    with pytest.raises(UserError, match="no sentence without a token"):
        ending[1].generate(torch.tensor([[5, 2], [2, 0]]), torch.tensor([[1, 1], [1, 0]]))


def test_an_end_that_differs_from_torch_is_said(ending, tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = copy.deepcopy(ending[0])
    model.generation_config.update(num_beams=4, early_stopping=False)
    export(model, tokenizer, tmp_path / "new")
    assert "`early_stopping` is true in CTranslate2" in caplog.text


def test_the_commands(ending, tokenizer, tmp_path, capfd):
    source, expected, actual = tmp_path / "source.txt", tmp_path / "expected.txt", tmp_path / "actual.txt"
    source.write_text("".join(f"{sentence}\n" for sentence in SENTENCES))
    ending[0].generation_config.update(num_beams=3, early_stopping=True, max_new_tokens=8)
    ending[0].save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), str(tmp_path / "new"), "--format", "ctranslate2"]
    assert main(command) == 0
    for folder, output in (("model", expected), ("new", actual)):
        assert (
            main(["translate", str(tmp_path / folder), "--input_file", str(source), "--output_file", str(output)]) == 0
        )
    assert actual.read_text() == expected.read_text() != "\n" * 4
    weights = tmp_path / "new/model.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert main(["translate", str(tmp_path / "new"), "--input_file", str(source)]) == 2
    assert "model.bin' is not as it was written: its checksum is another" in capfd.readouterr().err
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    command = ["evaluate", str(tmp_path / "new"), "--source_lang", "en", "--target_lang", "de", "--test_files"]
    assert main([*command, str(source), str(source)]) == 0
    assert '"bleu"' in capfd.readouterr().out
    assert main(["translate", str(tmp_path / "new"), "--ensemble", str(tmp_path / "model")]) == 2
    assert "is an export to CTranslate2, which translates alone" in capfd.readouterr().err


@pytest.mark.parametrize("quantization", ["int8", "int8_float32", "int16", "float16", "bfloat16"])
def test_quantized(ending, tokenizer, quantization, tmp_path):
    model, full = ending
    exported = export(model, tokenizer, tmp_path / "new", quantization=quantization)
    assert exported.translator.compute_type.startswith(("int8", "int16", "float"))
    pairs = random_tokens((len(tokenizer), len(tokenizer)))
    rows = [torch.tensor([sum(row) for row in score_tokens(each, tokenizer, *pairs)]) for each in (full, exported)]
    assert 0 < (rows[0] - rows[1]).abs().mean() / rows[0].abs().mean() < 0.05


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"skip_recursions": 2}, "with `skip_recursions` 2 is not a plain Transformer: `hf-rskip convert fold`"),
        ({"skip_type": "b2t"}, "`skip_type` 'b2t' cannot be folded into post-LN"),
        ({"skip_type": "pre_norm", "skip_norm": "batch_norm"}, "`skip_norm` 'batch_norm' does not exist"),
        ({"skip_type": "xskip", "activation_function": "mish"}, "`activation_function` 'mish' does not exist"),
    ],
)
def test_models_that_cannot_be_exported(values, sentence, tokenizer, tmp_path):
    with pytest.raises(UserError, match=sentence):
        export_ctranslate2(make_model(**values), tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_mistakes(ending, tokenizer, tmp_path, monkeypatch):
    export_ctranslate2(ending[0], tokenizer, tmp_path / "new")
    (tmp_path / "new/model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="new' is not a complete export to CTranslate2: "):
        load_translator(str(tmp_path / "new"))
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    for call in (
        lambda: load_translator(str(tmp_path / "new")),
        lambda: export_ctranslate2(ending[0], tokenizer, tmp_path / "other"),
    ):
        with pytest.raises(UserError, match=r"pip install 'hf_rskip\[ctranslate2\]'"):
            call()
