"""What all tests share: caches in a folder of their own, no network, a tiny corpus, and a model trained on it."""

import atexit
import gc
import json
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Before datasets, transformers or torch are imported, here and in every subprocess.
if "PYTEST_XDIST_WORKER" in os.environ:
    _CACHE = os.environ["HF_HOME"]  # of the main process
else:
    _CACHE = tempfile.mkdtemp(prefix="hf-rskip-tests-")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ |= {
    "HF_HOME": _CACHE,
    "HF_DATASETS_CACHE": f"{_CACHE}/datasets",
    "HF_HUB_CACHE": f"{_CACHE}/hub",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "120",
}

import pytest  # noqa: E402
import yaml  # noqa: E402
from filelock import FileLock  # noqa: E402

WORDS = {
    "the": "die",
    "a": "eine",
    "cat": "Katze",
    "mouse": "Maus",
    "woman": "Frau",
    "street": "Straße",
    "sees": "sieht",
    "likes": "mag",
    "small": "kleine",
    "old": "alte",
    "red": "rote",
    "and": "und",
    "hears": "hört",
}
ARTICLES, NOUNS, VERBS, ADJECTIVES = (
    ["the", "a"],
    ["cat", "mouse", "woman", "street"],
    ["sees", "likes", "hears"],
    ["small", "old", "red"],
)


def pytest_configure(config):
    """Starts the server of `warm_python.py`, from which those of pytest-xdist and torchrun are forked, too."""
    if not hasattr(os, "pidfd_open"):
        return
    if not hasattr(config, "workerinput"):
        _start_warm_python(config)
        config.option.tx = [f"{spec}//python={shlex.quote(os.environ['PYTHON_EXEC'])}" for spec in config.option.tx]
    multiprocessing.set_executable(os.environ["PYTHON_EXEC"])  # of the fork servers


