"""Columns as arrays and rows by mask, at the speed of Arrow.

A formatted column, `Dataset.select` and `Dataset.filter` make a Python object of every row, and rows that are selected
by index are then looked up one by one.
"""

import numpy as np
import pyarrow as pa
from datasets import Dataset


def read_column(dataset: Dataset, name: str) -> np.ndarray:
    """Reads a column of numbers as an array, `(rows,)`."""
    tables = dataset.select_columns(name).with_format("arrow").iter(100_000)
    return np.concatenate([table[name].to_numpy() for table in tables])


def keep_rows(dataset: Dataset, kept: np.ndarray, num_proc: int | None = None) -> Dataset:
    """Copies the rows where `kept`, `(rows,)` of booleans, is true; cached like the result of `map`."""
    if kept.all():
        return dataset
    filtered = dataset.with_format("arrow").map(
        lambda table, indices: table.filter(pa.array(kept[indices])),
        batched=True,
        batch_size=10_000,
        with_indices=True,
        num_proc=num_proc,
        features=dataset.features,
        desc="Dropping",
    )
    return filtered.with_format(None)
