"""Datasets of images in classes from the Hub or local folders, in one shape and checked before training."""

from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from transformers.utils import logging

from ...errors import UserError
from ..loading import load_named_dataset, select_split
from .arguments import ImageDataArguments

logger = logging.get_logger(__name__)

_HOLD_OUT_SEED = 0


class ImageDatasets(NamedTuple):
    """The splits of a dataset of images."""

    splits: dict[str, Dataset | IterableDataset]
    """With the columns `image` (a dictionary with `bytes` or `path`), `label` (the index of a class) and `row` (the
    number of the image in its split, from 0)."""
    class_names: list[str]


def load_image_dataset(
    args: ImageDataArguments,
    splits: tuple[str, ...] = ("train", "validation", "test"),
    class_names: list[str] | None = None,
) -> ImageDatasets:
    """Loads the images that `args` names.

    Args:
        splits: the splits that are needed, out of "train", "validation" (without an error if there is none) and "test".
        class_names: of a trained model, in its order; by default those of the split "train", which is needed then.

    Raises:
        UserError: if something is missing, empty or not a class; the message names the dataset, split and row.
    """
    args.check_splits(splits)
    corpus = load_named_dataset(args.dataset_name, args.dataset_config_name, args.streaming)
    needed = [split for split in splits if getattr(args, f"{split}_split") is not None]
    found = {split: _name_columns(select_split(corpus, args, split), args, split) for split in needed}
    if class_names is None:
        class_names = _class_names(found["train"], args)
    loaded = {}
    for split, dataset in found.items():
        limit, where = args.sample_limit(split), args.describe_split(split)
        if isinstance(dataset, IterableDataset):
            if limit is not None:
                logger.warning(f"{where} is streamed: its first {limit:,} images, of whatever classes.")
                dataset = dataset.take(limit)
            loaded[split] = _stream_labels(dataset, class_names, args, split)
        else:
            rows = _choose_rows(dataset, limit, where)
            loaded[split] = _with_labels(dataset.select(rows), rows, class_names, args, split)
    if "train" in loaded and "validation" in splits and args.validation_size is not None:
        loaded["train"], loaded["validation"] = _hold_out(loaded["train"], class_names, args)
        if args.max_eval_samples is not None:
            rows = _choose_rows(loaded["validation"], args.max_eval_samples, args.describe_split("validation"))
            loaded["validation"] = loaded["validation"].select(rows)
    if "train" in loaded and not args.streaming and len(set(loaded["train"]["label"])) < 2:
        raise UserError(f"{args.describe_split('train')} has one class only: there is nothing to tell apart.")
    return ImageDatasets(loaded, class_names)


def name_row(args: ImageDataArguments, split: str, row: int) -> str:
    """Names a row at the beginning of a message."""
    return f"{args.describe_split(split)} row {row} (counted from 0)"


def _name_columns(dataset: Dataset | IterableDataset, args: ImageDataArguments, split: str):
    """Selects the columns of images and labels, and calls them `image` and `label`."""
    features, where = dataset.features, args.describe_split(split)
    if features is None:
        raise UserError(
            f"{where} is a stream that does not tell its columns before it is read: set streaming to false."
        )
    if args.label_column is None and list(features) == ["image"]:  # as `datasets` loads pictures in one folder
        raise UserError(
            f"{where} has pictures without labels: give each class a folder of its own, and at least two of them."
        )
    image = _find_column("image", Image, (), features, args.image_column, where)
    label = _find_column("label", ClassLabel, ("label", "labels"), features, args.label_column, where)
    if image == label:
        raise UserError(f"image_column and label_column are both {image!r}.")
    if not isinstance(features[image], Image):
        raise UserError(f"{where} has a column {image!r} that does not hold images: set image_column.")
    kind = getattr(features[label], "dtype", "nested")
    if kind not in ("string", "large_string") and not kind.startswith(("int", "uint")):
        raise UserError(f"{where} has labels of type {kind}, no names or whole numbers: set label_column.")
    # Before all other steps: each later step of a stream would decode the images.
    dataset = dataset.cast_column(image, Image(decode=False)).select_columns([image, label])
    return dataset.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def _find_column(
    what: str, kind: type, usual_names: tuple[str, ...], features: Features, given: str | None, where: str
) -> str:
    """Returns the column that is `given`, or the only one of the feature type `kind` or with a usual name."""
    if given is not None:
        if given not in features:
            raise UserError(f"{where} has no column {given!r}, only {', '.join(features)}: set {what}_column.")
        return given
    candidates = [name for name, feature in features.items() if isinstance(feature, kind)]
    candidates = candidates or [name for name in usual_names if name in features]
    if len(candidates) != 1:
        found = f"{len(candidates) or 'no'} columns of {what}s ({', '.join(features)})"
        raise UserError(f"{where} has {found}: set {what}_column to one of these.")
    return candidates[0]


