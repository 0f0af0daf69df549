"""What Transformers' own tests demand of every model: weights, vocabularies, padding, generation, devices."""

import copy
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

from hf_rskip import RSkipForConditionalGeneration, RSkipModel

KINDS = [
    pytest.param({}, id="rskip"),
    pytest.param({"skip_type": "pre_norm"}, id="pre_norm"),
    pytest.param({"skip_type": "xskip", "skip_norm": "none", "skip_scale": 0.5}, id="xskip-none"),
    pytest.param({"skip_norm": "batch_norm"}, id="rskip-batch_norm"),
]
SHARED = [
    pytest.param({"skip_norm_affine": "shared"}, id="rskip-shared"),
    pytest.param({"skip_norm_affine": "shared", "skip_norm": "batch_norm"}, id="rskip-shared-batch_norm"),
]
UNTIED = {"tie_word_embeddings": False}
SEPARATE = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 33}
# Without these a random model repeats one token and no row ever ends.
OPTIONS = {"no_repeat_ngram_size": 2, "eos_token_id": [2, 3, 4, 5], "max_new_tokens": 10}


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def source_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def generate(model, batch, **options):
    return model.generate(**source_of(batch), **(OPTIONS | options))


# Weights


@pytest.mark.parametrize("embeddings", [{}, UNTIED])
def test_sharded_bfloat16_checkpoint(build, batch, tmp_path, embeddings):
    model = build(**embeddings).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert loaded.dtype == torch.bfloat16 and not any(info.values())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    wide = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == wide.model.encoder.embed_positions.weight.dtype == torch.float32
    torch.testing.assert_close(wide.state_dict(), model.float().state_dict(), rtol=0, atol=0)


def test_missing_unexpected_and_mismatched_weights(build, tmp_path, uninitialized_memory_is_nan):
    model = build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.encoder.layers.0.mlp.fc3.weight"] = weights.pop("model.encoder.layers.0.mlp.fc1.weight")
    weights["model.decoder.layers.1.mlp.fc2.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, **options)
    assert set(info["missing_keys"]) == {"model.encoder.layers.0.mlp.fc1.weight"}
    assert set(info["unexpected_keys"]) == {"model.encoder.layers.0.mlp.fc3.weight"}
    assert {key for key, *_ in info["mismatched_keys"]} == {"model.decoder.layers.1.mlp.fc2.bias"}
    for name, parameter in loaded.named_parameters():
        if name in ("model.encoder.layers.0.mlp.fc1.weight", "model.decoder.layers.1.mlp.fc2.bias"):
            assert parameter.isfinite().all() and not torch.equal(parameter, model.get_parameter(name))
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("embeddings", [{}, UNTIED])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_filled_from_meta(tiny_config, batch, uninitialized_memory_is_nan, kind, embeddings):
    with torch.device("meta"):
        model = RSkipForConditionalGeneration(tiny_config(**kind, **embeddings))
    model.to_empty(device="cpu")
    model.init_weights()
    reference = RSkipForConditionalGeneration(tiny_config(**kind, **embeddings))
    for name, tensor in model.named_parameters():
        assert tensor.isfinite().all(), name
        assert tensor.std().item() == pytest.approx(reference.get_parameter(name).std().item(), rel=0.3), name
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()), rtol=0, atol=0)
    assert model(**batch).loss.isfinite()


def test_positions_need_no_weight_initialization(tiny_config):
    # As under `accelerate.init_empty_weights`, which leaves buffers where the constructor puts them.
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = RSkipModel(tiny_config())
    expected = RSkipModel(tiny_config()).decoder.embed_positions.weight
    assert torch.equal(model.decoder.embed_positions.weight, expected)


def test_a_deep_copy_shares_nothing_but_its_own_embeddings(build, batch):
    model = build()
    other = copy.deepcopy(model)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    assert other.lm_head.weight is other.model.encoder.embed_tokens.weight
    ours, theirs = ({tensor.data_ptr() for tensor in one.parameters()} for one in (model, other))
    assert not ours & theirs


# Vocabularies


