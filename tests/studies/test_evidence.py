"""A study's evidence: its report on another machine, where the folders of its cells are not."""

import shlex
import shutil

import pyarrow
import pytest
import yaml
from datasets import load_dataset
from made_up_cells import diverge, finish, leave_probes
from pyarrow import parquet

from hf_rskip.errors import UserError
from hf_rskip.probing.callback import TABLE_NAME
from hf_rskip.studies.evidence import EVIDENCE_NAME, restore_cells, write_evidence
from hf_rskip.studies.report import write_report
from hf_rskip.studies.results import gather_results
from hf_rskip.studies.study import read_study

ELSEWHERE = {"dataset_name": "./not-on-this-machine"}
"""Made-up cells were tested on no data that are here."""
REFERENCES = ["the dog runs in the park .", "a cat sits here now .", "two men talk on a bench ."]


@pytest.fixture
def moved(make_study, tmp_path):
    """A finished study, and its file and evidence alone in another folder, with another `output_dir`."""
    forms = {"one": {}, "two": {"dropout": 0.2}, "three": {"learning_rate": 0.5}}
    study = make_study(forms=forms, seeds=[1, 2], overrides=ELSEWHERE)
    for number, cell in enumerate(study.cells[:5]):
        if cell.form == "three":
            diverge(cell, 7)
        else:
            finish(cell, 20.0 + number, [1.0, 20.0], [line[: 20 - number] for line in REFERENCES], REFERENCES)
            leave_probes(cell, number)
    write_evidence(study)
    write_report(gather_results(study), "hf-rskip study", ["own_kind"])
    folder = tmp_path / "elsewhere" / tmp_path.name
    folder.mkdir(parents=True)
    shutil.copy(study.output_dir / EVIDENCE_NAME, folder)
    values = yaml.safe_load(study.path.read_text()) | {"output_dir": str(folder / "output")}
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return study, folder / "study.yaml"


def test_the_report_is_the_same_elsewhere(moved, capsys):
    study, path = moved
    elsewhere = read_study(path, [])
    assert gather_results(elsewhere).groups[0].test_mean is None
    restore_cells(elsewhere)
    assert "note: 5 cells are restored from" in capsys.readouterr().err
    write_report(gather_results(elsewhere), "hf-rskip study", ["own_kind"])
    before, after = study.output_dir, elsewhere.output_dir
    for name in ("report.md", "results.csv", "summary.csv"):
        text = (after / name).read_text().replace(str(after), str(before)).replace(str(path), str(study.path))
        assert text == (before / name).read_text()
    command = f"hf-rskip train {shlex.quote(str(elsewhere.cells[0].recipe_path))} --import_module own_kind\n"
    assert command in (after / "report.md").read_text()
    for name in ("scores.png", "curves.png", "courses.png"):
        assert (after / name).read_bytes() == (before / name).read_bytes()
    for cell, other in zip(study.cells[:5], elsewhere.cells, strict=False):
        if cell.form != "three":
            assert (other.folder / TABLE_NAME).read_bytes() == (cell.folder / TABLE_NAME).read_bytes()
    assert not elsewhere.cells[5].folder.exists()


def test_no_place_of_a_machine_is_in_it(moved, tmp_path):
    study, path = moved
    content = path.with_name(EVIDENCE_NAME).read_bytes()
    assert str(tmp_path).encode() not in content
    restored = read_study(path, [])
    restore_cells(restored)
    write_evidence(restored)
    assert (restored.output_dir / EVIDENCE_NAME).read_bytes() == content


def test_evidence_of_another_recipe_is_refused(moved):
    _, path = moved
    with pytest.raises(UserError, match=r"the cell one was run with d_model 32, not 64: remove the file"):
        restore_cells(read_study(path, ["--d_model", "64"]))
    table = parquet.read_table(path.with_name(EVIDENCE_NAME))
    for column, content in {"recipe": None, "result": '{"state": "finished"}'}.items():
        rows = table.to_pylist()
        rows[0][column] = content
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), path.with_name(EVIDENCE_NAME))
        with pytest.raises(UserError, match="evidence.parquet' is damaged: the row of one, seed 1 "):
            restore_cells(read_study(path, []))
    path.with_name(EVIDENCE_NAME).write_bytes(b"PAR1 and something else")
    with pytest.raises(UserError, match="is not the evidence of a study"):
        restore_cells(read_study(path, []))


def test_evidence_of_other_data_is_refused(make_study):
    """In place of scores of other data in a report that names the data of now."""
    study = make_study(forms={"one": {}}, seeds=[1], overrides={"max_predict_samples": 3})
    corpus = load_dataset(study.cells[0].keys["dataset_name"])["test"]
    references = [pair["de"] for pair in corpus["translation"][:3]]
    for tested in (references, [*references[:2], "Other data."]):
        finish(study.cells[0], 20.0, [1.0], references, tested)
        write_evidence(study)
        shutil.rmtree(study.cells[0].folder)
        if tested is references:
            restore_cells(study)
            assert gather_results(study).groups[0].test_mean == 20.0
            shutil.rmtree(study.cells[0].folder)
    expected = (
        "the cell one was run with test data that are not those of this study: remove the file, or choose another"
    )
    with pytest.raises(UserError, match=expected):
        restore_cells(study)
    assert not study.cells[0].folder.exists()
    for elsewhere in (ELSEWHERE, {"dataset_name": None, "train_files": ["a", "b"]}):
        restore_cells(make_study(forms={"one": {}}, seeds=[1], overrides={"max_predict_samples": 3, **elsewhere}))
        shutil.rmtree(study.cells[0].folder)


def test_evidence_of_the_same_recipe_in_other_words_is_taken(make_study):
    """A key of the command line, a word there, that now stands in the file."""
    study = make_study(forms={"one": {}}, seeds=[1], overrides=ELSEWHERE)
    study = read_study(study.path, ["--max_steps", "100"])
    finish(study.cells[0], 20.0, [1.0])
    write_evidence(study)
    shutil.rmtree(study.cells[0].folder)
    restored = make_study(forms={"one": {}}, seeds=[1], overrides={"max_steps": 100, **ELSEWHERE})
    restore_cells(restored)
    assert gather_results(restored).groups[0].test_mean == 20.0


@pytest.mark.parametrize("here, there", [("./mine", "./other"), ("user/model", "user/model")])
def test_a_study_that_starts_from_a_model_goes_on_elsewhere(make_study, here, there):
    """The path of the model is another there; an id on the Hub is the same."""
    study = make_study(forms={"one": {"model_name_or_path": here}}, seeds=[1], overrides=ELSEWHERE)
    finish(study.cells[0], 20.0, [1.0])
    write_evidence(study)
    (row,) = parquet.read_table(study.output_dir / EVIDENCE_NAME).to_pylist()
    assert (here in row["recipe"]) == (here == there)
    shutil.rmtree(study.cells[0].folder)
    restore_cells(make_study(forms={"one": {"model_name_or_path": there}}, seeds=[1], overrides=ELSEWHERE))
    assert study.cells[0].folder.exists()
    shutil.rmtree(study.cells[0].folder)
    with pytest.raises(UserError, match="was run with model_name_or_path"):
        restore_cells(make_study(forms={"one": {"model_name_or_path": "user/another"}}, seeds=[1], overrides=ELSEWHERE))
