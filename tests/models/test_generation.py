"""Generation: with and without a cache, by every search, for every kind of skip connection."""

import pytest
import torch

from hf_rskip import SKIP_CONNECTIONS
from hf_rskip.decoding.ensemble import Ensemble

KINDS = [
    pytest.param({"skip_type": skip_type, "skip_norm": skip_norm}, id=f"{skip_type}-{skip_norm}")
    for skip_type in ("rskip", "xskip", "pre_norm")
    for skip_norm in ("layer_norm", "rms_norm", "batch_norm", "none")
    if (skip_type, skip_norm) != ("pre_norm", "none")
]
# Without these a random model repeats one token and no row ever ends.
OPTIONS = {"no_repeat_ngram_size": 2, "eos_token_id": [2, 3, 4, 5], "max_new_tokens": 12}


def generate(model, batch, **options):
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**source, **(OPTIONS | options))


SEARCHES = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 2.0},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}
EVERY_KIND = [
    *KINDS,
    *(
        pytest.param({"skip_type": kind}, id=kind)
        for kind in SKIP_CONNECTIONS
        if kind not in ("rskip", "xskip", "pre_norm")
    ),
]


def generate_from(seed, *args, **options):
    torch.manual_seed(seed)
    return generate(*args, **options)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_cache_changes_nothing(build, batch, kind, search):
    model, options = build(**kind), SEARCHES[search] | {"min_new_tokens": 4}
    tokens = generate_from(0, model, batch, **options)
    assert tokens.shape[0] == 3 and tokens.shape[1] > 3 and len(tokens.unique()) > 4
    assert torch.all(tokens[:, 0] == 1)
    assert torch.equal(generate_from(0, model, batch, use_cache=False, **options), tokens)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_cache_of_an_ensemble_changes_nothing(build, batch, search):
    """The models differ in their layers and their kind."""
    model = Ensemble([build(), build(decoder_layers=1, skip_type="pre_norm", decoder_attention_heads=2)])
    options = SEARCHES[search]
    tokens = generate_from(0, model, batch, use_cache=False, **options)
    assert tokens.shape[0] == 3 and tokens.shape[1] > 3 and len(tokens.unique()) > 4
    assert torch.equal(generate_from(0, model, batch, **options), tokens)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate_from(0, model, batch, **options, **static), tokens)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_greedy_tokens_are_the_argmax_of_the_whole_sequence(build, batch, kind):
    model = build(**kind)
    tokens = generate(model, batch, no_repeat_ngram_size=0, eos_token_id=None)
    logits = model(batch["input_ids"], batch["attention_mask"], tokens, decoder_attention_mask=torch.ones_like(tokens))
    assert torch.equal(logits.logits[:, :-1].argmax(-1), tokens[:, 1:])


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("skip_type", SKIP_CONNECTIONS)
def test_static_cache(build, batch, skip_type, num_beams):
    model = build(skip_type=skip_type)
    tokens = generate(model, batch, num_beams=num_beams)
    static = generate(model, batch, num_beams=num_beams, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, tokens)


def test_a_row_is_the_same_alone_and_in_a_padded_batch(build, batch):
    model = build()
    together = generate(model, batch, num_beams=4)
    for row, tokens in enumerate(together):
        length = batch["attention_mask"][row].sum()
        alone = generate(model, {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}, num_beams=4)[
            0
        ]
        assert torch.equal(alone, tokens[: len(alone)]) and torch.all(tokens[len(alone) :] == 0)


def test_sampling_follows_the_seed(build, batch):
    model = build()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(generate(model, batch, do_sample=True, top_k=0, temperature=2.0, eos_token_id=None))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_past_the_last_position_is_one_sentence(build, batch, use_cache):
    with pytest.raises(ValueError) as error:
        generate(build(), batch, max_new_tokens=40, eos_token_id=None, use_cache=use_cache)
    assert str(error.value) == "The sequence has 25 tokens, more than the 24 of `max_position_embeddings`"


def test_a_checkpoint_trained_without_a_cache_decodes_with_one(build, batch, tmp_path):
    model = build()
    model.config.use_cache = False  # as the Trainer writes it
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, batch), generate(model, batch))
    assert generate(loaded, batch, return_dict_in_generate=True, use_cache=True).cache is not None
