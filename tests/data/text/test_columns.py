"""Columns as arrays and rows by mask: the same values as the slow ways, from any kind of dataset."""

import numpy as np
import pytest
from datasets import Dataset

from hf_rskip.data.text.columns import keep_rows, read_column


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    columns = {"length": list(range(25_000)), "ids": [[number, 7] for number in range(25_000)]}
    folder = tmp_path_factory.mktemp("columns")
    Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    return Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder))


def test_a_column(dataset):
    column = read_column(dataset, "length")
    assert isinstance(column, np.ndarray) and column.dtype == np.int64
    assert column.tolist() == dataset["length"][:]
    chosen = dataset.select([5, 3, 24_999])
    assert read_column(chosen, "length").tolist() == [5, 3, 24_999]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_are_kept_in_order_and_cached(dataset, num_proc):
    kept = np.random.default_rng(0).random(len(dataset)) < 0.7
    kept[10_000:20_000] = False  # a whole batch without a row
    result = keep_rows(dataset, kept, num_proc)
    assert result.features == dataset.features and result.format["type"] is None
    assert result["length"][:] == np.flatnonzero(kept).tolist()
    assert result[0] == {"length": int(kept.argmax()), "ids": [int(kept.argmax()), 7]}
    assert result.cache_files and result.cache_files == keep_rows(dataset, kept.copy(), num_proc).cache_files
    assert keep_rows(dataset, ~kept, num_proc)["length"][:] == np.flatnonzero(~kept).tolist()
    assert keep_rows(dataset, np.ones(len(dataset), bool), num_proc) is dataset
