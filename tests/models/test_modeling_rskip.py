"""The model as Transformers expects it: training, loading, masks, recorded outputs, compilation."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, Seq2SeqModelOutput

from hf_rskip import SKIP_CONNECTIONS, RSkip, RSkipForConditionalGeneration, RSkipModel

KINDS = [
    pytest.param({"skip_type": skip_type, "skip_norm": skip_norm}, id=f"{skip_type}-{skip_norm}")
    for skip_type in ("rskip", "xskip", "pre_norm")
    for skip_norm in ("layer_norm", "rms_norm", "batch_norm")
] + [
    pytest.param({"skip_type": skip_type}, id=skip_type)
    for skip_type in SKIP_CONNECTIONS
    if skip_type not in ("rskip", "xskip", "pre_norm")
]
EMBEDDINGS = [
    pytest.param({}, 1, id="shared"),
    pytest.param({"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 33}, 2, id="separate"),
    pytest.param({"tie_word_embeddings": False}, 3, id="untied"),
]


def without_labels(batch):
    """The batch with the decoder's input written out, as Marian and BART would shift the labels."""
    decoder_input_ids = nn.functional.pad(batch["labels"], (1, -1), value=1)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "decoder_input_ids": decoder_input_ids.masked_fill(decoder_input_ids == -100, 0),
    }


