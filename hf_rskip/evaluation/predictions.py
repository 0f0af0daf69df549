"""A model's predictions of its test split, in the folder of its run, from which it is compared with others."""

import json
from pathlib import Path

PREDICTIONS_NAME = "test_predictions.json"


def write_predictions(folder: str | Path, predictions: list, references: list) -> None:
    """Writes translations and references in the form in which they were scored, or predicted and right classes."""
    content = {"predictions": predictions, "references": references}
    Path(folder, PREDICTIONS_NAME).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def read_predictions(path: Path) -> tuple[list, list]:
    """Reads the predictions and the references of [`write_predictions`]."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["predictions"], content["references"]
