"""What trainings of a study would leave."""

from hf_rskip.evaluation.predictions import write_predictions
from hf_rskip.probing.callback import TABLE_NAME
from hf_rskip.probing.probe import SublayerProbe
from hf_rskip.probing.table import ProbedModel, write_table
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
    )


def diverge(cell, step: int) -> None:
    cell.folder.mkdir(parents=True)
    about = {"device": "CPU", "versions": {"torch": "2"}, "commit": None, "date": "2026-01-01T00:00:00+00:00"}
    write_result(cell, state="diverged", step=step, message=f"Step {step}: the loss is nan", **about)


def leave_probes(cell, weight: float) -> None:
    """Of one sublayer an encoder and a decoder, at steps 0 and 100."""
    numbers = dict.fromkeys(SublayerProbe.__annotations__, weight)
    parts = {
        "name": "a.skip",
        "gain_mean": (1.0,),
        "gain_rms": (1.0,),
        **dict.fromkeys(("layer", "sublayer", "depth"), 0),
    }
    rows = [SublayerProbe(**{**numbers, **parts, "tokens": 7, "stack": stack}) for stack in ("encoder", "decoder")]
    write_table([ProbedModel("run", cell.seed, step, rows) for step in (0, 100)], cell.folder / TABLE_NAME)