def _start_warm_python(config):
    modules = ["hf_rskip.studies.cell", "hf_rskip.cli.launch", "transformers.integrations"]
    modules += ["torch.distributed.checkpoint", "matplotlib.figure", "matplotlib.backends.backend_agg"]
    server = [sys.executable, str(Path(__file__).with_name("warm_python.py")), f"{_CACHE}/socket"]
    process = subprocess.Popen([*server, "--serve", *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    config.add_cleanup(process.wait)
    config.add_cleanup(process.stdin.close)  # is done first
    process.stdout.readline()
    python = Path(_CACHE, "python")
    python.write_text(f'#!/bin/sh\nexec {shlex.join([server[0], "-ISE", *server[1:]])} "$@"\n')
    python.chmod(0o700)
    os.environ["PYTHON_EXEC"] = str(python)  # torchrun starts its processes with it


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    """What imports have made stays: each training, which starts with a search for garbage, need not look through it."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # or the end finds leaks


def sentence_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Different sentences of 4 to 14 words and their translations, word by word."""
    rng = random.Random(seed)

    def noun_phrase():
        return [rng.choice(ARTICLES), *rng.sample(ADJECTIVES, rng.randrange(3)), rng.choice(NOUNS)]

    sources = {}
    while len(sources) < count:
        words = [*noun_phrase(), rng.choice(VERBS), *noun_phrase()]
        if rng.random() < 0.3:
            words += ["and", rng.choice(VERBS), *noun_phrase()]
        sources[" ".join(words)] = " ".join(WORDS[word] for word in words)
    return [{"en": f"{source} .", "de": f"{target} ."} for source, target in sources.items()]


@pytest.fixture(scope="session")
def pairs() -> dict[str, list[dict[str, str]]]:
    """The sentence pairs of the tiny corpus, by split."""
    everything = sentence_pairs(380)
    return {"train": everything[:320], "validation": everything[320:350], "test": everything[350:]}


@pytest.fixture(scope="session")
def corpus_folder(pairs, tmp_path_factory) -> str:
    """The tiny corpus as a folder that `datasets.load_dataset` loads."""
    from datasets import Dataset, Features, Translation

    folder = tmp_path_factory.mktemp("corpus")
    for split, rows in pairs.items():
        features = Features({"translation": Translation(["en", "de"])})
        Dataset.from_dict({"translation": rows}, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def recipe(corpus_folder) -> dict:
    """A recipe of a tiny model: dropout on, 4 epochs of about 11 steps, evaluated and saved every 4 steps."""
    return {
        "dataset_name": corpus_folder,
        "source_lang": "en",
        "target_lang": "de",
        "max_source_length": 32,
        "max_target_length": 32,
        "vocab_size": 320,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "dropout": 0.1,
        "per_device_train_batch_tokens": 512,
        "learning_rate": "1e-2",
        "warmup_steps": 10,
        "num_train_epochs": 4,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "early_stopping_patience": 6,
        "num_beams": 2,
        "max_new_tokens": 24,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
    }


def recipe_writer(recipe: dict, tmp_path_factory):
    """Writes a recipe with changes (`None` leaves a key out), with an `output_dir` of its own, to a YAML file."""

    def write(**changes) -> Path:
        folder = tmp_path_factory.mktemp("run")
        values = {"output_dir": str(folder / "output"), **recipe, **changes}
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return path

    return write


@pytest.fixture(scope="session")
def write_recipe(recipe, tmp_path_factory):
    """Writes `recipe` with changes; see [`recipe_writer`]."""
    return recipe_writer(recipe, tmp_path_factory)


@pytest.fixture(scope="session")
def start_cli():
    """Starts the console script as a user does; standard streams are pipes of bytes, `environment` replaces ours."""
    script = Path(sysconfig.get_path("scripts"), "hf-rskip")

    def start(*words, python=(sys.executable,), environment=None, **kwargs) -> subprocess.Popen:
        command = [*python, script, *words]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        if environment is None:
            environment = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
        return subprocess.Popen([str(word) for word in command], env=environment, **{**pipes, **kwargs})

    return start


@pytest.fixture(scope="session")
def shadow_libraries():
    """Puts files with the names of libraries into a folder; a process that imports one ends at once, with code 66."""

    def shadow(folder: Path) -> Path:
        for name in ("datasets", "evaluate", "matplotlib", "sacrebleu", "yaml"):
            (folder / f"{name}.py").write_text("import os\n\nos._exit(66)\n")
        return folder

    return shadow


@pytest.fixture(scope="session")
def warm_python() -> str:
    """A `python` that has done its imports (see `warm_python.py`), where there is one."""
    return os.environ.get("PYTHON_EXEC", sys.executable)


@pytest.fixture
def uninitialized_memory_is_nan():
    import torch

    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def run_cli(start_cli, warm_python):
    """Runs the console script to its end, by [`warm_python`] unless told otherwise; returns `code`, `out` and `err`
    (decoded), and `raw`, the output's bytes."""

    def run(*words, stdin: bytes = b"", python=(warm_python,), **kwargs) -> SimpleNamespace:
        process = start_cli(*words, python=python, **kwargs)
        out, err = process.communicate(stdin, timeout=300)
        return SimpleNamespace(code=process.returncode, out=out.decode(), err=err.decode(), raw=out)

    return run


@pytest.fixture(scope="session")
def train_once(run_cli, tmp_path_factory, worker_id):
    """Runs `hf-rskip train` once for all processes of pytest-xdist.

    Returns:
        A function of a name and of what writes a recipe, which returns the run: its `recipe` (path), `folder`, and what
        the command printed, `out` and `err`.
    """
    base = tmp_path_factory.getbasetemp()
    common = base if worker_id == "master" else base.parent

    def train(name, write) -> SimpleNamespace:
        record = common / f"{name}.json"
        with FileLock(f"{record}.lock"):
            if not record.exists():
                path = write()
                result = run_cli("train", path)
                assert result.code == 0, result.err
                record.write_text(json.dumps({"recipe": str(path), "out": result.out, "err": result.err}))
        run = SimpleNamespace(**json.loads(record.read_text()))
        run.recipe = Path(run.recipe)
        run.folder = run.recipe.parent / "output"
        return run

    return train


@pytest.fixture(scope="session")
def trained(train_once, write_recipe) -> SimpleNamespace:
    """The tiny translation model; see [`train_once`]."""
    return train_once("trained", write_recipe)


@pytest.fixture(scope="session")
def model_and_tokenizer(trained):
    """The tiny model and its tokenizer, on the CPU."""
    from hf_rskip.decoding.loading import load_model

    model, tokenizer = load_model(str(trained.folder))
    return model.cpu(), tokenizer


COLOURS = {"blue": (40, 70, 200), "green": (60, 180, 70), "red": (210, 50, 40), "yellow": (230, 210, 60)}


def colour_images(count: int, size, seed: int) -> dict[str, list]:
    """Images of one colour under noise, and its number; `size` gives the width and height of the image of a number."""
    import numpy as np
    from PIL import Image

    rng, images, labels = np.random.default_rng(seed), [], []
    for number in range(count):
        width, height = size(number)
        label = number % len(COLOURS)
        pixels = np.array(list(COLOURS.values())[label]) + rng.normal(0, 60, (height, width, 3))
        images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        labels.append(label)
    return {"image": images, "label": labels}


def save_images(folder: Path, split: str, columns: dict[str, list], image: str = "img") -> None:
    """Writes a split as parquet, with the class names of [`COLOURS`]."""
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({image: Image(), "label": ClassLabel(names=list(COLOURS))})
    columns = {image: columns["image"], "label": columns["label"]}
    Dataset.from_dict(columns, features=features).to_parquet(Path(folder) / f"{split}.parquet")


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory) -> str:
    """Images of four colours in the schema of CIFAR-10: `img` of 32 x 32, `label`, splits train and test."""
    folder = tmp_path_factory.mktemp("cifar")
    for seed, (split, count) in enumerate({"train": 320, "test": 40}.items()):
        save_images(folder, split, colour_images(count, lambda number: (32, 32), seed))
    return str(folder)


@pytest.fixture(scope="session")
def imagenet_folder(tmp_path_factory) -> str:
    """The same in the schema of ImageNet: `image` of many sizes, a validation split, and test images without labels."""
    folder = tmp_path_factory.mktemp("imagenet")
    for seed, (split, count) in enumerate({"train": 96, "validation": 24, "test": 8}.items()):
        columns = colour_images(count, lambda number: (40 + 7 * number % 50, 36 + 11 * number % 60), seed)
        if split == "test":
            columns["label"] = [-1] * count
        save_images(folder, split, columns, image="image")
    return str(folder)


@pytest.fixture(scope="session")
def image_recipe(cifar_folder) -> dict:
    """A recipe of a tiny ResNet: crops, flips and stochastic depth on, 3 epochs of 9 steps, evaluated every 3."""
    return {
        "task": "image-classification",
        "dataset_name": cifar_folder,
        "validation_size": 40,
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "stem_type": "cifar",
        "drop_path_rate": 0.1,
        "learning_rate": 0.05,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 32,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
    }


@pytest.fixture(scope="session")
def write_image_recipe(image_recipe, tmp_path_factory):
    """Writes `image_recipe` with changes; see [`recipe_writer`]."""
    return recipe_writer(image_recipe, tmp_path_factory)


@pytest.fixture(scope="session")
def trained_resnet(train_once, write_image_recipe) -> SimpleNamespace:
    """The tiny ResNet; see [`train_once`]."""
    return train_once("trained_resnet", write_image_recipe)
