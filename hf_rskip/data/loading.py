"""Loads datasets by name, with errors of one sentence."""

from pathlib import Path

from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError

from ..errors import UserError
from .arguments import DatasetArguments
from .names import check_name


def load_named_dataset(
    name: str, config_name: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Loads all splits of a Hub id or local folder; raises a [`UserError`] if there is none, or it cannot be read."""
    check_name(name, "dataset")
    try:
        return load_dataset(name, config_name, streaming=streaming)
    # An unknown id or offline Hub, an unknown configuration or empty split, a loading script, an unreadable file.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        reason = str(cause).strip().split("\n")[0].rstrip(".!")
        if isinstance(error, OSError) and not Path(name).exists():
            reason += ", and there is no such folder; a private one needs `hf auth login`"
        raise UserError(f"Dataset {name!r} cannot be loaded: {reason}.") from error


def select_split(corpus: DatasetDict | IterableDatasetDict, args: DatasetArguments, split: str):
    """Returns the split that `args` names; raises a [`UserError`], which says what to set, if there is none."""
    name = getattr(args, f"{split}_split")
    if name in corpus:
        return corpus[name]
    problem = f"Dataset {args.dataset_name!r} has no split {name!r}, only"
    if len(corpus) == 1:
        raise UserError(
            f"{problem} {next(iter(corpus))!r}: split it first, with `train_test_split` of `datasets`, say."
        )
    instead = ", or set validation_size" if split == "validation" else ""
    raise UserError(f"{problem} {', '.join(corpus)}: set {args.split_key.format(split)} to one of these{instead}.")