def _class_names(dataset: Dataset | IterableDataset, args: ImageDataArguments) -> list[str]:
    feature, where = dataset.features["label"], args.describe_split("train")
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if args.streaming:
        raise UserError(f"{where} has labels without names, which cannot be found out by streaming it.")
    labels = set(dataset.unique("label")) - {None}
    if "string" in feature.dtype:
        return sorted(labels)
    largest = max(labels, default=-1)
    if largest >= len(dataset):
        raise UserError(
            f"{where} has the label {largest} in only {len(dataset):,} images: its labels are not classes counted from "
            "0, so set label_column."
        )
    return [str(label) for label in range(largest + 1)]


def _choose_rows(dataset: Dataset, limit: int | None, where: str) -> np.ndarray:
    """Chooses the first `limit` rows, or as many at even distances if those lack classes (a folder sorted by class)."""
    if limit is None or limit >= len(dataset):
        return np.arange(len(dataset))
    labels = dataset["label"][:]
    if set(labels[:limit]) >= set(labels) - {None, -1}:
        return np.arange(limit)
    logger.warning(f"{where} lacks classes among its first {limit:,} images: {limit:,} at even distances are used.")
    return np.arange(limit) * len(dataset) // limit


class _LabelIndex:
    """The index of the class of a row's label; workers that are not forked get it pickled."""

    def __init__(self, feature, class_names: list[str], args: ImageDataArguments, split: str):
        # A split may name the same classes in another order than the model or the training split, or name others.
        self.index = {name: number for number, name in enumerate(class_names)}
        self.feature, self.args, self.split = feature, args, split

    def __call__(self, label, row: int) -> int:
        if label is None or label == -1:
            raise UserError(f"{name_row(self.args, self.split, row)} has no label.")
        name = label
        if isinstance(self.feature, ClassLabel):
            name = self.feature.names[label] if 0 <= label < len(self.feature.names) else label
        if str(name) not in self.index:
            some = ", ".join([*self.index][:5]) + (", ..." if len(self.index) > 5 else "")
            raise UserError(
                f"{name_row(self.args, self.split, row)} has the label {name!r}, which is not one of {some}."
            )
        return self.index[str(name)]

    def number(self, example: dict, row: int) -> dict[str, int]:
        return {"label": self(example["label"], row), "row": row}


def _stream_labels(
    dataset: IterableDataset, class_names: list[str], args: ImageDataArguments, split: str
) -> IterableDataset:
    """Maps labels to indices of `class_names`, with a check of each when it is read, and numbers the rows."""
    return dataset.map(
        _LabelIndex(dataset.features["label"], class_names, args, split).number,
        with_indices=True,
        features=Features({"image": Image(decode=False), "label": Value("int64"), "row": Value("int64")}),
    )


def _with_labels(
    dataset: Dataset, rows: np.ndarray, class_names: list[str], args: ImageDataArguments, split: str
) -> Dataset:
    """Maps labels to indices of `class_names`, with a check of all, and adds the numbers of the rows."""
    if len(dataset) == 0:
        raise UserError(f"{args.describe_split(split)} has no images.")
    to_index = _LabelIndex(dataset.features["label"], class_names, args, split)
    labels = np.array([to_index(*pair) for pair in zip(dataset["label"][:], rows.tolist(), strict=True)], np.int64)
    return dataset.remove_columns("label").add_column("label", labels).add_column("row", rows)


def _hold_out(dataset: Dataset, class_names: list[str], args: ImageDataArguments) -> tuple[Dataset, Dataset]:
    """Splits off `validation_size` images, of each class in proportion to its number."""
    labels = np.asarray(dataset["label"][:])
    present, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if counts.min() == 1:
        label, row = present[counts.argmin()], first[counts.argmin()]
        raise UserError(
            f"{name_row(args, 'train', row)} is the only image of class {class_names[label]!r}, of which none could be "
            "held out: remove it, or set validation_split in place of validation_size."
        )
    if not len(present) <= args.validation_size <= len(dataset) - len(present):
        raise UserError(
            f"validation_size must leave an image of each of the {len(present)} classes on either side: from "
            f"{len(present)} to {len(dataset) - len(present)}, not {args.validation_size}."
        )
    dataset = dataset.cast_column("label", ClassLabel(names=class_names))
    parts = dataset.train_test_split(args.validation_size, stratify_by_column="label", seed=_HOLD_OUT_SEED)
    return parts["train"], parts["test"]
