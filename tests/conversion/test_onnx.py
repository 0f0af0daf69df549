"""Exported graphs against the model in torch: every kind of skip connection, padding, first and later steps, greedy
search; and what a user is told when something is missing."""

import contextlib
import inspect
import io
import re
import shutil
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from torch.export import Dim
from transformers import AutoModelForImageClassification, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_rskip import (
    PreNorm,
    RSkip,
    XSkip,
)
from hf_rskip.cli.export import FORMATS
from hf_rskip.cli.main import main
from hf_rskip.conversion.onnx import _create_exporter, _export, export_onnx, quantize
from hf_rskip.decoding.beam_search import beam_search
from hf_rskip.decoding.loading import load_ensemble, load_translator
from hf_rskip.decoding.onnx import OnnxTranslationModel
from hf_rskip.decoding.translate import translate, translate_n_best
from hf_rskip.errors import UserError
from hf_rskip.models.skip_connections import B2T, Admin, DeepNorm, DetachedRSkip, Keel, PeriNorm, ReZero

SOURCE_LENGTHS = [7, 4, 2]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained model, exported by the command."""
    folder = tmp_path_factory.mktemp("exported")
    assert main(["export", str(trained.folder), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def onnx_model(exported):
    return OnnxTranslationModel(exported)


def random_batch(lengths, vocab_size):
    rng = np.random.default_rng(0)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return rng.integers(4, vocab_size, mask.shape) * mask, mask


def run(session, **inputs):
    names = [spec.name for spec in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def decoder_logits(folder, config, input_ids, attention_mask, pieces):
    """States of the encoder, and logits of the target `pieces`, each decoded after the ones before it, by nothing but
    the documented names."""
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    (states,) = run(encoder, input_ids=input_ids, attention_mask=attention_mask).values()
    heads, past, logits = config.decoder_attention_heads, {}, []
    for layer in range(config.decoder_layers):
        for stack, batch in (("encoder", len(input_ids)), ("decoder", len(pieces[0]))):
            for name in ("key", "value"):
                empty = np.zeros((batch, heads, 0, config.d_model // heads), np.float32)
                past[f"past_key_values.{layer}.{stack}.{name}"] = empty
    for piece in pieces:
        inputs = {"input_ids": piece, "encoder_attention_mask": attention_mask, "encoder_hidden_states": states}
        outputs = run(decoder, **inputs, **past)
        logits.append(outputs.pop("logits"))
        past = {f"past_key_values.{name.removeprefix('present.')}": value for name, value in outputs.items()}
    return states, np.concatenate(logits, axis=1)


def assert_equal_to_torch(folder, model, lengths, cuts, beams=1, atol=1e-4):
    """Every prefix of the target is decoded at once or in pieces; logits at all positions, states at real ones."""
    input_ids, attention_mask = random_batch(lengths, model.config.vocab_size)
    target = np.random.default_rng(1).integers(4, model.config.vocab_size, (len(lengths) * beams, 9))
    target[:, 0] = model.config.decoder_start_token_id
    with torch.no_grad():
        repeated = (torch.from_numpy(array).repeat_interleave(beams, 0) for array in (input_ids, attention_mask))
        expected = model(*repeated, torch.from_numpy(target))
    states, logits = decoder_logits(folder, model.config, input_ids, attention_mask, np.split(target, cuts, axis=1))
    real = attention_mask.astype(bool)
    expected_states = expected.encoder_last_hidden_state[::beams].numpy()
    np.testing.assert_allclose(states[real], expected_states[real], atol=atol, rtol=0)
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=atol, rtol=0)
    assert logits.std() > 0.1


@pytest.mark.parametrize("lengths", [SOURCE_LENGTHS, [1], [64, 1], [3, 3, 3, 3]], ids=str)
@pytest.mark.parametrize("cuts", [[], [1], [*range(1, 9)], [4, 6]], ids=["at once", "prefill", "steps", "pieces"])
def test_graphs_equal_the_model(exported, model_and_tokenizer, lengths, cuts):
    assert_equal_to_torch(exported, model_and_tokenizer[0], lengths, cuts)


def test_several_rows_for_each_source(exported, model_and_tokenizer):
    assert_equal_to_torch(exported, model_and_tokenizer[0], SOURCE_LENGTHS, [1, 2, 5], beams=4)


class EveryKind(torch.nn.Module):
    """All kinds of skip connections one after the other, around linear layers."""

    def __init__(self, size):
        super().__init__()
        self.skips = torch.nn.ModuleList(
            make(size)
            for make in [
                partial(RSkip, recursions=1),
                partial(RSkip, recursions=2, norm="rms_norm"),
                partial(RSkip, recursions=3, norm="batch_norm"),
                partial(RSkip, recursions=3, affine="shared"),
                partial(RSkip, recursions=3, affine="last", norm="rms_norm"),
                partial(DetachedRSkip, recursions=2),
                partial(XSkip, scale=1.7),
                partial(XSkip, scale=0.5, norm="none"),
                partial(PreNorm),
                partial(PreNorm, norm="batch_norm"),
                partial(PeriNorm),
                partial(B2T),
                partial(Admin, scale=1.5),
                partial(Keel, scale=6.0),
                partial(ReZero, norm="none"),
                partial(DeepNorm, scale=1.2, beta=0.5),
            ]
        )
        self.linears = torch.nn.ModuleList(torch.nn.Linear(size, size) for _ in self.skips)

    def forward(self, x, mask):
        for skip, linear in zip(self.skips, self.linears, strict=True):
            x = skip(x, linear(skip.before(x, mask)), mask)
        return {"states": x}


def randomize(module):
    """Moves weights and statistics away from their initial values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return module.eval()


