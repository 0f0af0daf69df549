"""Columns as arrays and rows by mask, at the speed of Arrow.

A formatted column, `Dataset.select` and `Dataset.filter` make a Python object of every row, and rows that are selected
by index are then looked up one by one.
"""

from functools import partial

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
    return (
        dataset.with_format("arrow")
        .map(
            partial(_filter_table, kept=kept),
            batched=True,
            batch_size=10_000,
            with_indices=True,
            num_proc=num_proc,
            features=dataset.features,
            desc="Dropping",
        )
        .with_format(None)
    )


def _filter_table(table: pa.Table, indices: list[int], kept: np.ndarray) -> pa.Table:
    return table.filter(pa.array(kept[indices]))
