"""The picture of a training: loss and validation BLEU by step."""

from pathlib import Path

CURVE_NAME = "training_curve.png"


def draw_training_curve(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Writes a PNG of the training loss (nats a token) and, where it was measured, the validation BLEU.

    Args:
        log_history: of `TrainerState`.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_series(log_history, "loss"), color="tab:blue")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)", color="tab:blue")
    axes.grid(alpha=0.3)
    steps, scores = _series(log_history, "eval_bleu")
    if steps:
        right = axes.twinx()
        right.plot(steps, scores, color="tab:orange", marker=".")
        right.set_ylabel("validation BLEU", color="tab:orange")
        right.set_ylim(bottom=0)
    # Without the time and version, so that the same run draws the same file.
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _series(log_history: list[dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    entries = [entry for entry in log_history if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]
