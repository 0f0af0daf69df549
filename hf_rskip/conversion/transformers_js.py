"""Exports to a folder that transformers.js loads as a Marian model, with a page that translates in the browser.

| file | |
|---|---|
| `onnx/encoder_model.onnx`, `onnx/decoder_model_merged.onnx` | the graphs of [`~hf_rskip.conversion.onnx`] in float32 |
| `onnx/encoder_model_quantized.onnx`, `onnx/decoder_model_merged_quantized.onnx` | in int8, its `dtype` `q8` |
| `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json` | what `pipeline("translation")` reads |
| `index.html` | the page: a text box, and the translation as greedy search writes it |

A browser opens the page from a server, such as `python -m http.server -d FOLDER`.
"""  # noqa: E501

import copy
import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..decoding.onnx import DECODER_NAME, ENCODER_NAME
from .onnx import quantize, trace, translation_graphs

PAGE_NAME = "index.html"
_NAMES = {ENCODER_NAME: "encoder_model", DECODER_NAME: "decoder_model_merged"}
_OF_BEAM_SEARCH = ("num_beams", "early_stopping", "length_penalty", "gnmt_length_penalty", "num_return_sequences")


@torch.no_grad()
def export_transformers_js(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the files of this module's table; the model is left in evaluation mode with eager attention.

    Args:
        model: one that translates.
        tokenizer: its tokenizer.
        folder: a new or empty one.

    Raises:
        [`UserError`]: if packages are missing or too old, or if the model is of another package.
    """
    programs = trace(model, translation_graphs(model))

    import onnx_ir

    graphs = folder / "onnx"
    graphs.mkdir(parents=True)
    for name, program in programs.items():
        for value in program.graph.inputs:
            value.shape[0] = "batch_size"  # the name from which transformers.js makes the first, empty cache
        onnx_ir.save(program, graphs / f"{_NAMES[name]}.onnx")
        onnx_ir.save(quantize(program), graphs / f"{_NAMES[name]}_quantized.onnx")
    config = json.loads(model.config.to_json_string()) | {"model_type": "marian"}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation_config = copy.deepcopy(model.generation_config)
    for name in _OF_BEAM_SEARCH:
        setattr(generation_config, name, None)
    generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(Path(__file__).with_name(PAGE_NAME), folder)
