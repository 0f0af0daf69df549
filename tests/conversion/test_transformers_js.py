"""The export for transformers.js: its graphs, called as that library calls them, and the page in a browser."""

import functools
import json
import os
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from hf_rskip.cli import push
from hf_rskip.decoding.loading import load_translator
from hf_rskip.decoding.translate import translate
from hf_rskip.errors import UserError


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """An export, which is made to go along with a push; what that takes is its graphs and the page."""
    folder = tmp_path_factory.mktemp("web")
    pushed = push._export(str(trained.folder), folder)
    assert all(path == folder / name for name, path in pushed.items())
    assert sorted(pushed) == ["index.html", *(f"onnx/{name}" for name in sorted(os.listdir(folder / "onnx")))]
    return folder


def greedy(folder, suffix, input_ids, attention_mask, start, steps):
    """The tokens, by the calls of transformers.js: its first cache has the batch's size and 0 for all other free sizes,
    and it keeps the keys and values of the source that the first step returns."""
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / f"onnx/{name}{suffix}.onnx")
        for name in ("encoder_model", "decoder_model_merged")
    )
    (states,) = encoder.run(["last_hidden_state"], {"input_ids": input_ids, "attention_mask": attention_mask})
    sizes, past = {"batch_size": len(input_ids)}, {}
    for value in decoder.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = [size if isinstance(size, int) else sizes.get(size, 0) for size in value.shape]
            past[value.name] = np.zeros(shape, np.float32)
    tokens, names = np.full((len(input_ids), 1), start), [value.name for value in decoder.get_outputs()]
    for step in range(steps):
        inputs = {
            "input_ids": tokens[:, -1:],
            "encoder_attention_mask": attention_mask,
            "encoder_hidden_states": states,
        }
        outputs = dict(zip(names, decoder.run(names, inputs | past), strict=True))
        tokens = np.append(tokens, outputs.pop("logits")[:, -1:].argmax(-1), axis=1)
        for name, value in outputs.items():
            if not step or "encoder" not in name:
                past[name.replace("present", "past_key_values")] = value
    return tokens


def test_what_it_is_for_is_said(exported):
    with pytest.raises(UserError, match="is an export for browsers: `hf-rskip export` without --format"):
        load_translator(str(exported))


def test_graphs_give_the_tokens_of_torch(exported, model_and_tokenizer, pairs):
    model, tokenizer = model_and_tokenizer
    inputs = tokenizer([pair["en"] for pair in pairs["test"]], padding=True, return_tensors="pt")
    expected = model.generate(**inputs, num_beams=1, min_new_tokens=8, max_new_tokens=8).numpy()
    sources, start = [inputs.input_ids.numpy(), inputs.attention_mask.numpy()], model.config.decoder_start_token_id
    found = greedy(exported, "", *sources, start, 8)
    before_end = np.cumsum(found == model.config.eos_token_id, axis=1) == 0
    assert before_end.sum() > 5 * len(found)
    np.testing.assert_array_equal(found[before_end], expected[before_end])
    # In int8 one token decides about the next ones.
    assert (greedy(exported, "_quantized", *sources, start, 1)[:, 1] == expected[:, 1]).mean() > 0.8


def test_the_folder(exported, trained):
    assert sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()) == [
        "config.json",
        "generation_config.json",
        "index.html",
        "onnx/decoder_model_merged.onnx",
        "onnx/decoder_model_merged_quantized.onnx",
        "onnx/encoder_model.onnx",
        "onnx/encoder_model_quantized.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((exported / "config.json").read_text())
    own = json.loads((trained.folder / "config.json").read_text())
    assert config["model_type"] == "marian" and config["decoder_layers"] == own["decoder_layers"]
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 24 and "num_beams" not in generation


# In a browser

DRIVER = """
const [executablePath, url, text] = process.argv.slice(2);
(async () => {
  const browser = await require("playwright-core").chromium.launch({ executablePath, args: ["--no-sandbox"] });
  const page = await browser.newPage();
  await page.goto(url);
  await page.fill("#source", text);
  await page.click("#button");
  const ended = () => /a second$|^Error/.test(document.getElementById("status").textContent);
  await page.waitForFunction(ended, null, { timeout: 60000 });
  console.log(JSON.stringify([await page.textContent("#status"), await page.textContent("#translation")]));
  await browser.close();
})();
"""


@pytest.fixture
def browser(tmp_path):
    """Runs the page at a path below a folder; returns its last status and the translation."""
    node, chromium = shutil.which("node"), shutil.which("chromium") or shutil.which("google-chrome")
    modules = Path(os.environ.get("NODE_PATH", "node_modules")).absolute()
    for found, what in (
        (node, "node"),
        (chromium, "Chromium"),
        ((modules / "playwright-core").is_dir(), "the package playwright-core in NODE_PATH"),
        ((modules / "@huggingface/transformers").is_dir(), "the package @huggingface/transformers in NODE_PATH"),
    ):
        if not found:
            pytest.skip(f"needs {what}")
    library = tmp_path / "library"
    library.mkdir()
    for pattern in ("@huggingface/transformers/dist/transformers.min.js", "onnxruntime-web/dist/ort-wasm-*"):
        for path in modules.glob(pattern):
            (library / path.name).symlink_to(path)
    driver = tmp_path / "driver.cjs"
    driver.write_text(DRIVER)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(path, text):
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        words = [node, driver, chromium, url, text]
        environment = os.environ | {"NODE_PATH": str(modules)}
        process = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    yield run
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_page_translates(browser, exported, model_and_tokenizer, pairs, tmp_path):
    (tmp_path / "model").symlink_to(exported)
    sources = [pair["en"] for pair in pairs["test"][:5]]
    expected = translate(*model_and_tokenizer, sources, num_beams=1)
    page = "model/?library=../library/transformers.min.js"
    status, translation = browser(f"{page}&dtype=fp32", "\n".join(sources))
    assert translation.split("\n") == expected and "tokens a second" in status
    status, translation = browser(page, sources[0])
    assert translation and "tokens a second" in status
    assert browser("model/?library=../library/none.js", "a cat")[0].startswith("Error: ")
