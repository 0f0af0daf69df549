"""Exported graphs against the model in torch: every kind of skip connection, padding, first and later steps, greedy
search; and what a user is told when something is missing."""

import contextlib
import io
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageClassification, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_rskip import (
    SKIP_CONNECTIONS,
    PreNorm,
    RSkip,
    RSkipConfig,
    RSkipForConditionalGeneration,
    SkipConnection,
    XSkip,
)
from hf_rskip.cli.main import main
from hf_rskip.conversion.onnx import OnnxTranslationModel, export_onnx
from hf_rskip.decoding.translate import translate
from hf_rskip.errors import UserError
from hf_rskip.models.skip_connections import B2T, Admin, DeepNorm, DetachedRSkip, Keel, PeriNorm, ReZero

SOURCE_LENGTHS = [7, 4, 2]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained model, exported by the command."""
    folder = tmp_path_factory.mktemp("exported")
    assert main(["export", str(trained.folder), str(folder)]) == 0
    return folder


def load(folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return OnnxTranslationModel(folder, options)


@pytest.fixture(scope="module")
def onnx_model(exported):
    return load(exported)


def random_batch(lengths, vocab_size):
    rng = np.random.default_rng(0)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return rng.integers(4, vocab_size, mask.shape) * mask, mask


def run(session, **inputs):
    names = [spec.name for spec in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def decoder_logits(onnx_model, model, input_ids, attention_mask, pieces):
    """Logits of the target `pieces`, each decoded after the ones before it, by nothing but the documented names."""
    encoded = run(onnx_model.encoder, input_ids=input_ids, attention_mask=attention_mask)
    config = model.config
    past = {f"past_key_values.{name.removeprefix('present.')}": encoded[name] for name in encoded if "present" in name}
    heads = config.decoder_attention_heads
    for layer in range(config.decoder_layers):
        for name in ("key", "value"):
            past[f"past_key_values.{layer}.decoder.{name}"] = np.zeros(
                (len(input_ids), heads, 0, config.d_model // heads), np.float32
            )
    logits = []
    for piece in pieces:
        outputs = run(onnx_model.decoder, decoder_input_ids=piece, encoder_attention_mask=attention_mask, **past)
        logits.append(outputs.pop("logits"))
        past |= {f"past_key_values.{name.removeprefix('present.')}": value for name, value in outputs.items()}
    return encoded["last_hidden_state"], np.concatenate(logits, axis=1)


def assert_equal_to_torch(onnx_model, model, lengths, cuts):
    """Every prefix of the target is decoded at once or in pieces; logits at all positions, states at real ones."""
    input_ids, attention_mask = random_batch(lengths, model.config.vocab_size)
    target = np.random.default_rng(1).integers(4, model.config.vocab_size, (len(lengths), 9))
    target[:, 0] = model.config.decoder_start_token_id
    with torch.no_grad():
        expected = model(*map(torch.from_numpy, (input_ids, attention_mask, target)))
    states, logits = decoder_logits(onnx_model, model, input_ids, attention_mask, np.split(target, cuts, axis=1))
    real = attention_mask.astype(bool)
    np.testing.assert_allclose(states[real], expected.encoder_last_hidden_state.numpy()[real], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4, rtol=0)
    assert logits.std() > 0.1


@pytest.mark.parametrize("lengths", [SOURCE_LENGTHS, [1], [64, 1], [3, 3, 3, 3]], ids=str)
@pytest.mark.parametrize("cuts", [[], [1], [*range(1, 9)], [4, 6]], ids=["at once", "prefill", "steps", "pieces"])
def test_graphs_equal_the_model(onnx_model, model_and_tokenizer, lengths, cuts):
    assert_equal_to_torch(onnx_model, model_and_tokenizer[0], lengths, cuts)


@pytest.fixture
def mixed(monkeypatch):
    """A skip type whose every sublayer is of another kind: one export, which takes seconds, shows them all."""
    kinds = {
        "encoder": [
            partial(RSkip, recursions=1),
            partial(RSkip, recursions=2, norm="rms_norm"),
            partial(XSkip, scale=1.7),
            partial(PreNorm, norm="batch_norm"),
            partial(Admin, scale=1.5),
            partial(PeriNorm),
            partial(Keel, scale=6.0),
            partial(ReZero, norm="none"),
        ],
        "decoder": [
            partial(RSkip, recursions=2, affine="last"),
            partial(RSkip, recursions=3, affine="per_step", norm="batch_norm"),
            partial(XSkip, scale=0.5, norm="none"),
            partial(RSkip, recursions=3, affine="shared"),
            partial(RSkip, recursions=3, affine="last", norm="rms_norm"),
            partial(PreNorm),
            partial(DetachedRSkip, recursions=3),
            partial(DeepNorm, scale=1.2, beta=0.5),
            partial(B2T, norm="none"),
        ],
    }

    class Mixed(SkipConnection):
        @classmethod
        def from_config(cls, config, size, position):
            return kinds[position.stack].pop(0)(size)

        @classmethod
        def around_layer(cls, size, norm, eps):
            return B2T.around_layer(size, norm, eps)

        @classmethod
        def final_norm(cls, size, norm, eps):
            return PreNorm.final_norm(size, norm, eps)

    monkeypatch.setitem(SKIP_CONNECTIONS, "mixed", Mixed)
    yield
    assert not any(kinds.values())


@pytest.mark.slow
def test_every_kind_of_skip_connection(mixed, model_and_tokenizer, tmp_path):
    config = RSkipConfig(
        vocab_size=30,
        decoder_vocab_size=40,
        share_encoder_decoder_embeddings=False,
        d_model=16,
        encoder_layers=4,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=32,
        max_position_embeddings=24,
        skip_type="mixed",
    )
    torch.manual_seed(0)
    model = RSkipForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    export_onnx(model, model_and_tokenizer[1], tmp_path)
    assert_equal_to_torch(load(tmp_path), model, SOURCE_LENGTHS, [1, 2, 5])


# Greedy search


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_greedy_search_gives_the_tokens_of_generate(onnx_model, exported, model_and_tokenizer, pairs, batch_size):
    model, tokenizer = model_and_tokenizer
    sources = [pair["en"] for pair in (pairs["test"] + pairs["validation"] + pairs["train"])[:100]]
    exported_tokenizer = AutoTokenizer.from_pretrained(exported)
    translations = set()
    for start in range(0, 100, batch_size):
        batch = sources[start : start + batch_size]
        expected = model.generate(**tokenizer(batch, padding=True, return_tensors="pt"), num_beams=1)
        tokens = onnx_model.generate(**exported_tokenizer(batch, padding=True, return_tensors="np"))
        np.testing.assert_array_equal(tokens, expected.numpy())
        translations |= set(exported_tokenizer.batch_decode(tokens, skip_special_tokens=True))
    assert len(translations) > 20


@pytest.mark.parametrize("max_new_tokens", [1, 3])
def test_max_new_tokens(onnx_model, model_and_tokenizer, max_new_tokens):
    model, tokenizer = model_and_tokenizer
    inputs = tokenizer(["the old cat sees a mouse .", "a cat likes the cat ."], padding=True, return_tensors="pt")
    expected = model.generate(**inputs, num_beams=1, max_new_tokens=max_new_tokens)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    np.testing.assert_array_equal(onnx_model.generate(**arrays, max_new_tokens=max_new_tokens), expected.numpy())


def test_a_search_ends_at_the_last_position(onnx_model, monkeypatch):
    monkeypatch.setattr(onnx_model.generation_config, "eos_token_id", [])
    input_ids, attention_mask = random_batch([3], 300)
    assert onnx_model.generate(input_ids, attention_mask, max_new_tokens=1000).shape == (1, 65)
    with pytest.raises(ValueError, match="The sequence has 65 tokens, more than the 64 of"):
        onnx_model.generate(*random_batch([65], 300))


# Files and mistakes


def test_the_folder(exported, trained):
    assert {path.name for path in exported.iterdir()} == {
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


def test_missing_packages(trained, tmp_path, capfd, monkeypatch):
    from transformers.exporters.exporter_onnx import OnnxExporter

    monkeypatch.setattr(OnnxExporter, "required_packages", ["torch", "no_such_package"])
    line = error_of(capfd, trained.folder, tmp_path / "new")
    assert "`pip install 'hf_rskip[onnx]'`" in line and "no_such_package" in line
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'hf_rskip\[onnx\]'"):
        OnnxTranslationModel(tmp_path)


def test_a_folder_without_graphs(exported, tmp_path):
    shutil.copy(exported / "encoder.onnx", tmp_path)
    with pytest.raises(UserError, match="There is no decoder.onnx in"):
        OnnxTranslationModel(tmp_path)


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
    assert {path.name for path in folder.iterdir()} == {"config.json", "preprocessor_config.json", "model.onnx"}
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
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx").symlink_to(exported)
    (tmp_path / "onnx-resnet").symlink_to(exported_resnet[0])
    load_dataset(cifar_folder)["test"][3]["img"].save("picture.png")
    readme = (Path(__file__).parents[2] / "recipes/README.md").read_text(encoding="utf-8")
    for lines in re.findall(r"```py\n(.*?)```", readme, flags=re.DOTALL):
        exec(lines, names)
    sources = ["5 hours", "March 3, 2021"]
    assert names["translations"] == translate(*model_and_tokenizer, sources, num_beams=1)
    assert names["logits"].argmax() == 3


# torch.export


def forward_inputs(lengths, target_length, vocab_size):
    input_ids, attention_mask = map(torch.from_numpy, random_batch(lengths, vocab_size))
    target = torch.from_numpy(np.random.default_rng(1).integers(4, vocab_size, (len(lengths), target_length)))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": target}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_export_of_the_whole_model(model_and_tokenizer, tmp_path, dynamic):
    model, _ = model_and_tokenizer
    sample = forward_inputs(SOURCE_LENGTHS, 5, 300)
    shapes = (
        {name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in sample} | {"use_cache": None}
        if dynamic
        else None
    )
    with torch.no_grad():
        program = torch.export.export(model, (), sample | {"use_cache": False}, dynamic_shapes=shapes, strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for lengths, target_length in [(SOURCE_LENGTHS, 5), *([([9, 4], 7), ([30] * 5, 12)] if dynamic else [])]:
            inputs = forward_inputs(lengths, target_length, 300) | {"use_cache": False}
            torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