def test_every_kind_of_skip_connection(tmp_path):
    module = randomize(EveryKind(16))
    inputs = {"x": torch.randn(3, 7, 16), "mask": torch.arange(7) < torch.tensor([7, 4, 2])[:, None]}
    shapes = {"x": {0: Dim.AUTO, 1: Dim.AUTO}, "mask": {0: Dim.AUTO, 1: Dim.AUTO}}
    onnx_ir.save(_export(_create_exporter(), module, inputs, shapes), tmp_path / "kinds.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "kinds.onnx")
    for lengths in (SOURCE_LENGTHS, [1], [64, 1]):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        x = torch.randn(*mask.shape, 16)
        (states,) = run(session, x=x.numpy(), mask=mask.numpy()).values()
        with torch.no_grad():
            expected = module(x, mask)["states"]
        np.testing.assert_allclose(states[mask.numpy()], expected[mask].numpy(), atol=1e-4, rtol=0)
        assert expected.std() > 0.1


# Search


def count_same_tokens(onnx_model, model, **options):
    """The number of different translations of five random sources, which both models give."""
    input_ids, attention_mask = map(torch.from_numpy, random_batch([7, 4, 2, 9, 1], model.config.vocab_size))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **options}
    tokens = onnx_model.generate(**inputs)
    torch.testing.assert_close(tokens, model.generate(**inputs), rtol=0, atol=0)
    return len({tuple(row) for row in tokens.tolist()})


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 1, "max_new_tokens": 6},
        {"num_beams": 4},
        {"num_beams": 5, "gnmt_length_penalty": 0.6, "num_return_sequences": 3},
        {"num_beams": 4, "max_len_a": 1.5, "max_len_b": 2, "no_repeat_ngram_size": 2},
        {"num_beams": 4, "decoder_input_ids": torch.tensor([[2, 9, 30]] * 5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("custom_generate", [None, beam_search], ids=["transformers", "ours"])
def test_search_gives_the_tokens_of_torch(onnx_model, model_and_tokenizer, options, custom_generate):
    if options["num_beams"] > 1:
        options = {"custom_generate": custom_generate, **options}
    assert count_same_tokens(onnx_model, model_and_tokenizer[0], **options) > 3


def test_translations_and_scores(exported, trained, pairs):
    """Also of an ensemble with the model in torch, which is the same model twice."""
    sources = [pair["en"] for pair in pairs["test"]]
    options = {"n_best": 3, "num_beams": 4, "max_batch_tokens": 200}
    expected = translate_n_best(*load_ensemble([str(trained.folder)]), sources, **options)
    for names in ([str(exported)], [str(exported), str(trained.folder)]):
        found = translate_n_best(*load_ensemble(names), sources, **options)
        for ours, theirs in zip(found, expected, strict=True):
            assert [hypothesis.text for hypothesis in ours] == [hypothesis.text for hypothesis in theirs]
            assert [hypothesis.score for hypothesis in ours] == pytest.approx(
                [hypothesis.score for hypothesis in theirs], abs=1e-4
            )


def test_int8(exported, model_and_tokenizer, tmp_path):
    for name in ("encoder.onnx", "decoder.onnx"):
        onnx_ir.save(quantize(onnx_ir.load(exported / name)), tmp_path / name)
    graph = onnx.load(tmp_path / "decoder.onnx").graph
    types = {tuple(each.dims): each.data_type for each in graph.initializer}
    words = model_and_tokenizer[0].config.decoder_vocab_size
    assert types[32, 64] == types[64, 32] == types[32, words] == onnx.TensorProto.INT8 != types[words, 32]
    assert_equal_to_torch(tmp_path, model_and_tokenizer[0], SOURCE_LENGTHS, [1, 2, 5], beams=2, atol=0.2)


def test_a_search_ends_at_the_last_position(onnx_model):
    input_ids, attention_mask = map(torch.from_numpy, random_batch([3], 300))
    with pytest.raises(ValueError, match="The sequence has 65 tokens, more than the 64 of"):
        onnx_model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=1000, suppress_tokens=[2])
    with pytest.raises(ValueError, match="The sequence has 65 tokens, more than the 64 of"):
        onnx_model.generate(torch.from_numpy(random_batch([65], 300)[0]))


# Files and mistakes


def test_the_folder(exported, trained):
    assert {path.name for path in exported.iterdir()} == {
        "manifest.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "encoder.onnx",
        "decoder.onnx",
    }
    assert (exported / "tokenizer.json").read_bytes() == (trained.folder / "tokenizer.json").read_bytes()
    for name in ("encoder.onnx", "decoder.onnx"):
        assert b".py" not in (exported / name).read_bytes()  # stack traces with paths of this machine


def error_of(capfd, *words):
    assert main(["export", *map(str, words)]) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("hf-rskip: error: ") and not captured.out
    return line


def test_mistakes(trained, tmp_path, capfd):
    assert "/no/such/model" in error_of(capfd, "/no/such/model", tmp_path / "new")
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path, tmp_path / "file"):
        assert f"{str(output)!r} already exists and is not an empty folder" in error_of(capfd, "/no/model", output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_writer(name):
    module, _, writer = FORMATS[name].writer.partition(".")
    parameters = inspect.signature(getattr(import_module(f"hf_rskip.conversion.{module}"), writer)).parameters
    assert ("quantization" in parameters) == bool(FORMATS[name].quantizations)


def test_missing_packages(trained, exported, tmp_path, capfd, monkeypatch):
    from transformers.exporters.exporter_onnx import OnnxExporter

    monkeypatch.setattr(OnnxExporter, "required_packages", ["torch", "no_such_package"])
    line = error_of(capfd, trained.folder, tmp_path / "new")
    assert "`pip install 'hf_rskip[onnx]'`" in line and "no_such_package" in line
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'hf_rskip\[onnx\]'"):
        OnnxTranslationModel(exported)
    for options in ([], ["--quantization", "int8"], ["--format", "transformers.js"]):
        assert "Export to ONNX needs `pip install 'hf_rskip[onnx]'`" in error_of(
            capfd, trained.folder, tmp_path / "new", *options
        )
        assert not (tmp_path / "new").exists()


def test_a_model_of_another_package(make_marian, tmp_path):
    with pytest.raises(UserError, match="of models of this package, not of type 'marian'"):
        export_onnx(make_marian(), None, tmp_path)


def test_a_folder_without_graphs(exported, tmp_path):
    shutil.copy(exported / "encoder.onnx", tmp_path)
    with pytest.raises(UserError, match="There is no decoder.onnx in"):
        OnnxTranslationModel(tmp_path)


def test_damaged_folders(exported, tmp_path):
    folder = tmp_path / "new"
    shutil.copytree(exported, folder)
    graph = (folder / "decoder.onnx").read_bytes()
    (folder / "decoder.onnx").write_bytes(graph[:1000])
    with pytest.raises(UserError, match="decoder.onnx' is not as it was written"):
        load_translator(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="decoder.onnx' is damaged: "):
        load_translator(str(folder))
    (folder / "decoder.onnx").write_bytes(graph)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json' is damaged: it is not JSON"):
        load_translator(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="new' is not a complete export to ONNX: "):
        load_translator(str(folder))


# Images


@pytest.fixture(scope="module")
def exported_resnet(trained_resnet, tmp_path_factory):
    """The trained ResNet, exported by the command, and what that printed."""
    folder = tmp_path_factory.mktemp("onnx") / "resnet"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["export", str(trained_resnet.folder), str(folder)]) == 0
    return folder, out.getvalue()


