"""Plots the loss and the validation score of a training by step."""

from pathlib import Path

from ..picture import new_figure, save_figure

CURVE_NAME = "training_curve.png"


def draw_training_curve(
    log_history: list[dict[str, float]], path: Path, loss: str, score: str, label: str, scale: float
) -> None:
    """Writes a PNG of the training loss and, where it was measured, the validation score.

    Args:
        log_history: of `TrainerState`.
        path: of the picture.
        loss: label of the training loss, with its unit.
        score: name of the validation score in the log.
        label: of its axis.
        scale: by which it is multiplied.
    """
    figure = new_figure(6, 3.2)
    axes = figure.subplots()
    steps, losses = _series(log_history, "loss")
    axes.plot(steps, losses, color="tab:blue", marker="." if len(steps) < 10 else None)
    axes.set_xlabel("step")
    axes.set_ylabel(loss, color="tab:blue")
    axes.grid(alpha=0.3)
    steps, scores = _series(log_history, score)
    if steps:
        right = axes.twinx()
        right.plot(steps, [scale * value for value in scores], color="tab:orange", marker=".")
        right.set_ylabel(label, color="tab:orange")
        right.set_ylim(bottom=0)
    save_figure(figure, path)


def _series(log_history: list[dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log_history if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]
