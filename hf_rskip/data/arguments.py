"""The keys of a dataset that all tasks share."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from transformers.hf_argparser import HfArg
from transformers.utils import logging

from ..errors import UserError
from ..ranges import check_ranges

logger = logging.get_logger(__name__)

_SAMPLE_LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


@dataclass
class DatasetArguments:
    """A dataset and its splits, which are "train", "validation" and "test" here, whatever the dataset calls them."""

    dataset_name: str | None = HfArg(default=None, help="Hub id or local folder of a dataset.")
    dataset_config_name: str | None = HfArg(
        default=None, help="Configuration of the dataset, such as `de-en` for `wmt/wmt14`."
    )
    train_split: str = HfArg(default="train", help="Name the dataset gives its training split.")
    validation_split: str | None = HfArg(default=None, help="Name of its validation split, if any.")
    validation_size: int | None = HfArg(
        default=None, help="Hold out so many training examples, drawn at random, for validation."
    )
    test_split: str = HfArg(default="test", help="Name of its test split.")
    max_train_samples: int | None = HfArg(
        default=None, help="Use only the first so many examples of the training split."
    )
    max_eval_samples: int | None = HfArg(default=None, help="Use only so many examples of the validation split.")
    max_predict_samples: int | None = HfArg(default=None, help="Use only so many examples of the test split.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Number of processes that prepare the dataset.")
    split_key = "{}_split"
    """Name of the key of a split in messages; not a field. Commands, which have one split only, say `--split`."""

    def __post_init__(self):
        check_ranges(self)
        for name in ("validation_split", "validation_files"):
            if self.validation_size is not None and getattr(self, name, None) is not None:
                raise UserError(f"validation_size and {name} are both set: give one or the other.")

    def check_splits(self, splits: Sequence[str]) -> None:
        """Raises a [`UserError`] if another of `splits` is the training split; warns if validation and test are one."""
        for one, other in combinations(splits, 2):
            for kind in ("split", "files"):
                value, rival = (getattr(self, f"{split}_{kind}", None) for split in (one, other))
                if value is not None and _resolve(value) == _resolve(rival):
                    problem = f"{one}_{kind} and {other}_{kind} are both {value!r}"
                    if one == "train":
                        raise UserError(f"{problem}: what was trained on cannot tell how good a model is.")
                    logger.warning_once(
                        f"{problem}: a checkpoint that is chosen by validation scores is tuned on the test."
                    )

    def sample_limit(self, split: str) -> int | None:
        """Returns the largest number of examples of a split; `None` for all."""
        return getattr(self, _SAMPLE_LIMITS[split])

    def describe_split(self, split: str) -> str:
        """Names a split at the beginning of a message."""
        held_out = split == "validation" and self.validation_split is None
        name = self.train_split if held_out else getattr(self, f"{split}_split")
        return f"Dataset {self.dataset_name!r}, split {name!r},"


def _resolve(value: list[str] | str | None) -> list[str] | str | None:
    """The real paths of files; the name of a split as it is."""
    return list(map(os.path.realpath, value)) if isinstance(value, list) else value
