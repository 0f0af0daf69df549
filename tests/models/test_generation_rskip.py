"""GNMT's length penalty and lengths relative to the source, against searches of all sequences and hand-cut ones."""

import itertools

import pytest
import torch
from transformers import GenerationConfig

ALPHAS = [0.0, 0.6, 1.0, 3.0]
LONGEST, EOS, WORDS = 3, 2, 6
ENDLESS = {"eos_token_id": 29, "suppress_tokens": [29]}


def every_sequence():
    """All that generation can give in `LONGEST` tokens: ended by the end token, or cut off."""
    others = [token for token in range(WORDS) if token != EOS]
    for length in range(1, LONGEST + 1):
        for prefix in itertools.product(others, repeat=length - 1):
            yield [*prefix, EOS]
            if length == LONGEST:
                yield from ([*prefix, token] for token in others)


@pytest.fixture
def tiny(build):
    """A model of six words, and two sources."""
    model = build(vocab_size=WORDS)
    with torch.no_grad():  # so that a sentence is neither almost sure to end at once nor never to
        model.lm_head.weight.mul_(0.3)
    return model, torch.tensor([[3, 5, 4, 2], [5, 3, 3, 2]])


def best_of_all(model, source, penalty):
    """The sequences by `log p / penalty(length)`, best first, with that score."""
    sequences = [*every_sequence()]
    tokens = torch.tensor([[*sequence, *[0] * (LONGEST - len(sequence))] for sequence in sequences])
    decoder_input_ids = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=1)
    with torch.no_grad():
        logits = model(source.expand(len(tokens), -1), decoder_input_ids=decoder_input_ids).logits
    log_probs = logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0].tolist()
    ranked = [
        (sum(row[: len(sequence)]) / penalty(len(sequence)), sequence)
        for row, sequence in zip(log_probs, sequences, strict=True)
    ]
    return sorted(ranked, reverse=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_len_a": -1.0}, "`max_len_a` must be a finite number of at least 0, not -1.0"),
        ({"max_len_a": float("nan")}, "`max_len_a` must be a finite number of at least 0, not nan"),
        ({"max_len_b": -3}, "`max_len_b` must be a finite number of at least 0, not -3"),
        ({"gnmt_length_penalty": float("inf"), "num_beams": 2}, "`gnmt_length_penalty` must be a finite number"),
        ({"gnmt_length_penalty": 0.6, "num_beams": 1}, "`gnmt_length_penalty` has no effect with `num_beams` 1"),
        (
            {"max_new_tokens": 500, "cache_implementation": "static"},
            "`max_new_tokens` must be at most 24 with the 24 positions of the model, not 500",
        ),
        (
            {"max_new_tokens": 23, "decoder_input_ids": torch.ones(2, 3).long(), "cache_implementation": "static"},
            "`max_new_tokens` must be at most 22 with the 24 positions of the model, not 23",
        ),
        (  # without the start token, which is added
            {"max_new_tokens": 22, "decoder_input_ids": torch.full((2, 3), 5), "cache_implementation": "static"},
            "`max_new_tokens` must be at most 21 with the 24 positions of the model, not 22",
        ),
        (
            {"max_length": 26, "cache_implementation": "static"},
            "`max_length` must be at most 25 with the 24 positions of the model, not 26",
        ),
    ],
)
def test_wrong_options_are_refused(tiny, options, said):
    model, sources = tiny
    with pytest.raises(ValueError, match=said):
        model.generate(sources, **options)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_penalty_of_gnmt_against_all_sequences(tiny, alpha):
    model, sources = tiny
    options = {"num_beams": 180, "max_new_tokens": LONGEST, "early_stopping": "never", "num_return_sequences": 3}
    output = model.generate(
        sources, gnmt_length_penalty=alpha, return_dict_in_generate=True, output_scores=True, **options
    )
    for row, source in enumerate(sources):
        expected = best_of_all(model, source, lambda length: ((5 + length) / 6) ** alpha)
        for rank in range(3):
            score, tokens = expected[rank]
            found = output.sequences[3 * row + rank, 1 : 1 + len(tokens)].tolist()
            assert found == tokens
            assert output.sequences_scores[3 * row + rank].item() == pytest.approx(score, abs=1e-5)


def test_the_penalty_decides(tiny):
    """So that the test above can fail: penalties differ in what is best, and from that of Transformers."""
    model, sources = tiny
    best = {alpha: best_of_all(model, sources[0], lambda n, a=alpha: ((5 + n) / 6) ** a)[0][1] for alpha in ALPHAS}
    assert best[0.0] != best[3.0]
    assert best_of_all(model, sources[0], lambda length: length**3.0)[0][0] != pytest.approx(
        best_of_all(model, sources[0], lambda length: ((5 + length) / 6) ** 3.0)[0][0], abs=1e-2
    )


def test_the_penalty_is_saved_with_the_model(tiny, tmp_path):
    model, sources = tiny
    options = {"num_beams": 180, "max_new_tokens": LONGEST, "early_stopping": "never"}
    plain = model.generate(sources, **options, length_penalty=0.0)
    expected = model.generate(sources, **options, gnmt_length_penalty=3.0)
    assert not torch.equal(plain[:, :2], expected[:, :2])
    model.generation_config.gnmt_length_penalty = 3.0
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.gnmt_length_penalty == 3.0
    assert torch.equal(loaded.generate(sources, **options), expected)
    given = GenerationConfig(gnmt_length_penalty=3.0, **options)
    model.generation_config.gnmt_length_penalty = None
    assert torch.equal(model.generate(sources, given), expected)
    # What a call asks for wins over what the model has.
    assert torch.equal(loaded.generate(sources, **options, length_penalty=0.0), plain)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("a", "b", "limits"), [(1, 2, [9, 6, 4]), (1.5, None, [10, 6, 3]), (None, 5, [5, 5, 5])])
def test_each_sentence_has_its_own_limit(build, batch, num_beams, a, b, limits):
    model = build()
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}  # lengths 7, 4, 2
    tokens = model.generate(**source, num_beams=num_beams, **ENDLESS, max_len_a=a, max_len_b=b)
    assert tokens.shape[1] == 1 + max(limits)
    for row, limit in enumerate(limits):
        length = source["attention_mask"][row].sum()
        alone = model.generate(
            batch["input_ids"][row : row + 1, :length], num_beams=num_beams, **ENDLESS, max_new_tokens=limit
        )[0]
        assert torch.equal(tokens[row, : 1 + limit], alone)
        assert set(tokens[row, 1 + limit :].tolist()) <= {0, 29}  # what fills up
    without_mask = model.generate(source["input_ids"], num_beams=num_beams, **ENDLESS, max_len_a=a, max_len_b=b)
    generated = (without_mask[:, 1:] != 0) & (without_mask[:, 1:] != 29)
    assert generated.sum(1).tolist() == limits


def test_other_limits_hold_too(build, batch):
    model = build()
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    short = model.generate(**source, num_beams=2, **ENDLESS, max_len_a=1, max_len_b=2, max_new_tokens=3)
    assert short.shape[1] == 4
    for limits in ({"max_len_b": 1000}, {"max_len_a": 1e30}):
        assert model.generate(**source, **ENDLESS, **limits).shape[1] == 1 + 24  # the model's positions
        for first in (1, 5):  # the start token, and one before which it is added
            prompt = {"decoder_input_ids": torch.full((3, 5), first)}
            assert model.generate(**source, **prompt, **ENDLESS, **limits).shape[1] == 1 + 24
