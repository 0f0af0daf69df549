"""The command line as a user meets it: help at once, one sentence about a mistake, and clean output."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import sacrebleu

from hf_rskip import SKIP_CONNECTIONS, cli
from hf_rskip.cli.files import check_output
from hf_rskip.cli.main import COMMANDS, main
from hf_rskip.decoding.translate import translate
from hf_rskip.errors import UserError
from hf_rskip.own_modules import import_modules


@pytest.fixture
def fail(capfd, caplog):
    """Runs a command that fails in this process; returns the one line on standard error."""

    def fail(*words):
        assert main([str(word) for word in words]) == 2
        captured = capfd.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("hf-rskip: error: ") and "Traceback" not in line
        assert re.search(r"[^.]\.$|\?$", line), "it ends with one stop"
        assert not captured.out.strip()
        return line

    return fail


# Help


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(run_cli, words):
    result = run_cli(*words, "--help", python=[sys.executable, "-X", "importtime"])
    assert result.code == 0 and result.out.startswith("usage: hf-rskip")
    imported = set(re.findall(r"\| +(\w+)", result.err))
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "datasets", "numpy", "tokenizers", "accelerate", "sacrebleu"}


def test_no_command_imports_another():
    for command in COMMANDS:
        source = Path(cli.__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
        assert not set(re.findall(r"from \.(\w+) import", source)) & COMMANDS.keys(), command


def test_version(run_cli):
    result = run_cli("--version", python=[sys.executable])
    assert result.code == 0 and re.fullmatch(r"hf-rskip \d+\.\d+\S*\n", result.out)


def test_env(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [re.fullmatch(r"- (\w+): .+", line)[1] for line in lines]
    assert {"platform", "python", "hf_rskip", "torch", "transformers", "datasets", "device"} <= set(names)


# Mistakes


def test_an_error_in_a_process_of_its_own(run_cli, write_recipe):
    result = run_cli("train", write_recipe(target_lang="missing"))
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("hf-rskip: error: ") and "missing" in line


def test_debug_shows_where(capfd, tmp_path):
    assert main(["translate", str(tmp_path / "missing"), "--debug"]) == 2
    error = capfd.readouterr().err
    assert "Traceback (most recent call last)" in error and "UserError" in error and "missing" in error


def test_a_killed_process_is_followed_by_no_warning_of_leaked_semaphores(run_cli, tmp_path):
    (tmp_path / "ended.py").write_text(
        "import multiprocessing, os\nlock = multiprocessing.get_context('spawn').Lock()\nos.kill(os.getpid(), 9)\n"
    )
    result = run_cli("env", "--import_module", "ended", cwd=tmp_path, python=(sys.executable,))
    assert (result.code, result.err) == (-9, "")


@pytest.mark.parametrize(
    "words", [["frobnicate"], [], ["translate"], ["env", "--no_such_option"], ["evaluate", "model"]]
)
def test_a_wrong_command_line(capfd, words):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert re.match(r"hf-rskip( \w+)?: error: ", last)


def test_only_options_are_suggested(capfd):
    with pytest.raises(SystemExit):
        main(["translate", "a_model", "--models", "3"])  # MODEL is no option
    *_, last = capfd.readouterr().err.splitlines()
    assert last == "hf-rskip translate: error: unrecognized arguments: --models 3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "/no/such/folder"}, "/no/such/folder"),
        ({"dataset_name": None}, "dataset_name"),
        ({"target_lang": "fr"}, "'fr'"),
        ({"test_split": "devtest"}, "'devtest'"),
        ({"d_model": 33, "dataset_name": "/no/such"}, "`d_model` must be a multiple of"),  # before any data is read
        ({"skip_type": "skip"}, "`skip_type` must be one of"),
        ({"skip_recursions": 0}, "`skip_recursions` must be"),
        ({"max_source_length": 100}, "max_position_embeddings must be at least 100"),
        ({"vocab_size": 100}, "vocab_size must be at least 260"),
        ({"per_device_train_batch_tokens": 5}, "budget of 5"),
        ({"max_source_length": 2}, "No training pair is left"),
        ({"skip_recusions": 2}, "'skip_recursions'"),
        ({"metric_for_best_model": "blue"}, "blue"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_in_a_recipe(fail, write_recipe, changes, message):
    recipe = write_recipe(**changes)
    assert message in fail("train", recipe)
    assert not list(recipe.parent.glob("output/*"))


def test_misaligned_text_files(fail, write_recipe, tmp_path):
    for language, text in {"en": "a\nb\n", "de": "a\n"}.items():
        (tmp_path / f"train.{language}").write_text(text)
    files = [str(tmp_path / f"train.{language}") for language in ("en", "de")]
    line = fail("train", write_recipe(dataset_name=None, train_files=files))
    assert "train.en has 2 and " in line and "train.de only 1" in line


def test_a_folder_with_checkpoints(fail, trained):
    assert "resume_from_checkpoint" in fail("train", trained.recipe)


def test_evaluate_mistakes(fail, trained, corpus_folder):
    assert "/no/such" in fail("evaluate", "/no/such", "--dataset_name", corpus_folder)
    assert "/no/such" in fail("evaluate", trained.folder, "--dataset_name", "/no/such")
    assert "'fr'" in fail("evaluate", trained.folder, "--dataset_name", corpus_folder, "--target_lang", "fr")
    assert "--label_column is for models that classify" in fail(
        "evaluate", trained.folder, "--dataset_name", corpus_folder, "--label_column", "label"
    )
    assert "'dev'" in fail("evaluate", trained.folder, "--dataset_name", corpus_folder, "--split", "dev")
    # Before the corpus is read.
    assert "bleu_tokenize 'nope'" in fail(
        "evaluate", trained.folder, "--dataset_name", "/no", "--bleu_tokenize", "nope"
    )
    assert "'nope'" in fail(
        "compare", trained.folder, trained.recipe, "--dataset_name", "/no", "--bleu_tokenize", "nope"
    )


@pytest.mark.parametrize("command", ["evaluate", "translate", "score"])
def test_a_failure_leaves_the_output_file_as_it_was(fail, trained, tmp_path, command):
    output, folder = tmp_path / "output.txt", tmp_path / "no"
    output.write_text("of an earlier run\n")
    words = ["--input_file", "/no/such"] if command == "translate" else ["--dataset_name", "/no/such"]
    fail(command, trained.folder, *words, "--output_file", output)
    assert output.read_text() == "of an earlier run\n" and list(tmp_path.iterdir()) == [output]
    # And what cannot be written is found before there is any work.
    corpus = [] if command == "translate" else words
    assert str(folder / "output.txt") in fail(command, trained.folder, *corpus, "--output_file", folder / "output.txt")


def test_an_output_in_the_folder_of_a_model_is_written_again(tmp_path):
    files = ["config.json", "vocab.txt", "index.html", "optimizer.pt", "rng_state_0.pth"]
    for name in (*files, "hypotheses.txt"):
        (tmp_path / name).touch()
    check_output(str(tmp_path / "hypotheses.txt"), ())
    for name in files:
        with pytest.raises(UserError, match="is there already, in the folder of a model"):
            check_output(str(tmp_path / name), ())


def test_an_output_dir_that_cannot_be_written_is_found_first(fail, write_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "output"):
        recipe = write_recipe(dataset_name="/no/such/folder", output_dir=str(output_dir))
        assert f"output_dir '{output_dir}' cannot be written into: " in fail("train", recipe)


def test_translate_mistakes(fail, trained, tmp_path):
    assert str(tmp_path / "missing") in fail("translate", tmp_path / "missing")
    assert "no.txt' cannot be opened: No such file" in fail(
        "translate", trained.folder, "--input_file", tmp_path / "no.txt"
    )
    source = tmp_path / "source.txt"
    source.write_bytes(b"fine\n\nbroken \xff\n")
    assert f"{source}, line 3 is not UTF-8: byte 0xff at byte offset 13." in fail(
        "translate", trained.folder, "--input_file", source
    )
    output = tmp_path / "no" / "output.txt"
    assert "cannot be opened" in fail("translate", trained.folder, "--input_file", source, "--output_file", output)
    source.write_text("the cat .\n")
    same = ("--input_file", source, "--output_file", source)
    assert "cannot be both input and output" in fail("translate", trained.folder, *same)
    assert source.read_text() == "the cat .\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("length_penalty", "-1"),
        ("length_penalty", "inf"),
        ("gnmt_length_penalty", "nan"),
        ("max_len_a", "-0.5"),
        ("max_len_a", "nan"),
        ("max_len_b", "-3"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["translate", "/no/model"],
        ["evaluate", "{model}", "--dataset_name", "/no/data"],
        ["compare", "/no/a", "/no/b", "--dataset_name", "/no/data"],
    ],
    ids=lambda words: words[0],
)
def test_generation_options_are_checked_before_anything_is_read(fail, trained, words, key, value):
    words = [word.format(model=trained.folder) for word in words]
    allowed = "a finite number" if value in ("inf", "nan") else "at least 0"
    assert f"{key} must be {allowed}, not" in fail(*words, f"--{key}={value}")


# Work


def test_train_from_text_files(write_recipe, pairs, tmp_path, capfd):
    files = {}
    for split, rows in pairs.items():
        files[f"{split}_files"] = []
        for language in ("en", "de"):
            path = tmp_path / f"{split}.{language}"
            path.write_text("".join(f"{pair[language]}\n" for pair in rows), encoding="utf-8")
            files[f"{split}_files"].append(str(path))
    recipe = write_recipe(dataset_name=None, max_new_tokens=None, **files)
    search = {"num_beams": 3, "gnmt_length_penalty": 0.6, "max_len_a": 1.0, "max_len_b": 50}
    words = [word for key, value in search.items() for word in (f"--{key}", str(value))]
    assert main(["train", str(recipe), "--max_steps", "4", *words]) == 0, capfd.readouterr().err
    folder = recipe.parent / "output"
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4
    assert "test_bleu" in json.loads((folder / "all_results.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {key: generation[key] for key in search} == search
    assert not generation.keys() & {"length_penalty", "max_new_tokens"}


def test_evaluate(trained, corpus_folder, pairs, tmp_path, capfd):
    output = tmp_path / "translations.txt"
    words = [
        "evaluate",
        trained.folder,
        "--dataset_name",
        corpus_folder,
        "--output_file",
        output,
        "--max_samples",
        "20",
    ]
    assert main([str(word) for word in words]) == 0
    scores = json.loads(capfd.readouterr().out)
    translations = output.read_text(encoding="utf-8").split("\n")[:-1]
    references = [pair["de"] for pair in pairs["test"][:20]]
    bleu, chrf = sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF()
    expected = {
        "bleu": bleu.corpus_score(translations, [references]).score,
        "chrf": chrf.corpus_score(translations, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }
    assert scores == {**scores, **expected, "sentences": 20} and scores["bleu"] > 0


def test_evaluate_gives_the_score_of_training(run_cli, trained, corpus_folder, pairs, tmp_path, capfd):
    """On a dataset, and on text files of the same."""
    result = run_cli("evaluate", trained.folder, "--dataset_name", corpus_folder)
    assert result.code == 0, result.err
    results = json.loads((trained.folder / "all_results.json").read_text())
    assert json.loads(result.out)["bleu"] == pytest.approx(results["test_bleu"], abs=1e-9)
    files = [tmp_path / f"test.{language}" for language in ("en", "de")]
    for path in files:
        path.write_text("".join(f"{pair[path.suffix[1:]]}\n" for pair in pairs["test"]), encoding="utf-8")
    assert main(["evaluate", str(trained.folder), "--test_files", *map(str, files)]) == 0
    assert capfd.readouterr().out == result.out


LINES = [
    "the old cat sees a mouse .",
    "",
    "a woman likes the street .",
    " \t ",
    "the cat\u2028sees\x0b\x0c\x1c\x85 a mouse\rand hears",
    "the </s> cat <pad> sees",
    "\u3000",
    "the red cat " * 60,
    "🐱 Ünïcode",
    "the mouse hears a street .",
]


@pytest.fixture(scope="module")
def expected(model_and_tokenizer):
    return [line.replace("\n", " ") for line in translate(*model_and_tokenizer, LINES)]


def test_translate_standard_input(run_cli, trained, expected):
    result = run_cli("translate", trained.folder, stdin="\n".join(LINES).encode())
    assert result.code == 0, result.err
    assert result.raw.decode().split("\n") == [*expected, ""]
    assert [not line for line in expected] == [not line.strip() for line in LINES]
    assert "1 of 10 sentences were cut off at 64 tokens" in result.err


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "not ended"])
def test_translate_files(trained, expected, tmp_path, capfd, end, last):
    source, target = tmp_path / "source.txt", tmp_path / "target.txt"
    source.write_bytes((end.join(LINES) + (end if last else "")).encode())
    assert main(["translate", str(trained.folder), "--input_file", str(source), "--output_file", str(target)]) == 0
    assert target.read_bytes().decode() == "".join(f"{line}\n" for line in expected)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("content", "output"), [(b"", b""), (b"\n", b"\n"), (b"\n\n\r\n", b"\n\n\n")])
def test_translate_next_to_nothing(trained, tmp_path, content, output):
    source, target = tmp_path / "source.txt", tmp_path / "target.txt"
    source.write_bytes(content)
    assert main(["translate", str(trained.folder), "--input_file", str(source), "--output_file", str(target)]) == 0
    assert target.read_bytes() == output


def test_translate_options(trained, model_and_tokenizer, tmp_path):
    source, target = tmp_path / "source.txt", tmp_path / "target.txt"
    source.write_text(LINES[0])
    words = ["--input_file", source, "--output_file", target, "--num_beams", "4", "--max_new_tokens", "3"]
    assert main(["translate", str(trained.folder), *map(str, words)]) == 0
    assert target.read_text().splitlines() == translate(*model_and_tokenizer, LINES[:1], num_beams=4, max_new_tokens=3)


def test_libraries_are_not_looked_for_in_the_current_folder(
    run_cli, shadow_libraries, trained, corpus_folder, tmp_path
):
    (tmp_path / "mine.py").touch()
    words = [trained.folder, "--dataset_name", corpus_folder, "--max_samples", "1", "--max_new_tokens", "1"]
    words += ["--import_module", "mine"]
    result = run_cli("evaluate", *words, cwd=shadow_libraries(tmp_path), python=[sys.executable])
    assert result.code == 0 and "bleu_signature" in result.out, result.err


def test_python_m_is_the_console_script(shadow_libraries, tmp_path):
    command = [sys.executable, "-m", "hf_rskip.cli", "convert", "resnet", "missing.pth", "new"]
    result = subprocess.run(command, cwd=shadow_libraries(tmp_path), capture_output=True, text=True)
    assert result.returncode == 2 and "'missing.pth'" in result.stderr, result.stderr


def test_the_current_folder_is_searched_last_for_modules_of_ones_own(tmp_path, monkeypatch):
    for name in ("colorsys", "a_module_of_my_own"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    with patch.dict(sys.modules):
        sys.modules.pop("colorsys", None)
        import_modules(["colorsys", "a_module_of_my_own"])
        found = [hasattr(sys.modules[name], "MINE") for name in ("colorsys", "a_module_of_my_own")]
    assert found == [False, True] and sys.path == path


def test_a_residual_kind_of_ones_own(run_cli, fail, write_recipe, tmp_path, monkeypatch):
    """A module that registers it is imported first, from the folder where one is."""
    (tmp_path / "my_kinds.py").write_text(
        "from hf_rskip import SKIP_CONNECTIONS, RSkip\n\n\nclass Mine(RSkip):\n    pass\n\n\n"
        'SKIP_CONNECTIONS["mine"] = Mine\n'
    )
    recipe = write_recipe(skip_type="mine", max_steps=4)
    assert "whose module is imported first (`--import_module`)" in fail("train", recipe)
    result = run_cli("train", recipe, "--import_module", "my_kinds", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "model: skip_type: mine, skip_norm: layer_norm, skip_recursions: 2" in result.out
    source, target = tmp_path / "source.txt", tmp_path / "target.txt"
    source.write_text("the cat .\n")
    words = ["translate", recipe.parent / "output", "--input_file", source, "--output_file", target]
    monkeypatch.chdir(tmp_path)
    with patch.dict(SKIP_CONNECTIONS):
        assert main([str(word) for word in [*words, "--import_module", "my_kinds"]]) == 0
    assert len(target.read_text().splitlines()) == 1


def test_keys_are_printed_with_their_defaults(capsys):
    assert main(["keys"]) == 0
    out = capsys.readouterr().out
    for line in (
        "skip_recursions (2)",
        "train_files (None) Two UTF-8",
        "d_model (512) Width of the model",
        "num_beams (5)",
        "lr_scheduler_type (inverse_sqrt)",
    ):
        assert f"\n  {line}" in out