def test_an_image_classifier(exported_resnet, trained_resnet):
    folder, out = exported_resnet
    assert out == f"[1 of 1] model.onnx\ngraphs, configurations and preprocessing: {folder}\n"
    files = {"config.json", "preprocessor_config.json", "model.onnx", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == files
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    model = AutoModelForImageClassification.from_pretrained(trained_resnet.folder).eval()
    for batch in (1, 2, 7):
        pixels = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32), np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels)).logits.numpy()
        np.testing.assert_allclose(run(session, pixel_values=pixels)["logits"], expected, atol=1e-4, rtol=0)


def test_the_lines_of_the_readme(exported, exported_resnet, model_and_tokenizer, cifar_folder, tmp_path, monkeypatch):
    names = {
        "AutoImageProcessor": AutoImageProcessor,
        "AutoTokenizer": AutoTokenizer,
        "Image": Image,
        "OnnxTranslationModel": OnnxTranslationModel,
        "onnxruntime": onnxruntime,
        "translate": translate,
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx").symlink_to(exported)
    (tmp_path / "onnx-resnet").symlink_to(exported_resnet[0])
    load_dataset(cifar_folder)["test"][3]["img"].save("picture.png")
    readme = (Path(__file__).parents[2] / "recipes/README.md").read_text(encoding="utf-8")
    for lines in re.findall(r"```py\n(.*?)```", readme, flags=re.DOTALL):
        exec(lines, names)
    sources = ["5 hours", "March 3, 2021"]
    assert names["translations"] == translate(*model_and_tokenizer, sources, num_beams=4)
    assert names["logits"].argmax() == 3


# torch.export


def forward_inputs(lengths, target_length, vocab_size):
    input_ids, attention_mask = map(torch.from_numpy, random_batch(lengths, vocab_size))
    target = torch.from_numpy(np.random.default_rng(1).integers(4, vocab_size, (len(lengths), target_length)))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": target}


def test_torch_export_of_the_whole_model(model_and_tokenizer, tmp_path):
    model, _ = model_and_tokenizer
    sample = forward_inputs(SOURCE_LENGTHS, 5, 300)
    shapes = {name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in sample} | {"use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), sample | {"use_cache": False}, dynamic_shapes=shapes, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for lengths, target_length in [(SOURCE_LENGTHS, 5), ([9, 4], 2), ([30] * 5, 12)]:
            inputs = forward_inputs(lengths, target_length, 300) | {"use_cache": False}
            torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
