"""Converts the weights of a MarianMTModel and translates with CTranslate2; runs in the environment of the peer.

    python ctranslate2_worker.py FOLDER

FOLDER holds `config.json` and `tokens.json` (the vocabulary, in the order of the ids), and `weights.npz` with the names
of Transformers. Each line of standard input is a JSON object of `sources`, the tokens of the sentences, and `options`
of `translate_batch`; the answer holds `tokens` and `seconds` of processor time.
"""

import json
import math
import sys
import time
from pathlib import Path

import ctranslate2
import numpy
from ctranslate2.specs import TransformerSpec, common_spec


def set_linear(spec, weights, *names):
    """One linear layer, or several that share their input as one."""
    spec.weight = numpy.concatenate([weights[f"{name}.weight"] for name in names])
    spec.bias = numpy.concatenate([weights[f"{name}.bias"] for name in names])


def set_norm(spec, weights, name):
    spec.gamma, spec.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]


def set_stack(spec, embeddings, weights, name, config):
    spec.scale_embeddings = math.sqrt(config["d_model"]) if config["scale_embedding"] else 1.0
    spec.position_encodings.encodings = weights[f"{name}.embed_positions.weight"]
    embeddings.weight = weights[f"{name}.embed_tokens.weight"]
    for number, layer in enumerate(spec.layer):
        prefix = f"{name}.layers.{number}"
        attention, own = layer.self_attention, f"{prefix}.self_attn"
        set_linear(attention.linear[0], weights, *(f"{own}.{part}_proj" for part in "qkv"))
        set_linear(attention.linear[1], weights, f"{own}.out_proj")
        set_norm(attention.layer_norm, weights, f"{own}_layer_norm")
        if f"{prefix}.encoder_attn.q_proj.weight" in weights:
            attention, cross = layer.attention, f"{prefix}.encoder_attn"
            set_linear(attention.linear[0], weights, f"{cross}.q_proj")
            set_linear(attention.linear[1], weights, f"{cross}.k_proj", f"{cross}.v_proj")
            set_linear(attention.linear[2], weights, f"{cross}.out_proj")
            set_norm(attention.layer_norm, weights, f"{cross}_layer_norm")
        set_linear(layer.ffn.linear_0, weights, f"{prefix}.fc1")
        set_linear(layer.ffn.linear_1, weights, f"{prefix}.fc2")
        set_norm(layer.ffn.layer_norm, weights, f"{prefix}.final_layer_norm")


def convert(folder):
    config = json.loads((folder / "config.json").read_text())
    tokens = json.loads((folder / "tokens.json").read_text())
    weights = dict(numpy.load(folder / "weights.npz"))
    spec = TransformerSpec.from_config(
        (config["encoder_layers"], config["decoder_layers"]),
        config["encoder_attention_heads"],
        pre_norm=False,
        activation=common_spec.Activation.RELU,
    )
    set_stack(spec.encoder, spec.encoder.embeddings[0], weights, "model.encoder", config)
    set_stack(spec.decoder, spec.decoder.embeddings, weights, "model.decoder", config)
    spec.decoder.projection.weight = weights["lm_head.weight"]
    if weights["final_logits_bias"].any():
        spec.decoder.projection.bias = weights["final_logits_bias"].squeeze(0)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.eos_token = tokens[config["eos_token_id"]]
    spec.config.decoder_start_token = tokens[config["decoder_start_token_id"]]
    spec.config.add_source_eos = False
    spec.validate()
    spec.optimize(quantization="float32")
    (folder / "ctranslate2").mkdir()
    spec.save(str(folder / "ctranslate2"))


def main():
    folder = Path(sys.argv[1])
    convert(folder)
    translator = ctranslate2.Translator(
        str(folder / "ctranslate2"), compute_type="float32", inter_threads=1, intra_threads=1
    )
    for line in sys.stdin:
        request = json.loads(line)
        start = time.process_time()
        results = translator.translate_batch(request["sources"], **request["options"])
        seconds = time.process_time() - start
        print(json.dumps({"tokens": [result.hypotheses[0] for result in results], "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