@pytest.mark.parametrize(("embeddings", "matrices"), [({}, 1), (UNTIED, 3)])
@pytest.mark.parametrize("cls", [RSkipModel, RSkipForConditionalGeneration])
def test_resized_vocabulary(build, batch, tmp_path, cls, embeddings, matrices):
    model = build(cls, **embeddings)

    def tables():
        heads = [model.lm_head] if cls is RSkipForConditionalGeneration else []
        return [model.get_encoder().embed_tokens, model.get_decoder().embed_tokens, *heads]

    old = [table.weight.detach().clone() for table in tables()]
    for size, options in ((37, {}), (40, {"pad_to_multiple_of": 8}), (25, {})):
        embeddings = model.resize_token_embeddings(33 if options else size, **options)
        assert embeddings is model.get_input_embeddings()
        assert (model.config.vocab_size, model.config.decoder_vocab_size) == (size, size)
        assert len({table.weight.data_ptr() for table in tables()}) == min(matrices, len(tables()))
        for table, before in zip(tables(), old, strict=True):
            assert table.weight.shape == (size, 16)
            assert torch.equal(table.weight[:25], before[:25])
    inputs = {**source_of(batch), "decoder_input_ids": batch["labels"].clamp(min=0)}
    expected = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(cls.from_pretrained(tmp_path)(**inputs)[0], expected)
    if cls is RSkipForConditionalGeneration:
        assert model(**batch).logits.shape[-1] == 25 and model(**batch).loss.isfinite()
        assert generate(model, batch).max() < 25


def test_vocabularies_of_their_own_cannot_be_resized(build):
    with pytest.raises(ValueError, match="`resize_token_embeddings` needs `share_encoder_decoder_embeddings`"):
        build(**SEPARATE).resize_token_embeddings(37)


def test_input_embeddings_can_be_set(build):
    model, embeddings = build(**UNTIED), nn.Embedding(30, 16)
    decoder = model.get_decoder().embed_tokens
    model.set_input_embeddings(embeddings)
    assert model.get_encoder().embed_tokens is embeddings and model.get_decoder().embed_tokens is decoder
    model = build()
    model.set_input_embeddings(embeddings)
    model.tie_weights()
    assert model.get_decoder().embed_tokens.weight is model.lm_head.weight is embeddings.weight


# Padding


def left_padded(batch):
    """The sources, each shifted to the right end of its row."""
    shifts = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        name: torch.stack([row.roll(shift) for row, shift in zip(batch[name], shifts, strict=True)])
        for name in ("input_ids", "attention_mask")
    }


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_the_side_of_the_padding_changes_nothing(build, batch, kind, attn_implementation, training):
    model = build(attn_implementation=attn_implementation, **kind).train(training)
    left = left_padded(batch)
    assert not torch.equal(left["input_ids"], batch["input_ids"])
    expected = model(**batch)
    actual = model(**left, labels=batch["labels"])
    assert_close((actual.loss, actual.logits), (expected.loss, expected.logits), 1e-4)
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        right_states = expected.encoder_last_hidden_state[row, :length]
        assert_close(actual.encoder_last_hidden_state[row, -length:], right_states, 1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_from_left_padded_sources(build, batch, num_beams):
    model = build()
    expected = generate(model, batch, num_beams=num_beams)
    assert torch.equal(generate(model, left_padded(batch), num_beams=num_beams), expected)


# Attention and recorded outputs


def test_attention_can_be_changed_on_a_built_model(build, batch):
    model = build(attn_implementation="sdpa")
    expected = model(**batch).logits
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_attentions=True)
    assert_close(outputs.logits, expected)
    assert outputs.cross_attentions[0] is not None
    assert model.get_encoder().config._attn_implementation == "eager"


def test_gradients_of_recorded_outputs_can_be_retained(build, batch):
    model = build(attn_implementation="eager").train()
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    # The last hidden states of the encoder are an output of their own.
    recorded = [
        *outputs.encoder_hidden_states[:-1],
        *outputs.decoder_hidden_states,
        *outputs.encoder_attentions,
        *outputs.decoder_attentions,
        *outputs.cross_attentions,
    ]
    for tensor in recorded:
        tensor.retain_grad()
    outputs.loss.backward()
    assert len(recorded) == 2 + 3 + 2 + 2 + 2
    assert all(tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0 for tensor in recorded)


