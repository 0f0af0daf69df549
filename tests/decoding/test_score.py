"""Scores of given translations, n-best lists and ensembles, against sums over steps written out here."""

import math

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    PLBartConfig,
    PLBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_rskip.cli.main import main
from hf_rskip.decoding.ensemble import Ensemble
from hf_rskip.decoding.loading import load_ensemble
from hf_rskip.decoding.score import score
from hf_rskip.decoding.translate import translate, translate_n_best, until_end
from hf_rskip.errors import UserError


@pytest.fixture(scope="module")
def sides(pairs):
    return [pair["en"] for pair in pairs["test"]], [pair["de"] for pair in pairs["test"]]


@pytest.fixture(scope="module")
def other(trained):
    """The trained model with all its parameters disturbed."""
    model = AutoModelForSeq2SeqLM.from_pretrained(trained.folder).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    return model


def step_by_step(models, source, target):
    """Log-probabilities of the tokens of one pair, each from a forward pass of its own and mean probabilities."""
    values = []
    for step in range(len(target)):
        prefix = torch.tensor([[models[0].config.decoder_start_token_id, *target[:step]]])
        with torch.no_grad():
            probabilities = [
                model(torch.tensor([source]), decoder_input_ids=prefix).logits[0, -1].softmax(-1) for model in models
            ]
        values.append(math.log((sum(probabilities) / len(models))[target[step]].item()))
    return values


@pytest.mark.parametrize("budget", [1, 60, 4096])
@pytest.mark.parametrize("count", [1, 2])
def test_scores_against_one_step_at_a_time(model_and_tokenizer, other, sides, budget, count):
    model, tokenizer = model_and_tokenizer
    models = [model, other][:count]
    sources, targets = ([*side[:6], "", side[7]] for side in sides)
    found = score(Ensemble(models) if count > 1 else model, tokenizer, sources, targets, budget)
    for values, source, target in zip(found, sources, targets, strict=True):
        expected = step_by_step(models, tokenizer(source).input_ids, tokenizer(text_target=target).input_ids)
        assert values == pytest.approx(expected, abs=2e-5)


def test_a_sentence_without_positions_is_named(model_and_tokenizer, sides):
    with pytest.raises(UserError, match="Sentence 2 has .* tokens, more than the 64 positions"):
        score(*model_and_tokenizer, ["a", "b"], ["a", " ".join(sides[1])])


@pytest.mark.parametrize("penalty", [{}, {"length_penalty": 0.0}, {"gnmt_length_penalty": 0.6}])
def test_n_best_has_the_scores_of_the_search(model_and_tokenizer, sides, penalty):
    model, tokenizer = model_and_tokenizer
    sources = [*sides[0][:5], " "]
    found = translate_n_best(model, tokenizer, sources, 3, 200, num_beams=4, **penalty)
    assert found[5] == [("", 0.0)]
    assert [hypotheses[0].text for hypotheses in found] == translate(
        *model_and_tokenizer, sources, num_beams=4, **penalty
    )
    for source, hypotheses in zip(sources[:5], found, strict=False):
        output = model.generate(
            **tokenizer(source, return_tensors="pt"),
            num_beams=4,
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_scores=True,
            **penalty,
        )
        assert [text for text, _ in hypotheses] == tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
        assert [value for _, value in hypotheses] == pytest.approx(output.sequences_scores.tolist(), abs=2e-5)


def test_n_best_needs_beams(model_and_tokenizer):
    with pytest.raises(UserError, match="num_beams is 2"):
        translate_n_best(*model_and_tokenizer, ["the cat"], 3)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_an_ensemble_of_one_model_is_that_model(model_and_tokenizer, sides, num_beams):
    model, tokenizer = model_and_tokenizer
    together = Ensemble([model, model, model])
    assert translate(together, tokenizer, sides[0], 300, num_beams=num_beams) == translate(
        model, tokenizer, sides[0], 300, num_beams=num_beams
    )


def test_a_greedy_ensemble_against_mean_probabilities(model_and_tokenizer, other, sides):
    model, tokenizer = model_and_tokenizer
    inputs = tokenizer(sides[0][:8], return_tensors="pt", padding=True)
    output = Ensemble([model, other]).generate(**inputs, num_beams=1, max_new_tokens=12)
    single = model.generate(**inputs, num_beams=1, max_new_tokens=12)
    differs = 0
    for row in range(8):
        found = until_end(output[row, 1:].tolist(), tokenizer)
        source, expected = tokenizer(sides[0][row], return_tensors="pt").input_ids, []
        while len(expected) < 12 and tokenizer.eos_token_id not in expected:
            prefix = torch.tensor([[model.config.decoder_start_token_id, *expected]])
            with torch.no_grad():
                mean = sum(one(source, decoder_input_ids=prefix).logits[0, -1].softmax(-1) for one in (model, other))
            expected.append(mean.argmax().item())
        assert found == expected
        differs += found != until_end(single[row, 1:].tolist(), tokenizer)
    assert differs


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_caches_of_an_ensemble_follow_the_beams(model_and_tokenizer, other, sides, use_cache):
    model, tokenizer = model_and_tokenizer
    options = {"num_beams": 4, "max_len_a": 1, "max_len_b": 4, "gnmt_length_penalty": 0.6}
    together = Ensemble([model, other])
    found = translate_n_best(together, tokenizer, sides[0][:5], 2, use_cache=use_cache, **options)
    inputs = tokenizer(sides[0][:5], return_tensors="pt", padding=True)
    scores = together.generate(
        **inputs,
        use_cache=use_cache,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    ).sequences_scores
    assert [value for row in found for _, value in row] == pytest.approx(scores.tolist(), abs=2e-5)


