"""Translation of lists: order, blanks, batches that change nothing, and models that are not there."""

import pytest
import torch

from hf_rskip import manifest
from hf_rskip.decoding.loading import load_model
from hf_rskip.decoding.translate import search, translate
from hf_rskip.errors import UserError


@pytest.fixture(scope="module")
def sources(pairs):
    return [pair["en"] for pair in pairs["test"]]


@pytest.fixture(scope="module")
def one_by_one(model_and_tokenizer, sources):
    """Greedy translations, each sentence without padding."""
    model, tokenizer = model_and_tokenizer
    translations = []
    for source in sources:
        inputs = tokenizer(source, return_tensors="pt")
        output = model.generate(**inputs, num_beams=1)
        translations.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return translations


@pytest.mark.parametrize("budget", [1, 40, 300, 100_000])
def test_the_budget_changes_nothing(model_and_tokenizer, sources, one_by_one, budget):
    assert len(set(one_by_one)) > 5
    assert translate(*model_and_tokenizer, sources, max_batch_tokens=budget, num_beams=1) == one_by_one


def test_the_order_is_that_of_the_sources(model_and_tokenizer, sources, one_by_one):
    assert translate(*model_and_tokenizer, sources[::-1], 200, num_beams=1) == one_by_one[::-1]


def test_batches_keep_the_budget(model_and_tokenizer, sources):
    model, tokenizer = model_and_tokenizer
    shapes = []
    hook = model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    translate(model, tokenizer, sources, 200, num_beams=2)
    hook.remove()
    assert sum(rows for rows, _ in shapes) == len(sources)
    assert all(rows * length * 2 <= 200 for rows, length in shapes) and len(shapes) < len(sources)


def test_options_of_generate_win_over_the_model(model_and_tokenizer, sources, one_by_one):
    model, _ = model_and_tokenizer
    assert model.generation_config.num_beams == 2
    beams = translate(*model_and_tokenizer, sources)
    assert beams == translate(*model_and_tokenizer, sources, num_beams=2) != one_by_one
    assert all(len(text.split()) <= 3 for text in translate(*model_and_tokenizer, sources, max_new_tokens=3))
    assert beams != translate(*model_and_tokenizer, sources, length_penalty=-5.0)
    with pytest.raises(UserError, match="^length_penalty has no effect with num_beams 1$"):
        translate(*model_and_tokenizer, sources, length_penalty=2.0, num_beams=1)


def test_blank_sentences_stay_empty(model_and_tokenizer, sources, one_by_one):
    mixed = ["", sources[0], " \t", "\u3000", sources[1], "\n"]
    expected = ["", one_by_one[0], "", "", one_by_one[1], ""]
    assert translate(*model_and_tokenizer, mixed, num_beams=1) == expected
    assert translate(*model_and_tokenizer, ["", ""]) == ["", ""]
    assert translate(*model_and_tokenizer, []) == []


def test_what_is_too_long_is_cut_with_a_warning(model_and_tokenizer, sources, caplog):
    cut, short = translate(*model_and_tokenizer, [" ".join(sources), sources[0]], num_beams=1)
    assert cut and short
    assert "1 of 2 sentences were cut off at 64 tokens" in caplog.text


def test_more_tokens_than_positions_are_the_positions(model_and_tokenizer, sources, caplog):
    options = {"num_beams": 1, "eos_token_id": None, "pad_token_id": 0}
    (_, _, output), *_ = search(*model_and_tokenizer, sources[:2], max_new_tokens=500, **options)
    assert output.shape == (2, 1 + 64)
    assert "max_new_tokens 500 is lowered to 64, the positions of the model" in caplog.text


def test_control_tokens_in_a_sentence_are_text(model_and_tokenizer, sources):
    for text in translate(*model_and_tokenizer, [f"{sources[0]} </s> <pad>", "</s>"]):
        assert not {"</s>", "<pad>", "<s>"} & set(text.split())


def test_the_model_comes_back_in_evaluation_mode(model_and_tokenizer, sources, one_by_one):
    model, tokenizer = model_and_tokenizer
    model.train()
    assert translate(model, tokenizer, sources[:3], num_beams=1) == one_by_one[:3]
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_loading(trained):
    model, tokenizer = load_model(str(trained.folder))
    assert not model.training and model.config.vocab_size == len(tokenizer)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no model '.*model': no such file or folder."),
        ({}, "No model could be loaded from '.*model': "),
        ({"config.json": "{}"}, "No model could be loaded from '.*model': "),
        ({"config.json": '{"model_type": "bert"}'}, "'.*model' is a model of type 'bert', which cannot translate."),
    ],
)
def test_a_folder_without_a_model(tmp_path, content, sentence):
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def test_files_are_checksummed_once(trained, monkeypatch):
    read, describe = [], manifest._describe
    monkeypatch.setattr(manifest, "_describe", lambda path: read.append(path.name) or describe(path))
    load_model(str(trained.folder))
    assert len(read) == len(set(read)) and {"model.safetensors", "tokenizer.json"} <= set(read)