def test_parts(build):
    model = build()
    assert model.get_encoder() is model.model.encoder is model.model.get_encoder()
    assert model.get_decoder() is model.model.decoder is model.model.get_decoder()
    assert model.get_output_embeddings() is model.lm_head


def test_the_decoder_s_part_of_the_configuration(tiny_config):
    config = tiny_config(**SEPARATE, encoder_layers=3)
    assert config.get_text_config() is config
    decoder = config.get_text_config(decoder=True)  # what caches are sized by
    assert (decoder.num_hidden_layers, decoder.num_attention_heads, decoder.vocab_size) == (2, 4, 33)


# Generation


def test_a_continuation_from_the_cache(build, batch):
    model = build()
    options = {"eos_token_id": None, "return_dict_in_generate": True}
    whole = generate(model, batch, **options)
    half = generate(model, batch, **options, max_new_tokens=5)
    rest = generate(
        model,
        batch,
        **options,
        max_new_tokens=5,
        decoder_input_ids=half.sequences,
        decoder_attention_mask=torch.ones_like(half.sequences),
        cache=half.cache,
    )
    assert torch.equal(rest.sequences, whole.sequences)
    assert_close(
        rest.cache.self_attention_cache.layers[1].keys,
        whole.cache.self_attention_cache.layers[1].keys,
    )


def test_generation_takes_the_labels_of_a_batch(build, batch):
    """As the Trainer of Transformers gives them with `predict_with_generate`."""
    model = build()
    assert torch.equal(model.generate(**batch, **OPTIONS), generate(model, batch))


@pytest.mark.parametrize("given", ["encoder_outputs", "inputs_embeds"])
def test_generation_without_source_tokens(build, batch, given):
    model, source = build(), source_of(batch)
    expected = generate(model, batch, num_beams=3)
    states = model.get_input_embeddings()(source["input_ids"])
    if given == "encoder_outputs":
        states = BaseModelOutput(model.get_encoder()(**source).last_hidden_state)
    options = OPTIONS | {given: states, "attention_mask": source["attention_mask"], "num_beams": 3}
    assert torch.equal(model.generate(**options), expected)


@pytest.mark.parametrize("assistant", ["itself", "another", "prompt"])
def test_assisted_decoding_is_greedy_decoding(build, batch, assistant):
    model = build()
    row = {name: tensor[:1] for name, tensor in batch.items()}  # assistance is for one row at a time
    options = {"eos_token_id": None, "no_repeat_ngram_size": 0}
    expected = generate(model, row, **options)
    helper = {
        "itself": {"assistant_model": copy.deepcopy(model)},
        "another": {"assistant_model": build(decoder_layers=1, encoder_layers=1)},
        "prompt": {"prompt_lookup_num_tokens": 3},
    }[assistant]
    assert torch.equal(generate(model, row, **options, **helper), expected)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}, {"do_sample": True}])
