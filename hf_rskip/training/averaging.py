"""Averages of weights: of checkpoints, as in Vaswani et al. (2017), section 6.1, and moving ones."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import CONFIG_NAME

from ..conversion.output import new_folder
from ..errors import UserError
from ..hub.push import RESULT_FILES, collect_files
from ..manifest import MODEL_FILES, read_json, write_manifest
from .best_model import list_evaluations, rank_scores
from .checkpoints import checkpoint_step, list_checkpoints, read_state
from .resuming import read_record

MOVING_AVERAGE_NAME = "moving_average.safetensors"


def average_models(output: str | Path, folders: Sequence[str | Path]) -> None:
    """Writes the mean of models, with the tokenizer, generation configuration or image processor of the last one.

    Args:
        output: a new or empty folder.
        folders: of models or checkpoints of the same configuration and tokenizer; one that is named twice counts twice.

    Raises:
        [`UserError`]: if a folder is no complete model, or is not like the first.
    """
    output, folders = new_folder(output), [Path(folder) for folder in folders]
    weights = average_weights(folders)
    output.mkdir(parents=True, exist_ok=True)
    for name, path in collect_files(folders[-1]).items():
        if name not in RESULT_FILES and not name.startswith("model"):
            shutil.copyfile(path, output / name)
    save_torch_state_dict(weights, output, max_shard_size="50GB")
    write_manifest(output, MODEL_FILES)


def average_weights(folders: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """The mean of the weights in the safetensors files of models, computed in float64, in the type of the first.

    Running statistics of batch normalisation are averaged like weights: the mean of each is that of features under
    other weights than the averaged ones, which are near as long as the models are near each other. What is no
    floating-point number, such as a count of batches, is that of the last model.

    Raises:
        [`UserError`]: as [`average_models`].
    """
    if not folders:
        raise UserError("There is nothing to average")
    folders = [Path(folder) for folder in folders]
    files = [collect_files(folder) for folder in folders]
    for folder, found in zip(folders[1:], files[1:], strict=True):
        _check_alike(folder, found, folders[0], files[0])
    with ExitStack() as stack:
        models = [_open(stack, found) for found in files]
        shapes = [{name: tensors.get_slice(name).get_shape() for name, tensors in model.items()} for model in models]
        for folder, shape in zip(folders, shapes, strict=True):
            if shape != shapes[0]:
                raise UserError(f"{str(folder)!r} has other weights than {str(folders[0])!r}")
        means = {name: _mean([model[name].get_tensor(name) for model in models]) for name in models[0]}
    bad = next((name for name, mean in means.items() if not mean.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"The mean of {bad} is not finite")
    return means


def _mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    if not tensors[0].is_floating_point():
        return tensors[-1]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def _open(stack: ExitStack, files: dict[str, Path]) -> dict[str, safe_open]:
    """Opens the safetensors files of a model; returns the open file of each tensor."""
    model = {}
    for name, path in files.items():
        if name.endswith(".safetensors"):
            try:
                tensors = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise UserError(f"{str(path)!r} is not a safetensors file: {error}") from error
            model |= dict.fromkeys(tensors.keys(), tensors)
    return model


def _check_alike(folder: Path, files: dict[str, Path], first: Path, first_files: dict[str, Path]) -> None:
    configs = [read_json(found[CONFIG_NAME]) for found in (files, first_files)]
    for key in sorted((configs[0].keys() | configs[1].keys()) - {"transformers_version"}):
        value, expected = (config.get(key) for config in configs)
        if value != expected:
            raise UserError(f"{str(folder)!r} has {key} {value!r}, but {str(first)!r} has {expected!r}")
    tokenizers = [found.get("tokenizer.json") for found in (files, first_files)]
    if len({path and path.read_bytes() for path in tokenizers}) > 1:
        raise UserError(f"{str(folder)!r} has another tokenizer than {str(first)!r}")


def choose_checkpoints(
    run: str | Path, count: int, by: str, state: TrainerState | None = None, metric: str | None = None
) -> list[Path]:
    """The last or the best checkpoints of a run, in the order of their steps; fewer where there are fewer.

    A checkpoint that was written because of a signal only does not count, so that a run which was interrupted ends
    with the same average as one which was not.

    Args:
        run: its `output_dir`.
        count: how many.
        by: "last", or "best" by the metric by which the run chooses its best model.
        state: of the run, with the `metric` by which it chooses; those of its last checkpoint unless given.

    Raises:
        [`UserError`]: if the last checkpoint does not say the metric.
    """
    checkpoints = [path for path in list_checkpoints(run) if not is_out_of_turn(path)]
    if by == "last" or not checkpoints:
        return checkpoints[-count:]
    if state is None:
        state = TrainerState.load_from_json(str(checkpoints[-1] / TRAINER_STATE_NAME))
        metric = read_record(checkpoints[-1])["values"].get("metric_for_best_model")
    logs = {log["step"]: log for log in list_evaluations(state)}
    evaluated = [path for path in checkpoints if metric is not None and checkpoint_step(path) in logs]
    # The sort is stable: of equal ones the later is chosen.
    ranked = sorted(evaluated, key=lambda path: rank_scores(logs[checkpoint_step(path)], metric))
    return sorted(ranked[-count:], key=checkpoint_step)


def is_out_of_turn(checkpoint: Path) -> bool:
    """Whether a checkpoint was written because of a signal, at a step at which none was due."""
    control = read_state(checkpoint).get("stateful_callbacks", {}).get("TrainerControl", {})
    return not control.get("args", {}).get("should_save", True)


class MovingAverage(TrainerCallback):
    """After each step, average <- decay * average + (1 - decay) * weights; running statistics likewise.

    The average begins as the weights after the first step. Where the best model is loaded at the end of a training, the
    average becomes the one of its checkpoint.

    Args:
        model: without the wrappers of accelerate.
        decay: from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update_parameters(self.model)

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(state.best_model_checkpoint)

    @contextmanager
    def swapped_in(self):
        """Exchanges weights and average inside this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        average = self.average.module.state_dict()
        swapped = set()
        for name, value in self.model.state_dict().items():
            if value.data_ptr() not in swapped:  # tied weights have several names
                swapped.add(value.data_ptr())
                kept = value.clone()
                value.copy_(average[name])
                average[name].copy_(kept)

    def save(self, folder: str | Path) -> None:
        """Writes the average into a checkpoint."""
        save_model(self.average, str(Path(folder, MOVING_AVERAGE_NAME)))  # writes tied weights once

    def load(self, folder: str | Path) -> None:
        """Reads the average of a checkpoint."""
        load_model(self.average, Path(folder, MOVING_AVERAGE_NAME))
