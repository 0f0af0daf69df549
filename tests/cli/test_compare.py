"""`hf-rskip compare` as a user meets it: models and files, what it prints and writes, and mistakes."""

import csv
import json

import numpy as np
import pytest
import sacrebleu
from PIL import Image

from hf_rskip.cli.main import main
from hf_rskip.decoding.translate import translate


@pytest.fixture
def compare(tmp_path, pairs, trained, monkeypatch, capfd):
    """Runs the command in this process beside `bad.txt` and the test set as files; returns code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    for language in ("en", "de"):
        (tmp_path / f"test.{language}").write_text("".join(f"{pair[language]}\n" for pair in pairs["test"]))
    bad = [" ".join(pair["de"].split()[::2]) for pair in pairs["test"]]
    (tmp_path / "bad.txt").write_text("".join(f"{line}\n" for line in bad))

    def compare(*words, test_set=("--test_files", "test.en", "test.de")):
        code = main(["compare", *map(str, words), *map(str, test_set)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return compare


def read_table(text: str) -> list[dict[str, str]]:
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    )
    names = [name if name != "95%" else f"{header[position - 1]} 95%" for position, name in enumerate(header)]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_a_model_and_files_in_a_process_of_their_own(run_cli, compare, trained, pairs, model_and_tokenizer, tmp_path):
    (tmp_path / "best.txt").write_text("".join(f"{pair['de']}\n" for pair in pairs["test"]))
    folder = tmp_path / "new" / "out"
    words = ["compare", "bad.txt", trained.folder, "best.txt", "--test_files", "test.en", "test.de"]
    options = ["--num_beams", "1", "--n_samples", "100", "--output_dir", folder]
    result = run_cli(*words, *options, cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.err == ""

    sources, references = ([pair[language] for pair in pairs["test"]] for language in ("en", "de"))
    translations = {
        "bad.txt": (tmp_path / "bad.txt").read_text().splitlines(),
        "output": translate(*model_and_tokenizer, sources, num_beams=1),
        "best.txt": references,
    }
    table = read_table(result.out)
    assert [(row["metric"], row["system"]) for row in table] == [
        (metric, name) for metric in ("BLEU", "chrF") for name in translations
    ]
    for row in table:
        metric = {"BLEU": sacrebleu.corpus_bleu, "chrF": sacrebleu.corpus_chrf}[row["metric"]]
        assert row["score"] == f"{metric(translations[row['system']], [references]).score:.2f}"
    assert (table[0]["difference"], table[0]["p boot."], table[2]["score"]) == ("baseline", "", "100.00")
    assert (table[2]["p boot."], table[2]["p rand."]) == (f"{2 / 101:.4f}", f"{1 / 101:.4f}")
    assert table[2]["wins"] == "100.0%"
    assert "nrefs:1|bs:100|seed:12345|case:mixed|" in result.out and "nrefs:1|ar:100|seed:12345|" in result.out

    assert sorted(path.name for path in folder.iterdir()) == [
        "comparison.json",
        "comparison.md",
        "comparison.png",
        "sentences.csv",
    ]
    summary = json.loads((folder / "comparison.json").read_text())
    assert summary["sentences"] == 30 and [system["name"] for system in summary["systems"]] == list(translations)
    best = summary["systems"][2]
    assert best["length_ratio"] == 1 and best["scores"]["BLEU"] == pytest.approx(100)
    low, high = best["differences"]["chrF"]["interval"]
    assert 0 < low <= best["differences"]["chrF"]["score"] <= high
    markdown = (folder / "comparison.md").read_text()
    assert read_table(markdown) == table and "(comparison.png)" in markdown
    assert b"\r" not in (folder / "sentences.csv").read_bytes()
    with (folder / "sentences.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["source"], row["reference"]) for row in rows] == list(zip(sources, references, strict=True))
    for name, lines in translations.items():
        assert [row[f"{name} translation"] for row in rows] == lines
    for row in rows:
        gain = float(row["best.txt chrF"]) - float(row["bad.txt chrF"])
        assert float(row["best.txt difference"]) == pytest.approx(gain)
    most = max(rows, key=lambda row: float(row["best.txt difference"]))
    section = markdown.split("### best.txt")[1]
    assert section.split("#### Most better\n\n")[1].startswith(f"Sentence {most['sentence']}, ")
    assert "#### Most worse" not in section and "30 better, 0 worse, 0 equal" in section
    picture = np.asarray(Image.open(folder / "comparison.png").convert("RGB"))
    for color in [(0, 0, 0), (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)]:  # the lines of three systems
        assert (picture == color).all(-1).sum() > 100


def test_the_same_call_writes_the_same_files(compare, pairs, corpus_folder, tmp_path):
    (tmp_path / "best.txt").write_text("".join(f"{pair['de']}\n" for pair in pairs["test"]))
    dataset = ("--dataset_name", corpus_folder, "--source_lang", "en", "--target_lang", "de")
    outputs = []
    for folder, test_set in [("a", dataset), ("b", dataset), ("c", ("--test_files", "test.en", "test.de"))]:
        words = ["bad.txt", "best.txt", "--n_samples", "100", "--output_dir", folder]
        code, out, err = compare(*words, test_set=test_set)
        assert code == 0, err
        outputs.append([out, *(path.read_bytes() for path in sorted((tmp_path / folder).iterdir()))])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_model_against_its_own_translations(compare, trained, corpus_folder, tmp_path):
    """Languages are those of the model; equal translations do not differ."""
    dataset = ["--dataset_name", corpus_folder, "--max_samples", "12"]
    output = tmp_path / "own.txt"
    assert main([str(word) for word in ("evaluate", trained.folder, *dataset, "--output_file", output)]) == 0
    code, out, err = compare("own.txt", trained.folder, "--n_samples", "100", test_set=dataset)
    assert code == 0, err
    rows = read_table(out[out.index("| metric") :])
    assert [row["difference"] for row in rows] == ["baseline", "+0.00"] * 2
    assert all((row["p boot."], row["p rand."]) == ("1.0000", "1.0000") for row in rows[1::2])


def test_odd_sentences(compare, tmp_path):
    """Markup, a formula, separators and nothing at all; one sentence; names with a bar."""
    odd = '| $x^2$ **b** <i> `c` # ," \u2028 x\x0by\n'
    (tmp_path / "one.en").write_text(odd)
    (tmp_path / "one.de").write_text(odd)
    (tmp_path / "a|$b.txt").write_text("\n")
    (tmp_path / "c.txt").write_text(odd)
    words = ["a|$b.txt", "c.txt", "--n_samples", "100", "--output_dir", "out"]
    code, out, err = compare(*words, test_set=("--test_files", "one.en", "one.de"))
    assert code == 0, err
    assert "a\\|$b.txt" in out
    with (tmp_path / "out" / "sentences.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["c.txt translation"] == row["source"] == odd[:-1] and row["a|$b.txt translation"] == ""
    assert f"    source     {' '.join(odd.split())}\n" in (tmp_path / "out" / "comparison.md").read_text()


def test_the_target_language_decides_how_bleu_counts(compare, trained, tmp_path, capfd, caplog):
    """Whatever the model says, of which the sentences would be single words of 13a."""
    (tmp_path / "test.zh").write_text("他们明天去北京。\n我喜欢猫。\n")
    (tmp_path / "zh.txt").write_text("他们明天去上海。\n我喜欢猫。\n")
    files = ("--test_files", "test.zh", "test.zh", "--target_lang", "zh")
    code, out, err = compare("zh.txt", "test.zh", "--n_samples", "100", test_set=files)
    assert code == 0 and "|tok:zh|" in out and float(read_table(out)[0]["score"]) > 50, err
    assert main(["evaluate", str(trained.folder), *files]) == 0
    scores = json.loads(capfd.readouterr().out)
    assert "|tok:zh|" in scores["bleu_signature"] and "bleu_compound_split" not in scores
    assert f"--target_lang is 'zh', and {trained.folder} was trained with target_lang 'de'" in caplog.text


def test_evaluate_prints_each_form_of_bleu(trained, corpus_folder, pairs, capfd):
    from hf_rskip.evaluation.compound_split import compound_split_bleu

    output = trained.folder.parent / "forms.txt"
    words = ["evaluate", trained.folder, "--dataset_name", corpus_folder, "--output_file", output, "--num_beams", "1"]
    assert main([str(word) for word in words]) == 0
    captured = capfd.readouterr()
    scores, lines = json.loads(captured.out), output.read_text().splitlines()
    references = [pair["de"] for pair in pairs["test"]]
    for name, tokenize in {"bleu": "13a", "bleu_intl": "intl"}.items():
        assert scores[name] == sacrebleu.corpus_bleu(lines, [references], tokenize=tokenize, force=True).score
        assert f"tok:{tokenize}|" in scores[f"{name}_signature"]
    assert scores["bleu_compound_split"] == compound_split_bleu(lines, references, "de")[0] > 0
    assert scores["bleu_compound_split_signature"].startswith("multi-bleu|")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bad.txt"], "at least two systems"),
        (["bad.txt", "./bad.txt"], "'./bad.txt' is given twice"),
        (["bad.txt", "test.de", "--num_beams", "4"], "--num_beams is for models, and all systems are files"),
        (["bad.txt", "test.de", "--max_batch_tokens", "4"], "--max_batch_tokens is for models, and all systems are"),
        (["bad.txt", "test.de", "--n_samples", "1"], "--n_samples must be a whole number of at least 100, not 1."),
        (["bad.txt", "test.de", "--split", "dev"], "--split has no effect with --test_files"),
        (["bad.txt", "short.txt"], "'short.txt' has 2 translations, but the test set 30 sentences"),
        (["bad.txt", "empty.txt"], "'empty.txt' has 0 translations, but the test set 30 sentences"),
        (["bad.txt", "latin.txt"], "latin.txt, line 1 is not UTF-8"),
        (["bad.txt", "no_such.txt"], "'no_such.txt'"),
        (["bad.txt", "test.de", "--bleu_tokenize", "no_such"], "'no_such' is not to be had from sacreBLEU"),
        (["bad.txt", "test.de", "--output_dir", "bad.txt/out"], "'bad.txt/out' cannot be a folder"),
        (["bad.txt", "test.de", "--dataset_name", "{corpus}"], "No model says what the source_lang is"),
        (["bad.txt", "{model}", "--dataset_name", "{corpus}", "--target_lang", "fr"], "'fr'"),
    ],
)
def test_mistakes(compare, trained, corpus_folder, tmp_path, words, message):
    (tmp_path / "short.txt").write_text("a\nb\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"stra\xdfe\n")
    words = [word.format(model=trained.folder, corpus=corpus_folder) for word in words]
    test_set = () if "--dataset_name" in words else ("--test_files", "test.en", "test.de")
    code, out, err = compare(*words, test_set=test_set)
    *_, line = err.splitlines()
    assert code == 2 and out == "" and line.startswith("hf-rskip: error: ") and message in line
    assert "Traceback" not in err
