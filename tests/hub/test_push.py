"""What `hf-rskip push` sends, and what others can do with it: the real client, a Hub on loopback, real processes."""

import ast
import importlib
import json
import pickle
import re
import shutil
import sys
from fnmatch import fnmatch

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, TrainerState, TrainingArguments

from hf_rskip import (
    SKIP_CONNECTIONS,
    RSkipConfig,
    RSkipForConditionalGeneration,
    RSkipResNetConfig,
    RSkipResNetForImageClassification,
)
from hf_rskip.errors import UserError
from hf_rskip.hub.checkpoints import PushCheckpoints
from hf_rskip.hub.push import collect_files, push_folder
from hf_rskip.hub.remote_code import find_code

SENTENCES = ["the old cat sees a mouse .", "a woman likes the red street ."]
OF_SKIP_CONNECTIONS = {
    "skip_connections.py",
    "skip_norms.py",
}
CODE = OF_SKIP_CONNECTIONS | {
    "checks.py",
    "configuration_rskip.py",
    "configuration_skip.py",
    "generation_rskip.py",
    "modeling_rskip.py",
}
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RESULTS = {"README.md", "training_curve.png", "all_results.json", "trainer_state.json"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")

# Runs in another process: the answers of the model `name` on the Hub, in text.
ANSWER = f"""
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

def answer(name, **kwargs):
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    model = AutoModelForSeq2SeqLM.from_pretrained(name, **kwargs).eval()
    base = AutoModel.from_pretrained(name, **kwargs).eval()
    assert AutoConfig.from_pretrained(name, **kwargs).skip_type == model.config.skip_type
    inputs = tokenizer({SENTENCES!r}, return_tensors="pt", padding=True)
    decoder_input_ids = inputs.input_ids[:, :4]
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=decoder_input_ids).logits
        hidden = base(**inputs, decoder_input_ids=decoder_input_ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden), logits)
    beams = tokenizer.batch_decode(model.generate(**inputs, num_beams=3), skip_special_tokens=True)
    return model, tokenizer, {{"logits": logits.tolist(), "beams": beams}}
"""
REFUSAL = """
for auto in (AutoConfig, AutoModel, AutoModelForSeq2SeqLM):
    try:
        auto.from_pretrained("user/tiny", trust_remote_code=False)
    except ValueError as error:
        assert "user/tiny contains custom code" in str(error) and "`trust_remote_code=True`" in str(error)
    else:
        raise AssertionError(f"{auto} trusts")
"""
BARE = """
import shutil
from importlib.util import find_spec
print(find_spec("hf_rskip"), shutil.which("c++") or shutil.which("cc"))
"""
SHOW = "import json\nmodel, tokenizer, result = answer({name!r}, **{kwargs!r})\n"
SHOW += "print(json.dumps(result | {{'module': type(model).__module__}}))"


@pytest.fixture(scope="module")
def expected(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=inputs.input_ids[:, :4]).logits
    beams = tokenizer.batch_decode(model.generate(**inputs, num_beams=3), skip_special_tokens=True)
    return {"logits": logits.tolist(), "beams": beams}


def blobs(hub):
    return [request for request in hub.requests if request.startswith("PUT ")]


def commits_sent(hub):
    return [request for request in hub.requests if "/commit/" in request]


def without(result, *keys):
    return {key: value for key, value in json.loads(result.out).items() if key not in keys}


# Loading


def test_with_code_it_loads_without_the_package(hub, cli, run_without_package, run_with_package, trained, expected):
    pushed = cli("push", trained.folder, "tiny", "--with-code")
    assert (pushed.code, pushed.err) == (0, "")
    assert pushed.out.startswith(f"{hub.url}/user/tiny/commit/")
    files = hub.files("user/tiny")
    assert files.keys() == {".gitattributes", *MODEL, *CODE, *RESULTS}
    assert hub.commits("user/tiny") == ["initial commit", "Upload model"]
    assert files["model.safetensors"] == (trained.folder / "model.safetensors").read_bytes()

    missing = run_without_package(BARE)
    assert missing.out == "None None\n", missing.err
    show = ANSWER + REFUSAL + SHOW.format(name="user/tiny", kwargs={"trust_remote_code": True})
    loaded = run_without_package(show)
    assert loaded.code == 0, loaded.err
    assert without(loaded, "module") == expected
    assert json.loads(loaded.out)["module"].startswith("transformers_modules.")

    # With the package, the package's own code runs, and nobody has to trust anyone.
    loaded = run_with_package("import hf_rskip\n" + ANSWER + SHOW.format(name="user/tiny", kwargs={}))
    assert loaded.code == 0, loaded.err
    assert without(loaded, "module") == expected
    assert json.loads(loaded.out)["module"] == "hf_rskip.models.modeling_rskip"


SAVE_TRAIN_PUSH = """
import json
import pickle
from pathlib import Path
from transformers import Trainer, TrainingArguments

model, tokenizer, first = answer("user/tiny", trust_remote_code=True)
model.save_pretrained("copy")
tokenizer.save_pretrained("copy")
assert answer("./copy", trust_remote_code=True)[2] == first

inputs = tokenizer(["the cat"], text_target=["die Katze"])
rows = [{name: values[0] for name, values in inputs.items()}] * 2
arguments = TrainingArguments(
    "run", max_steps=1, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
)
from transformers import DataCollatorForSeq2Seq
trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer, model), train_dataset=rows)
trainer.train()
model.config.use_cache = True
model.push_to_hub("tuned")
tokenizer.push_to_hub("tuned")
second = answer("user/tuned", trust_remote_code=True)[2]
assert second["logits"] != first["logits"]
print(json.dumps({"files": sorted(path.name for path in Path("copy").iterdir()), **second}))
"""


def test_without_the_package_it_is_saved_trained_and_pushed_again(
    hub, cli, run_without_package, run_with_package, trained
):
    assert cli("push", trained.folder, "tiny", "--with-code").code == 0
    result = run_without_package(ANSWER + SAVE_TRAIN_PUSH)
    assert result.code == 0, result.err
    tuned = json.loads(result.out.splitlines()[-1])
    assert set(tuned.pop("files")) >= MODEL | CODE
    files, source = hub.files("user/tuned"), hub.files("user/tiny")
    assert files.keys() >= MODEL | CODE
    assert all(files[name] == source[name] for name in CODE)
    assert json.loads(files["config.json"])["auto_map"] == json.loads(source["config.json"])["auto_map"]

    # From there it comes back to the package, whose copies mention no code that they do not have.
    back = "import hf_rskip\n" + ANSWER
    back += SHOW.format(name="user/tuned", kwargs={}) + "\nmodel.save_pretrained('back')"
    back += "\nassert 'auto_map' not in json.load(open('back/config.json'))"
    loaded = run_with_package(back)
    assert loaded.code == 0, loaded.err
    assert without(loaded, "module") == tuned


def test_graphs_go_along(hub, cli, run_with_package, trained):
    code = """
from pathlib import Path
from hf_rskip.hub.push import push_folder
Path("graph").write_bytes(b"graph")
push_folder({folder!r}, "tiny", graphs={{"onnx/encoder_model.onnx": Path("graph")}})
"""
    pushed = run_with_package(code.format(folder=str(trained.folder)))
    assert pushed.code == 0, pushed.err
    files = hub.files("user/tiny")
    assert files.keys() == {".gitattributes", *MODEL, *RESULTS, "onnx/encoder_model.onnx"}
    assert files["onnx/encoder_model.onnx"] == b"graph"
    again = cli("push", trained.folder, "tiny")
    assert again.code == 0 and "The graphs on the Hub are of an earlier push; --with-onnx replaces them." in again.out


def test_weights_of_an_earlier_push_in_other_files_go(hub, cli, trained, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*", "model*", "manifest.json"))
    AutoModelForSeq2SeqLM.from_pretrained(trained.folder).save_pretrained(folder, max_shard_size="20KB")
    shards = {path.name for path in folder.glob("model*")}
    assert len(shards) > 2
    for source, weights in (
        (trained.folder, {"model.safetensors"}),
        (folder, shards),
        (trained.folder, {"model.safetensors"}),
    ):
        assert cli("push", source, "tiny").code == 0
        assert {name for name in hub.files("user/tiny") if name.startswith("model")} == weights


def test_without_code_there_is_no_mention_of_any(
    hub, cli, run_without_package, run_with_package, trained, expected, tmp_path
):
    assert cli("push", trained.folder, "tiny").code == 0
    files = hub.files("user/tiny")
    assert files.keys() == {".gitattributes", *MODEL, *RESULTS}
    assert b"auto_map" not in b"".join(content for name, content in files.items() if name.endswith(".json"))
    loaded = run_with_package("import hf_rskip\n" + ANSWER + SHOW.format(name="user/tiny", kwargs={}))
    assert without(loaded, "module") == expected, loaded.err

    # Also where the folder came from a checkpoint with code.
    folder = tmp_path / "with_code"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_rskip.RSkipConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli("push", folder, "again").code == 0
    assert json.loads(hub.files("user/again")["config.json"]) == json.loads(files["config.json"])


RESNET = """
import json, torch
from huggingface_hub import HfApi
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

HfApi().create_repo("user/resnet")
HfApi().upload_folder(repo_id="user/resnet", folder_path="resnet")
options = {"output_loading_info": True, "trust_remote_code": True}
autos = (AutoModelForImageClassification, AutoModel, AutoBackbone)
loaded = [auto.from_pretrained("user/resnet", **options) for auto in autos]
assert not any(info["missing_keys"] for _, info in loaded)
model, base, backbone = (model.eval() for model, _ in loaded)
with torch.no_grad():
    images = torch.load("images.pt")
    logits, states, (maps,) = model(images).logits, base(images).last_hidden_state, backbone(images).feature_maps
assert torch.equal(states, maps) and torch.equal(model.classifier(states.mean((2, 3))), logits)
assert AutoConfig.from_pretrained("user/resnet", trust_remote_code=True).skip_recursions == 3
print(json.dumps({"logits": logits.tolist(), "modules": [type(m).__module__ for m in (model, base, backbone)]}))
"""


def test_what_travels_is_plain_torch():
    """At most seven files a model, which import nothing but torch, Transformers and each other, nor in functions."""
    for config in (RSkipConfig(), RSkipResNetConfig()):
        _, files = find_code(config)
        assert len(files) <= 7
        for name, source in files.items():
            text = source.decode()
            assert not re.search(r"subprocess|ctypes|triton|importlib|open\(|\beval\b", text), name
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Import):
                    roots = {alias.name.split(".")[0] for alias in node.names}
                    assert roots <= {"math", "copy", "torch", "transformers"}, name
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    standard = {"collections", "collections.abc", "dataclasses", "itertools", "math", "typing"}
                    assert node.module in standard or node.module.split(".")[0] in ("torch", "transformers"), name


def test_the_code_of_a_resnet_travels(hub, run_without_package, tmp_path):
    torch.manual_seed(0)
    config = RSkipResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], skip_recursions=3, num_labels=5)
    auto_map, code = find_code(config)
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"}
    assert code.keys() == OF_SKIP_CONNECTIONS | {
        "checks.py",
        "configuration_rskip_resnet.py",
        "configuration_skip.py",
        "modeling_rskip_resnet.py",
    }
    model = RSkipResNetForImageClassification(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # away from what a new model would have
    model.eval().save_pretrained(tmp_path / "resnet")
    saved = json.loads((tmp_path / "resnet" / "config.json").read_text())
    (tmp_path / "resnet" / "config.json").write_text(json.dumps(saved | {"auto_map": auto_map}))
    for name, source in code.items():
        (tmp_path / "resnet" / name).write_bytes(source)
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    result = run_without_package(RESNET)
    assert result.code == 0, result.err
    answer = json.loads(result.out)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(answer["logits"]), model(images).logits, rtol=0, atol=1e-6)
    assert all(module.startswith("transformers_modules.") for module in answer["modules"])