def test_returned_scores_and_attentions(build, batch, search):
    model = build(attn_implementation="eager")
    torch.manual_seed(0)
    several = {"num_return_sequences": 2} if len(search) else {}
    outputs = generate(
        model,
        batch,
        **search,
        **several,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    beams = search.get("num_beams", 2 if several else 1)
    rows, steps = 3 * beams, 10
    assert outputs.sequences.shape == (6 if several else 3, 1 + steps)
    assert [tuple(logits.shape) for logits in outputs.logits] == [(rows, 30)] * steps
    assert len(outputs.scores) == len(outputs.decoder_attentions) == len(outputs.cross_attentions) == steps
    assert [weights.shape[0] for weights in outputs.encoder_attentions] == [3, 3]
    for step in range(steps):
        assert [tuple(weights.shape) for weights in outputs.decoder_attentions[step]] == [(rows, 4, 1, step + 1)] * 2
        assert [tuple(weights.shape) for weights in outputs.cross_attentions[step]] == [(rows, 4, 1, 7)] * 2
        assert [tuple(states.shape) for states in outputs.decoder_hidden_states[step]] == [(rows, 1, 16)] * 3
    indices = outputs.get("beam_indices")
    chosen = model.compute_transition_scores(outputs.sequences, outputs.scores, indices, normalize_logits=False)
    if "do_sample" not in search:
        logits = model(
            **{name: tensor.repeat_interleave(2 if several else 1, 0) for name, tensor in source_of(batch).items()},
            decoder_input_ids=outputs.sequences,
            decoder_attention_mask=torch.ones_like(outputs.sequences),
        ).logits[:, :-1]
        if search:
            logits = logits.log_softmax(-1)
        assert_close(chosen, logits.gather(-1, outputs.sequences[:, 1:, None])[..., 0], 1e-4)


def test_a_compiled_step_with_a_static_cache(build, batch):
    torch._dynamo.reset()
    model = build(encoder_layers=1, decoder_layers=1)
    tokens = generate(model, batch)
    steps = []

    def count(graph, inputs):
        steps.append(graph)
        return graph.forward

    model.forward = torch.compile(model.forward, backend=count, fullgraph=True)
    static = generate(model, batch, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, tokens)
    assert 1 <= len(steps) <= 3  # the first step, the others, and once more if the length becomes a symbol


# Devices


@pytest.mark.parametrize("kind", [*KINDS, *SHARED])
@pytest.mark.parametrize("place", ["auto", "disk"])
def test_layers_off_the_device(build, batch, tmp_path, kind, place):
    pytest.importorskip("accelerate")
    model = build(**kind, **UNTIED)
    model.save_pretrained(tmp_path)
    if place == "disk":
        place = {"model.encoder": "cpu", "model.decoder": "disk", "lm_head": "cpu"}
    options = {"device_map": place, "offload_folder": tmp_path / "offload"}
    loaded = RSkipForConditionalGeneration.from_pretrained(tmp_path, **options)
    on_meta = {name for name, parameter in loaded.named_parameters() if parameter.is_meta}
    decoder = {name for name, _ in loaded.named_parameters() if name.startswith("model.decoder.")}
    assert on_meta == (set() if place == "auto" else decoder)
    assert_close(loaded(**batch).logits, model(**batch).logits)
    assert torch.equal(generate(loaded, batch), generate(model, batch))


TENSOR_PARALLEL = """
import sys
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from hf_rskip import RSkipForConditionalGeneration

torch.distributed.init_process_group("gloo")
sharded = RSkipForConditionalGeneration.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
whole = RSkipForConditionalGeneration.from_pretrained(sys.argv[1])
batch = torch.load(sys.argv[2])
losses = [model(**batch).loss for model in (sharded, whole)]
torch.testing.assert_close(*losses)
for loss in losses:
    loss.backward()
split = []
for name, parameter in sharded.named_parameters():
    expected = whole.get_parameter(name)
    gradient = parameter.grad
    if isinstance(parameter, DTensor):
        if parameter.to_local().numel() * 2 == expected.numel():
            split.append(name)
        gradient = gradient.full_tensor()
    torch.testing.assert_close(gradient, expected.grad, rtol=1e-4, atol=1e-5)
source = {name: batch[name] for name in ("input_ids", "attention_mask")}
tokens = [model.generate(**source, num_beams=3, max_new_tokens=8) for model in (sharded, whole)]
assert torch.equal(*tokens)
print(f"{len(split)}\\n", end="", flush=True)  # in one piece, as two processes print
torch.distributed.destroy_process_group()
"""


def test_tensor_parallelism_in_two_processes(build, batch, warm_python, tmp_path):
    build().save_pretrained(tmp_path / "model")
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "program.py").write_text(TENSOR_PARALLEL)
    command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(tmp_path / name) for name in ("program.py", "model", "batch.pt")]
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    # Of an attention all but the output's bias, of an MLP all but the second bias, and the one matrix of embeddings.
    encoder_layer, decoder_layer = 7 + 3, 2 * 7 + 3
    assert run.stdout.split() == [str(1 + 2 * encoder_layer + 2 * decoder_layer)] * 2
