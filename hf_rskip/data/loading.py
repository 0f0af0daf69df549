"""Loads a dataset that a user names; what goes wrong is said in one sentence."""

from pathlib import Path

from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError

from ..errors import UserError
from .names import check_name


def load_named_dataset(
    name: str, config_name: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """All splits of a Hub id or local folder.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
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


def select_split(corpus: DatasetDict | IterableDatasetDict, name: str, dataset_name: str, field: str):
    """The split called `name`.

    Raises:
        UserError: if there is none; the message says to set `field`.
    """
    if name not in corpus and len(corpus) == 1:
        raise UserError(
            f"Dataset {dataset_name!r} has no split {name!r}, only {next(iter(corpus))!r}: split it first, with "
            "`train_test_split` of `datasets`, say."
        )
    if name not in corpus:
        raise UserError(
            f"Dataset {dataset_name!r} has no split {name!r}, only {', '.join(corpus)}: set {field} to one of these."
        )
    return corpus[name]
