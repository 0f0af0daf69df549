"""Configuration: defaults, round trips, and the one sentence that a wrong value raises."""

import math

import pytest
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from hf_rskip import NORMS, SKIP_CONNECTIONS, RSkipConfig, RSkipForConditionalGeneration, RSkipModel


def test_defaults():
    config = RSkipConfig()
    assert (config.skip_type, config.skip_recursions, config.skip_norm) == ("rskip", 2, "layer_norm")
    assert (config.skip_norm_affine, config.skip_scale, config.layer_norm_eps) == ("per_step", 1.0, 1e-5)
    assert config.decoder_vocab_size == config.vocab_size
    assert config.is_encoder_decoder
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (512, 8, 6)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"skip_type": "xskip", "skip_scale": 2.414, "skip_norm": "rms_norm", "layer_norm_eps": 1e-6},
        {"skip_recursions": 3, "skip_norm": "batch_norm", "skip_norm_affine": "last"},
        {"share_encoder_decoder_embeddings": False, "vocab_size": 10, "decoder_vocab_size": 12, "d_model": 64},
        {"source_lang": "en", "target_lang": "de", "dropout": 0, "eos_token_id": [2, 3], "use_cache": False},
    ],
)
def test_round_trip(values, tmp_path):
    config = RSkipConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is RSkipConfig
    assert loaded.to_json_string() == config.to_json_string()
    assert {name: getattr(loaded, name) for name in values} == values


COUNT = "an integer from 1 to 10,000,000"
COUNTS = (
    "vocab_size",
    "decoder_vocab_size",
    "d_model",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *((field, value, COUNT) for field in COUNTS for value in (0, 10_000_001)),
        *(
            (field, value, "an integer from 1 to 1,000")
            for field in ("encoder_layers", "decoder_layers")
            for value in (0, 1001)
        ),
        *(("skip_recursions", value, "an integer from 1 to 100") for value in (-1, 0, 1.5, True, "2", None, 101)),
        *(
            (field, value, "a number from 0 to below 1")
            for field in ("dropout", "attention_dropout", "activation_dropout")
            for value in (1.0, -0.1, math.nan, "0.1")
        ),
        *(("skip_scale", value, "a finite number") for value in (math.nan, math.inf, -math.inf, "1", None, True)),
        *(("layer_norm_eps", value, "a positive number") for value in (0.0, -1e-5, math.nan, math.inf, "1e-5")),
        *(
            (
                "skip_type",
                value,
                f"one of {', '.join(SKIP_CONNECTIONS)}, or one of your own, whose module is imported first "
                "(`--import_module`)",
            )
            for value in ("r_skip", "", None)
        ),
        *(("skip_norm", value, f"one of {', '.join(NORMS)} with `skip_type` 'rskip'") for value in ("layernorm", None)),
        ("skip_norm_affine", "first", "one of per_step, shared, last"),
        *(
            (field, "false", "true or false")
            for field in ("scale_embedding", "tie_word_embeddings", "learned_positions")
        ),
        ("activation_function", "rleu", "a name of `transformers.activations.ACT2FN`"),
    ],
)
def test_a_wrong_value_names_the_field_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        RSkipConfig(**{field: value})
    assert str(error.value) == f"`{field}` must be {allowed}, not {value!r}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_labels": 10**6}, "`num_labels` must be of 0 to 100,000 classes, not 1000000"),
        (
            {"skip_type": "pre_norm", "skip_norm": "none"},
            "`skip_norm` must be one of layer_norm, rms_norm, batch_norm with `skip_type` 'pre_norm', not 'none'",
        ),
        (
            {"skip_type": "rskip_detached", "skip_norm": "rms_norm"},
            "`skip_norm` must be one of layer_norm with `skip_type` 'rskip_detached', not 'rms_norm'",
        ),
        (
            {"d_model": 20, "encoder_attention_heads": 8, "decoder_attention_heads": 4},
            "`d_model` must be a multiple of `encoder_attention_heads`, 8, not 20",
        ),
        (
            {"d_model": 20, "encoder_attention_heads": 4, "decoder_attention_heads": 3},
            "`d_model` must be a multiple of `decoder_attention_heads`, 3, not 20",
        ),
        (
            {"vocab_size": 10, "decoder_vocab_size": 12},
            "`decoder_vocab_size` must be `vocab_size`, 10, with `share_encoder_decoder_embeddings`, not 12",
        ),
    ],
)
def test_values_that_do_not_go_together(values, message):
    with pytest.raises(ValueError) as error:
        RSkipConfig(**values)
    assert str(error.value) == message


def test_a_wrong_value_in_a_checkpoint_is_an_error_too(tmp_path):
    RSkipConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"skip_recursions": 2', '"skip_recursions": 0'))
    with pytest.raises(ValueError, match="`skip_recursions` must be an integer from 1 to 100, not 0"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_norm_eps": -1.0}, "`layer_norm_eps` must be a positive number, not -1.0"),
        ({"skip_type": "b2t", "skip_norm": "none"}, "`skip_norm` must be one of"),
        ({"hidden_size": 513}, "`d_model` must be a multiple of"),
        ({"decoder_vocab_size": 60}, "`decoder_vocab_size` must be `vocab_size`, 32000"),
    ],
)
def test_a_wrong_value_beside_a_checkpoint_is_an_error_too(values, message, tmp_path):
    RSkipConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, **values)
    assert AutoConfig.from_pretrained(tmp_path, vocab_size=60).decoder_vocab_size == 60
    changed, others = AutoConfig.from_pretrained(tmp_path, skip_recursions=3, unknown=1, return_unused_kwargs=True)
    assert (changed.skip_recursions, others) == (3, {"unknown": 1})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 40, "`decoder_vocab_size` must be `vocab_size`, 40, with `share_encoder_decoder_embeddings`"),
        ("skip_type", "rskp", "`skip_type` must be one of rskip"),
        ("skip_recursions", 2.5, "`skip_recursions` must be an integer"),
    ],
)
def test_a_value_that_is_set_later_is_checked_where_a_model_is_built(field, value, message):
    config = RSkipConfig(vocab_size=30)
    setattr(config, field, value)
    for build in (RSkipForConditionalGeneration, RSkipModel, AutoModelForSeq2SeqLM.from_config):
        with pytest.raises(ValueError, match=f"^{message}"):
            build(config)


def test_a_path_in_place_of_a_configuration():
    with pytest.raises(TypeError, match="should be an instance of class `PreTrainedConfig`"):
        RSkipForConditionalGeneration("outputs/quickstart")


def test_an_unknown_field_of_skip_connections(tmp_path):
    RSkipConfig().save_pretrained(tmp_path)
    known = "skip_type, skip_recursions, skip_scale, skip_norm, skip_norm_affine"
    for name in ("skip_recursion", "skip_norm_axes"):
        for make in (RSkipConfig, lambda **values: AutoConfig.from_pretrained(tmp_path, **values)):
            with pytest.raises(ValueError, match=f"^`{name}` is not a field: those that begin with skip_ are {known}$"):
                make(**{name: 3})


def test_what_is_large_but_was_trained_is_allowed():
    deep = RSkipConfig(encoder_layers=500, decoder_layers=500, skip_recursions=5)  # as deep as Wang et al. (2022)
    wide = RSkipConfig(d_model=16384, encoder_ffn_dim=65536, decoder_ffn_dim=65536, vocab_size=256_000)
    assert (deep.encoder_layers, wide.d_model) == (500, 16384)
