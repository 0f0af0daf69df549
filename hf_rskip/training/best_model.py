"""Ranks the evaluations of a run by its metric, and ties by other metrics."""

import math
from collections.abc import Mapping

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from ..manifest import check_manifest

logger = logging.get_logger(__name__)

TIE_BREAKERS = ("chrf", "accuracy", "loss")
"""Metrics that decide, in this order, between evaluations that are equal by the chosen one."""


def rank_scores(scores: Mapping[str, float], metric: str) -> tuple[float, ...]:
    """Returns a tuple that is greater for better scores, by `metric` first; not a number is the worst.

    Names of scores may begin with `eval_`.
    """
    scores = {name.removeprefix("eval_"): value for name, value in scores.items()}
    names = [metric.removeprefix("eval_"), *TIE_BREAKERS]
    values = [-scores[name] if name == "loss" else scores[name] for name in names if name in scores]
    return tuple(-math.inf if math.isnan(value) else value for value in values)


class BestModelCallback(TrainerCallback):
    """Breaks ties of `metric_for_best_model`, where the Trainer alone keeps the first of equal evaluations.

    It stands before `EarlyStoppingCallback`, for which an evaluation that wins a tie is an improvement, too. Checks at
    the end of a training that the best model is as it was saved, and warns if the metric never moved.
    """

    def __init__(self):
        self.resumed: str | None = None
        """Path of the best checkpoint of the run that is resumed."""
        self._is_training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_training = True
        state.best_model_checkpoint = self.resumed or state.best_model_checkpoint

    def on_evaluate(self, args, state, control, **kwargs):
        metric = args.metric_for_best_model
        if self._is_training and metric is not None:
            *earlier, last = (rank_scores(log, metric) for log in list_evaluations(state))
            if all(last > rank for rank in earlier):
                state.best_metric = None  # so that the Trainer and early stopping see an improvement

    def on_train_end(self, args, state, control, **kwargs):
        self._is_training = False
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            check_manifest(state.best_model_checkpoint)
        if args.metric_for_best_model is None or not state.is_world_process_zero:
            return
        name = args.metric_for_best_model.removeprefix("eval_")
        values = [log[f"eval_{name}"] for log in list_evaluations(state)]
        if len(values) > 1 and len(set(values)) == 1:
            evaluated = list_evaluations(state)[0]
            others = [part for part in TIE_BREAKERS if part != name and f"eval_{part}" in evaluated] or ["step"]
            logger.warning(
                f"{name} was {values[0]:.4g} at all {len(values)} evaluations, so the best model was chosen by "
                f"{' and '.join(others)}: set metric_for_best_model to what tells models apart."
            )


def list_evaluations(state: TrainerState) -> list[dict[str, float]]:
    """The evaluations of a run in its log, with their `step`."""
    return [log for log in state.log_history if "eval_loss" in log]