def gradients(model, **inputs):
    """The loss and every gradient of one backward pass."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(build, batch, kind):
    model = build(**kind).train()
    loss, grads = gradients(model, **batch)
    assert loss.isfinite()
    for name, gradient in grads.items():
        assert gradient.isfinite().all()
        # Softmax does not see the bias of the keys, nor batch normalisation that of a branch before it.
        assert gradient.abs().max() > 0 or name.endswith(("k_proj.bias", "fc2.bias", "out_proj.bias")), name
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.step()
    assert model(**batch).loss < loss


def test_loss_is_the_cross_entropy_of_labels_that_are_shifted_once(build, batch):
    model = build()
    labels = batch["labels"]
    logits = model(**without_labels(batch)).logits
    token_losses = [
        -logits[row, column].log_softmax(-1)[labels[row, column]]
        for row in range(len(labels))
        for column in range(labels.shape[1])
        if labels[row, column] != -100
    ]
    assert len(token_losses) == 3 + 6 + 5
    assert_close(model(**batch).loss, torch.stack(token_losses).mean())
    assert_close(model(**batch, num_items_in_batch=7).loss, torch.stack(token_losses).sum() / 7)


def test_gradient_accumulation_adds_up(build):
    torch.manual_seed(0)
    model = build().train()
    source_lengths, lengths = torch.randint(2, 9, (2, 8)).tolist()
    input_ids, labels = torch.randint(3, 30, (2, 8, 9))
    attention_mask = torch.zeros_like(input_ids)
    for row in range(8):
        attention_mask[row, : source_lengths[row]] = 1
        labels[row, lengths[row] :] = -100
    items = torch.tensor(sum(lengths))
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    loss, grads = gradients(model, **batch, num_items_in_batch=items)
    sums = dict.fromkeys(grads, 0.0)
    total = 0.0
    for row in range(8):
        source, target = input_ids[row, : source_lengths[row]], labels[row, : lengths[row]]
        part, part_grads = gradients(model, input_ids=source[None], labels=target[None], num_items_in_batch=items)
        total += part
        sums = {name: sums[name] + part_grads[name] for name in sums}
    assert_close(loss, total)
    assert_close(grads, sums)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(build, batch, kind):
    model = build(**kind, dropout=0.2).train()
    torch.manual_seed(3)
    expected = gradients(model, **batch)
    calls = []
    for stack in (model.model.encoder, model.model.decoder):
        stack.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    assert_close(gradients(model, **batch), expected)
    assert len(calls) == 4  # each layer once forward and once more on the way back


# Saving and loading


def embedding_matrices(model):
    weights = (model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, model.lm_head)
    return {module.weight.data_ptr() for module in weights}


@pytest.mark.parametrize(("embeddings", "matrices"), EMBEDDINGS)
@pytest.mark.parametrize("kind", KINDS[::4])
def test_save_and_load(build, batch, tmp_path, uninitialized_memory_is_nan, kind, embeddings, matrices):
    model = build(**kind, **embeddings)
    model.train()(**batch)  # running statistics that are not the initial ones
    model.eval().save_pretrained(tmp_path)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is RSkipForConditionalGeneration
    assert not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert len(embedding_matrices(model)) == len(embedding_matrices(loaded)) == matrices
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize(("embeddings", "matrices"), EMBEDDINGS)
def test_base_model_and_head_load_each_others_checkpoints(
    build, batch, tmp_path, uninitialized_memory_is_nan, embeddings, matrices
):
    head = build(**embeddings)
    head.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert type(base) is RSkipModel
    assert not info["missing_keys"]
    base.save_pretrained(tmp_path / "base")
    again, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    # An output projection of its own is not in the base model; all else is.
    assert set(info["missing_keys"]) == ({"lm_head.weight"} if matrices == 3 else set())
    if matrices == 3:
        assert again.lm_head.weight.isfinite().all()
    else:
        assert torch.equal(again(**batch).logits, head(**batch).logits)
    inputs = without_labels(batch)
    states = head(**inputs, output_hidden_states=True).decoder_hidden_states[-1]
    assert torch.equal(base(**inputs).last_hidden_state, states)
    assert len(embedding_matrices(again)) == matrices


def test_models_can_be_built_on_meta(tiny_config):
    with torch.device("meta"):
        model = RSkipForConditionalGeneration(tiny_config())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


# Forward


def test_sinusoids_are_not_in_the_checkpoint(build):
    assert not [name for name in build().state_dict() if "embed_positions" in name]


@pytest.mark.parametrize("skip_type", ["rskip", "pre_norm"])
def test_recorded_outputs(build, batch, skip_type):
    model = build(attn_implementation="eager", skip_type=skip_type, encoder_layers=3)
    inputs = without_labels(batch)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    source, target = inputs["input_ids"].shape[1], inputs["decoder_input_ids"].shape[1]
    assert [tuple(states.shape) for states in outputs.encoder_hidden_states] == [(3, source, 16)] * 4
    assert [tuple(states.shape) for states in outputs.decoder_hidden_states] == [(3, target, 16)] * 3
    assert [tuple(weights.shape) for weights in outputs.encoder_attentions] == [(3, 2, source, source)] * 3
    assert [tuple(weights.shape) for weights in outputs.decoder_attentions] == [(3, 4, target, target)] * 2
    assert [tuple(weights.shape) for weights in outputs.cross_attentions] == [(3, 4, target, source)] * 2
    assert torch.equal(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    base = model.model(**inputs)
    assert torch.equal(outputs.decoder_hidden_states[-1], base.last_hidden_state)
    for weights in (*outputs.encoder_attentions, *outputs.decoder_attentions, *outputs.cross_attentions):
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    padding = inputs["attention_mask"][:, None, None, :] == 0
    assert all(weights.masked_select(padding).abs().max() == 0 for weights in outputs.cross_attentions)
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.logits)
    model.config.return_dict = False
    assert torch.equal(model(**inputs)[0], outputs.logits)
    assert torch.equal(model.model(**inputs)[0], base.last_hidden_state)


@pytest.mark.parametrize("layers", [(3, 2), (2, 3)])
def test_hidden_states_by_a_negative_index(build, batch, layers):
    model = build(encoder_layers=layers[0], decoder_layers=layers[1])
    inputs = without_labels(batch)
    every, last = (model(**inputs, output_hidden_states=asked) for asked in (True, [-1]))
    for name, count in zip(("encoder_hidden_states", "decoder_hidden_states"), layers, strict=True):
        *others, found = last[name]
        assert others == [None] * count and torch.equal(found, every[name][-1])


@pytest.mark.parametrize("kind", KINDS)
def test_eager_is_sdpa(build, batch, kind):
    eager, sdpa = (build(attn_implementation=name, **kind).train() for name in ("eager", "sdpa"))
    assert_close(gradients(eager, **batch), gradients(sdpa, **batch))


def test_flex_attention_is_sdpa(build, batch):
    # Without compilation, which takes a minute on a CPU.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = [build(attn_implementation=name)(**batch).logits for name in ("flex_attention", "sdpa")]
    assert_close(*logits)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_source_padding_is_never_seen(build, batch, kind, training):
    # The outputs of a batch norm with random statistics are large.
    model = build(**kind).double().train(training)
    expected = model(**batch)
    garbage = torch.randint(3, 30, batch["input_ids"].shape)
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], garbage)
    batch["input_ids"] = nn.functional.pad(batch["input_ids"], (0, 3), value=9)
    batch["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 3))
    assert_close(model(**batch).logits, expected.logits, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_causal(build, batch, kind):
    model = build(**kind)
    inputs = without_labels(batch)
    expected = model(**inputs).logits
    inputs["decoder_input_ids"][:, 3:] = (inputs["decoder_input_ids"][:, 3:] + 3) % 27 + 3  # none as it was
    logits = model(**inputs).logits
    assert_close(logits[:, :3], expected[:, :3])
    assert (logits[:, 3:] - expected[:, 3:]).abs().amax(-1).min() > 1e-3


def test_logits_to_keep(build, batch):
    model, inputs = build(), without_labels(batch)
    logits = model(**inputs).logits
    assert_close(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])
    mask = torch.arange(logits.shape[1]) < torch.arange(1, 1 + len(logits))[:, None]
    assert_close(model(**inputs, logits_to_keep=mask).logits, logits[mask])


def test_attention_takes_no_tokens(build):
    # As exported graphs do where all keys of the source are in the cache.
    attention = build(d_model=32).model.decoder.layers[0].encoder_attn
    assert attention._split_heads(torch.empty(3, 0, 32)).shape == (3, 32 // attention.head_dim, 0, attention.head_dim)


def test_embeddings_in_place_of_tokens(build, batch):
    model, inputs = build(), without_labels(batch)
    expected = model(**inputs).logits
    embed_tokens = model.get_input_embeddings()
    logits = model(
        inputs_embeds=embed_tokens(inputs["input_ids"]),
        attention_mask=inputs["attention_mask"],
        decoder_inputs_embeds=embed_tokens(inputs["decoder_input_ids"]),
    ).logits
    assert_close(logits, expected)
    with pytest.raises(ValueError, match="^RSkipEncoder.forward.. needs exactly one of input_ids and inputs_embeds$"):
        model(**inputs, inputs_embeds=embed_tokens(inputs["input_ids"]))
    with pytest.raises(ValueError, match="^RSkipDecoder.forward.. needs exactly one of input_ids and inputs_embeds$"):
        model(inputs["input_ids"])


@pytest.mark.parametrize("kind", [tuple, BaseModelOutput, BaseModelOutputWithPast, Seq2SeqModelOutput])
def test_encoder_outputs_in_place_of_the_source(build, batch, kind):
    model, inputs = build(), without_labels(batch)
    expected = model(**inputs).logits
    states = model.get_encoder()(inputs.pop("input_ids"), inputs["attention_mask"]).last_hidden_state
    encoder_outputs = (states,) if kind is tuple else kind(last_hidden_state=states)
    assert_close(model(**inputs, encoder_outputs=encoder_outputs).logits, expected)


@pytest.mark.parametrize("side", ["source", "target"])
def test_too_long_a_sequence_is_one_sentence(build, side):
    long, short = torch.full((1, 25), 3), torch.full((1, 4), 3)
    source, target = (long, short) if side == "source" else (short, long)
    with pytest.raises(ValueError) as error:
        build()(input_ids=source, decoder_input_ids=target)
    assert str(error.value) == "The sequence has 25 tokens, more than the 24 of `max_position_embeddings`"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(build, batch, kind, training):
    model = build(**kind).bfloat16().train(training)
    outputs = model(**batch)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.logits.isfinite().all() and outputs.loss.isfinite()
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(build, batch, kind):
    model = build(**kind).train()
    expected = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_compiles_without_a_graph_break(build, batch, kind):
    torch._dynamo.reset()
    encoder = build(**kind, encoder_layers=1).get_encoder().train()
    upstream = torch.randn(*batch["input_ids"].shape, 16) * batch["attention_mask"][:, :, None]

    def states_and_gradients(call):
        encoder.zero_grad()
        states = call(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        states.backward(upstream)
        return states[upstream != 0], [parameter.grad.clone() for parameter in encoder.parameters()]

    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert_close(states_and_gradients(compiled), states_and_gradients(encoder))


@pytest.mark.parametrize("kind", [{}, {"skip_type": "pre_norm", "skip_norm": "batch_norm"}], ids=["rskip", "pre_norm"])
def test_compiles_without_a_graph_break(build, batch, kind):
    torch._dynamo.reset()
    model = build(**kind, encoder_layers=1, decoder_layers=1).train()
    expected = gradients(model, **batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close((loss, actual), expected)


# Vocabularies


@pytest.mark.parametrize(("embeddings", "matrices"), EMBEDDINGS)
def test_vocabularies_train_and_generate(build, batch, embeddings, matrices):
    model = build(**embeddings).train()
    batch["labels"][0, 0] = model.config.decoder_vocab_size - 1
    loss, grads = gradients(model, **batch)
    assert loss.isfinite()
    assert len([name for name in grads if "embed_tokens" in name or "lm_head" in name]) == matrices
    assert model(**batch).logits.shape[-1] == model.config.decoder_vocab_size
    assert model.eval().generate(batch["input_ids"], max_new_tokens=4).shape[0] == 3


# Batch normalisation


@pytest.mark.parametrize("given", ["labels", "decoder_input_ids", "decoder_attention_mask"])
def test_padding_never_enters_running_statistics(build, batch, given):
    model = build(skip_norm="batch_norm", skip_recursions=1).train()
    inputs = without_labels(batch)
    # The end token 2 is an input only behind the end of a sentence that is not the longest.
    keep = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != -100}
    if given == "labels":
        inputs = batch
    elif given == "decoder_attention_mask":
        inputs["decoder_attention_mask"] = keep["decoder"].long()
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"].masked_fill(~keep["decoder"], 7)
    peers = {}

    def feed_peer(name):
        def hook(skip, args):
            x, branch, _ = args
            peers[name] = nn.BatchNorm1d(16)
            peers[name]((x + branch)[keep[name.split(".")[1]]])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, RSkip):
            module.register_forward_pre_hook(feed_peer(name))
    model(**inputs)
    assert len(peers) == 10
    for name, peer in peers.items():
        assert_close(dict(model.get_submodule(name).norm[0].named_buffers()), dict(peer.named_buffers()))
    assert any(not math.isclose(value, 0, abs_tol=1e-3) for value in peer.running_mean.tolist())


@pytest.mark.parametrize("skip_type", ["rskip", "xskip", "pre_norm"])
def test_batch_statistics_do_not_depend_on_the_width_of_the_padding(build, batch, skip_type):
    narrow, wide = (build(skip_type=skip_type, skip_norm="batch_norm").train() for _ in range(2))
    inputs = without_labels(batch)
    narrow(**inputs)
    wide(**{name: nn.functional.pad(tensor, (0, 5)) for name, tensor in inputs.items()})
    assert_close(dict(wide.named_buffers()), dict(narrow.named_buffers()))