def test_models_of_different_vocabularies_do_not_mix(trained, other, tmp_path, model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    other.save_pretrained(tmp_path)
    smaller = tokenizer.train_new_from_iterator(["a b c"] * 4, 300)
    smaller.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another vocabulary"):
        load_ensemble([str(trained.folder), str(tmp_path)])


def test_models_of_different_special_tokens_do_not_mix(trained, other, tmp_path, model_and_tokenizer):
    other.config.decoder_start_token_id, start = 3, other.config.decoder_start_token_id
    other.save_pretrained(tmp_path)
    other.config.decoder_start_token_id = start
    model_and_tokenizer[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has another decoder_start_token_id than '.*': they cannot translate together"):
        load_ensemble([str(trained.folder), str(tmp_path)])


def test_models_whose_configuration_says_less(model_and_tokenizer, tmp_path):
    """The configuration of PLBart has none, and no languages, which files do not need."""
    sizes = {f"{stack}_{size}": 1 for stack in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    config = PLBartConfig(
        vocab_size=len(model_and_tokenizer[1]), d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes
    )
    names = [str(tmp_path / name) for name in "ab"]
    for name in names:
        PLBartForConditionalGeneration(config).save_pretrained(name)
        model_and_tokenizer[1].save_pretrained(name)
    assert len(load_ensemble(names)[0].models) == 2
    (tmp_path / "text").write_text("the cat\n")
    assert main(["score", names[0], "--test_files", str(tmp_path / "text"), str(tmp_path / "text")]) == 0


def test_a_model_that_translates_alone(trained, tmp_path, model_and_tokenizer):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    model_and_tokenizer[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="' of type 't5' translates alone: it has no decoder_layers"):
        load_ensemble([str(trained.folder), str(tmp_path)])


def test_the_commands(trained, model_and_tokenizer, other, sides, corpus_folder, tmp_path, capfd):
    model, tokenizer = model_and_tokenizer
    sources, targets = sides
    second = tmp_path / "second"
    other.save_pretrained(second)
    tokenizer.save_pretrained(second)
    for name, lines in {"source": sources, "target": targets}.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    files = ["--test_files", tmp_path / "source", tmp_path / "target"]

    def run(*words):
        assert main([str(word) for word in words]) == 0
        return capfd.readouterr()

    expected = score(model, tokenizer, sources, targets)
    printed = run("score", trained.folder, *files, "--per_token")
    header, *lines = printed.out.splitlines()
    assert header == "log_probability\ttoken_count\ttoken_log_probabilities\ttokens"
    for line, values, target in zip(lines, expected, targets, strict=True):
        total, count, log_probs, tokens = line.split("\t")
        assert float(total) == pytest.approx(sum(values), abs=1e-4) and int(count) == len(values)
        assert [float(value) for value in log_probs.split(" ")] == pytest.approx(values, abs=1e-5)
        assert tokens.split(" ") == tokenizer.convert_ids_to_tokens(tokenizer(target).input_ids)
    total, count = sum(map(sum, expected)), sum(map(len, expected))
    assert f"perplexity: {math.exp(-total / count):.4f} over {count:,} tokens" in printed.err
    from_dataset = run("score", trained.folder, "--dataset_name", corpus_folder).out
    assert from_dataset.splitlines() == ["\t".join(line.split("\t")[:2]) for line in printed.out.splitlines()]

    options = ["--num_beams", 3, "--gnmt_length_penalty", 0.6, "--max_len_a", 1, "--max_len_b", 5]
    together = ["--input_file", tmp_path / "source", "--ensemble", second, *options]
    lines = run("translate", trained.folder, *together, "--n_best", 2).out.splitlines()
    hypotheses = translate_n_best(
        Ensemble([model, other]),
        tokenizer,
        sources,
        2,
        num_beams=3,
        gnmt_length_penalty=0.6,
        max_len_a=1,
        max_len_b=5,
    )
    flat = [(number, *hypothesis) for number, row in enumerate(hypotheses) for hypothesis in row]
    for line, (number, text, value) in zip(lines, flat, strict=True):
        assert line.split(" ||| ")[:2] == [str(number), text]
        assert float(line.split(" ||| ")[2]) == pytest.approx(value, abs=1e-5)
    assert run("translate", trained.folder, *together).out.splitlines() == [row[0].text for row in hypotheses]
