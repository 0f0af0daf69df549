"""What trainings of a study would leave."""

from hf_rskip.evaluation.predictions import write_predictions
from hf_rskip.studies.cell import write_result


def finish(cell, bleu: float, curve: list[float], predictions=("a b c d",), references=("a b c d",)) -> None:
    """Leaves what a training leaves; the model that was kept is that of the best evaluation."""
    cell.folder.mkdir(parents=True)
    write_predictions(cell.folder, list(predictions), list(references))
    write_result(
        cell,
        state="finished",
        test={"bleu": bleu, "bleu_signature": "made up"},
        validation=[{"step": 100 * step, "bleu": value} for step, value in enumerate(curve, 1)],
        kept_step=100 * (1 + curve.index(max(curve))),
        steps=100 * len(curve),
        parameters=1_000_000,
        seconds=12.0,
        resumed=False,
        device="CPU",
        versions={"torch": "2"},
        commit=None,
        date="2026-01-01T00:00:00+00:00",
        command=f"hf-rskip train {cell.recipe_path}",
    )


def diverge(cell, step: int) -> None:
    cell.folder.mkdir(parents=True)
    about = {"device": "CPU", "versions": {"torch": "2"}, "commit": None, "date": "2026-01-01T00:00:00+00:00"}
    about["command"] = f"hf-rskip train {cell.recipe_path}"
    write_result(cell, state="diverged", step=step, message=f"Step {step}: the loss is nan", **about)