# A residual kind of one's own

KINDS = """
import math

import torch
from hf_rskip import (
    SKIP_CONNECTIONS,  # a comment
    SkipConnection as Base,
)
from hf_rskip.models.skip_norms import LayerNorm

from .gains import first_gain


class LayerScale(Base):
    def __init__(self, size, norm="layer_norm", eps=1e-5):
        super().__init__()
        from hf_rskip import SampleLayerNorm, make_norm

        self.norm, self.scale = make_norm(norm, size, eps), torch.nn.Parameter(torch.full((size,), first_gain()))

    def forward(self, x, branch, mask=None):
        return self.norm(x + self.scale * branch, mask)
"""
LOAD_OWN = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

assert AutoConfig.from_pretrained("own", trust_remote_code=True).skip_type == "layer_scale"
model, info = AutoModelForSeq2SeqLM.from_pretrained("own", trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"]
tokens = torch.tensor([[5, 6, 7, 2]])
with torch.no_grad():
    logits = model.eval()(tokens, decoder_input_ids=tokens).logits
assert not any(name.partition(".")[0] == "hf_rskip" for name in sys.modules)
print(json.dumps(logits.tolist()))
"""


@pytest.fixture
def own_kind(tmp_path, monkeypatch):
    """Enters the class of a source as a kind; returns a configuration of it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "gains.py").write_text("def first_gain():\n    return 0.5\n")

    def enter(source, name="kinds"):
        (tmp_path / "own_package" / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        module = importlib.import_module(f"own_package.{name}")
        monkeypatch.setitem(SKIP_CONNECTIONS, "layer_scale", module.LayerScale)
        return RSkipConfig(vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, skip_type="layer_scale")

    yield enter
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


def test_a_kind_of_ones_own_travels(own_kind, run_without_package, tmp_path):
    config = own_kind(KINDS)
    auto_map, code = find_code(config)
    assert code.keys() == CODE | {"kinds.py", "gains.py"}
    torch.manual_seed(0)
    model = RSkipForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "own")
    saved = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps(saved | {"auto_map": auto_map}))
    for name, source in code.items():
        (tmp_path / "own" / name).write_bytes(source)
    result = run_without_package(LOAD_OWN)
    assert result.code == 0, result.err
    tokens = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        expected = model(tokens, decoder_input_ids=tokens).logits
    torch.testing.assert_close(torch.tensor(json.loads(result.out)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("line", "name", "message"),
    [
        ("import numpy as np", "numbers", "because of `import numpy as np`: it may import torch, transformers"),
        ("import math, subprocess", "starter", "because of `import math, subprocess`"),
        ("import hf_rskip", "whole", "because of `import hf_rskip`"),
        ("from hf_rskip import *", "star", r"because of `from hf_rskip import \*`"),
        ("from hf_rskip.errors import UserError", "errors", "because of `from hf_rskip.errors import UserError`"),
        ("from . import gains", "beside", r"because of `from \. import gains`"),
        ("", "skip_norms", r"skip_norms.py does not travel, as a file of the model has its name"),
    ],
)
def test_a_kind_of_ones_own_that_does_not_travel(own_kind, line, name, message):
    config = own_kind(f"{line}\nfrom hf_rskip import RSkip\nclass LayerScale(RSkip): pass\n", name)
    with pytest.raises(UserError, match=message):
        find_code(config)


def test_a_kind_of_the_program_itself_does_not_travel(own_kind, monkeypatch):
    config = own_kind(KINDS)
    monkeypatch.setattr(SKIP_CONNECTIONS["layer_scale"], "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "LayerScale", SKIP_CONNECTIONS["layer_scale"], raising=False)
    with pytest.raises(UserError, match="The code of __main__ does not travel: move it to a file that is imported"):
        find_code(config)


def test_a_kind_that_was_not_imported_is_named(own_kind, monkeypatch, tmp_path):
    RSkipForConditionalGeneration(own_kind(KINDS)).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "tokenizer_config.json").write_text("{}")
    monkeypatch.delitem(SKIP_CONNECTIONS, "layer_scale")
    with pytest.raises(UserError, match="^'.*config.json': `skip_type` must be one of .*--import_module"):
        push_folder(tmp_path / "own", "user/own")


# Pushing again


@pytest.mark.parametrize("options", [[], ["--with-code"]], ids=["", "with code"])
def test_nothing_is_sent_twice(hub, cli, trained, options):
    assert cli("push", trained.folder, "tiny", *options).code == 0
    sent = blobs(hub), commits_sent(hub)
    assert (len(sent[0]), len(sent[1])) == (2, 1), "the weights and the picture, and one commit"
    again = cli("push", trained.folder, "tiny", "--overwrite_card", *options)
    assert again.code == 0 and again.out.startswith("Nothing has changed since "), again.err
    assert (blobs(hub), commits_sent(hub)) == sent
    assert len(hub.commits("user/tiny")) == 2


def test_a_card_on_the_hub_is_kept(hub, cli, trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    card = folder / "README.md"
    written = card.read_text().replace("# ", "# By hand: ", 1)
    card.write_text(written)
    assert cli("push", folder, "tiny").code == 0
    by_hand = hub.files("user/tiny")["README.md"]
    assert b"# By hand: " in by_hand

    card.write_text((trained.folder / "README.md").read_text())
    kept = cli("push", folder, "tiny")
    assert kept.code == 0 and "README.md on the Hub was kept" in kept.out
    assert hub.files("user/tiny")["README.md"] == by_hand
    replaced = cli("push", folder, "tiny", "--overwrite_card")
    assert replaced.code == 0 and "kept" not in replaced.out
    assert b"By hand" not in hub.files("user/tiny")["README.md"]
    card.unlink()  # as in the folder of averaged weights
    without = cli("push", folder, "tiny", "--overwrite_card")
    assert without.code == 0 and "has no README.md: no model card was sent" in without.out


def test_a_branch_of_its_own(hub, cli, trained):
    for _ in range(2):
        assert cli("push", trained.folder, "user/tiny", "--revision", "exp/k2", "--private").code == 0
    assert hub.repositories["user/tiny"].private
    assert hub.commits("user/tiny") == ["initial commit"]
    assert hub.commits("user/tiny", "exp/k2") == ["initial commit", "Upload model"]
    assert hub.files("user/tiny").keys() == {".gitattributes"}
    assert hub.files("user/tiny", "exp/k2").keys() >= MODEL


# Failures


def fail(cli, *words):
    result = cli("push", *words)
    assert (result.code, result.out) == (2, "")
    *warnings, line = result.err.splitlines()  # the client's, of what it tries again
    assert line.startswith("hf-rskip: error: ") and "Traceback" not in result.err
    assert not any(warning.startswith("hf-rskip: ") for warning in warnings)
    return line


@pytest.mark.slow  # the client tries six times, for 23 seconds
def test_a_connection_that_breaks(hub, cli, trained):
    hub.fails_at = "upload"
    line = fail(cli, trained.folder, "tiny")
    assert (
        "; sent: nothing; not sent: model.safetensors, the other files; no commit was confirmed, and the same" in line
    )
    assert hub.commits("user/tiny") == ["initial commit"] and not hub.objects
    hub.fails_at = None
    assert cli("push", trained.folder, "tiny").code == 0
    assert hub.files("user/tiny").keys() == {".gitattributes", *MODEL, *RESULTS}


def test_a_refusal_after_the_weights(hub, cli, trained):
    hub.fails_at = "commit"
    line = fail(cli, trained.folder, "tiny")
    assert "failed (You may not write here); sent: model.safetensors; not sent: the other files; " in line
    hub.fails_at = None
    assert cli("push", trained.folder, "tiny").code == 0
    assert len(set(blobs(hub))) == len(blobs(hub)), "the weights were there already"
    assert hub.commits("user/tiny") == ["initial commit", "Upload model"]


def test_a_card_that_the_hub_refuses(hub, cli, trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("language:\n", "language:\n- Klingonian language\n"))
    line = fail(cli, folder, "tiny")
    assert "not 'Klingonian language'" in line and "; sent: nothing; not sent: model.safetensors, the other" in line
    assert not blobs(hub)


def test_folders_that_are_no_models(cli, trained, tmp_path):
    assert "no model folder" in fail(cli, tmp_path / "none", "tiny")
    for name in ("model.safetensors", "tokenizer_config.json", "generation_config.json", "config.json"):
        folder = tmp_path / name
        shutil.copytree(trained.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*", name))
        assert f"is not a complete model: it has no {name}" in fail(cli, folder, "tiny")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json' is damaged: it names no weights" in fail(cli, folder, "tiny")


def test_a_refused_token(hub, cli, trained, run_with_package):
    argv = ["push", str(trained.folder), "tiny"]
    result = run_with_package(
        "import os, sys\nfrom unittest.mock import patch\nfrom hf_rskip.cli import main\n"
        f"with patch.dict(os.environ, HF_TOKEN='wrong'):\n    sys.exit(main({argv!r}))"
    )
    assert result.code == 2 and "; log in with `hf auth login`); sent: nothing; " in result.err


def test_a_public_repository_does_not_become_private(hub, cli, trained):
    assert cli("push", trained.folder, "tiny").code == 0
    assert "user/tiny exists and is public: nothing was sent" in fail(cli, trained.folder, "tiny", "--private")


# While training


LOAD = """
import hf_rskip
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained("user/run", **{kwargs!r}) for auto in (AutoModelForSeq2SeqLM, AutoTokenizer))
assert model.generate(**tokenizer(["the cat"], return_tensors="pt")).shape[1] > 1
"""


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_a_recipe_that_pushes(hub, cli, run_with_package, write_recipe, strategy):
    recipe = write_recipe(
        push_to_hub=True, hub_model_id="user/run", hub_strategy=strategy, hub_always_push=True, max_steps=8
    )
    result = cli("train", recipe)
    assert result.code == 0, result.err
    steps = [f"Training in progress, step {step}" for step in (4, 8)]
    assert hub.commits("user/run") == ["initial commit", *steps, "End of training"]
    for commit in hub.repositories["user/run"].branches["main"]:
        assert not [name for name in commit.files if any(fnmatch(name, pattern) for pattern in PICKLES)]
    assert not [content for content in hub.objects.values() if content[:2] in (b"PK", b"\x80\x02")]
    assert list(recipe.parent.glob("output/*.bin")) and list(recipe.parent.glob("output/*/*.pt")), "they stay at home"
    files = hub.files("user/run")
    output = recipe.parent / "output"
    assert not list(output.glob(".push-*"))
    assert b'from_pretrained("user/run"' in files["README.md"]
    for name in (MODEL | RESULTS) - {"README.md"}:
        assert files[name] == (output / name).read_bytes(), name

    at_step_4 = hub.repositories["user/run"].branches["main"][1]
    assert at_step_4.files["model.safetensors"].content == (output / "checkpoint-4/model.safetensors").read_bytes()
    loaded = run_with_package(LOAD.format(kwargs={"revision": at_step_4.oid}))
    assert loaded.code == 0, loaded.err
    if strategy == "all_checkpoints":
        assert {name.partition("/")[0] for name in files if "/" in name} == {"checkpoint-4", "checkpoint-8"}
        loaded = run_with_package(LOAD.format(kwargs={"subfolder": "checkpoint-4"}))
        assert loaded.code == 0, loaded.err
    else:
        assert files.keys() == {".gitattributes", *MODEL, *RESULTS}


def test_a_recipe_of_images_that_pushes(hub, cli, write_image_recipe):
    recipe = write_image_recipe(push_to_hub=True, hub_model_id="user/resnet", max_steps=6, ema_decay=0.5)
    result = cli("train", recipe)
    assert result.code == 0, result.err
    files, folder = hub.files("user/resnet"), recipe.parent / "output"
    assert files.keys() >= {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not any(name.endswith(PICKLES[0][1:]) or "moving_average" in name for name in files)


def test_a_checkpoint_that_is_no_complete_model_is_a_warning(tmp_path, caplog):
    """As one of FSDP's sharded states: training goes on."""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "config.json").write_text("{}")
    args = TrainingArguments(tmp_path, hub_strategy="every_save", report_to="none", use_cpu=True)
    callback, state = PushCheckpoints("user/run"), TrainerState(global_step=4)
    callback.on_save(args, state, None)
    callback.on_train_end(args, state, None)
    assert "it has no generation_config.json, model.safetensors, tokenizer_config.json; training goes on" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_what_is_not_listed_stays_at_home(trained, tmp_path):
    """A pickle under the name of a tokenizer's model is no tokenizer's model."""
    folder = shutil.copytree(trained.folder, tmp_path / "model")
    for name in ("extra.model", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps({}))
    assert not {"extra.model", "training_args.bin", "optimizer.pt"} & collect_files(folder).keys()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "pytorch_model.bin"}}')
    with pytest.raises(UserError, match=r"pytorch_model\.bin|not safetensors"):
        collect_files(folder)
