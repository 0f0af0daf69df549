"""Batches of a token budget, bucketed by length."""

from collections.abc import Iterator, Sequence

import numpy as np
from transformers.trainer_pt_utils import BatchRebalanceSampler

from ..errors import UserError


class TokenBatchSampler(BatchRebalanceSampler):
    """Yields the batches, as lists of sentence indices, of one process.

    A batch holds so many sentences that its padded source, rows times the longest, has at most `max_tokens` cells, and
    its padded target likewise. Sentences are sorted by length, those of equal lengths in an order drawn anew for every
    epoch, cut into batches, and the batches are shuffled. The sequence of lengths, and so the number of batches, is the
    same in every epoch. Each epoch holds every sentence exactly once over all processes, and every process yields the
    same number of batches, similar in size at the same time.

    The base class is how the Trainer of Transformers recognises a sampler of whole batches that knows its process; of
    its algorithm nothing is used.

    Args:
        source_lengths, target_lengths: tokens of every sentence.
        max_tokens: budget of a batch, in padded tokens a side.
        seed: of the shuffling, together with the epoch.
        rank, world_size: this process, and how many there are.

    Raises:
        [`UserError`]: if a sentence is longer than the budget, or if there are fewer sentences than processes.
    """

    def __init__(
        self,
        source_lengths: Sequence[int],
        target_lengths: Sequence[int],
        max_tokens: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.source_lengths = np.asarray(source_lengths)
        self.target_lengths = np.asarray(target_lengths)
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self.lengths = np.maximum(self.source_lengths, self.target_lengths)
        if len(self.lengths) < world_size:
            raise UserError(f"{len(self.lengths)} sentences are too few for {world_size} processes")
        if self.lengths.max() > max_tokens:
            raise UserError(
                f"The longest sentence has {self.lengths.max()} tokens, more than the batch budget of {max_tokens}"
            )
        self.bounds = self._cut(self.lengths[self._sorted_indices(np.random.default_rng(0))], max_tokens)

    def _sorted_indices(self, rng: np.random.Generator) -> np.ndarray:
        """All sentences by target length, ties by source length, ties of both at random."""
        # Source lengths rise and fall in turn, so that neighbours are alike where the target length changes too.
        source = np.where(self.target_lengths % 2, self.source_lengths, -self.source_lengths)
        return np.lexsort((rng.random(len(self.lengths)), source, self.target_lengths))

    def _cut(self, lengths: np.ndarray, max_tokens: int) -> list[tuple[int, int]]:
        """Bounds `(start, end)` of the batches in the sorted order, their number a multiple of `world_size`."""
        bounds, start, longest = [], 0, 0
        for index, length in enumerate(lengths.tolist()):
            longest = max(longest, length)
            if longest * (index + 1 - start) > max_tokens:
                bounds.append((start, index))
                start, longest = index, length
        bounds.append((start, len(lengths)))
        while len(bounds) % self.world_size:
            widest = max(range(len(bounds)), key=lambda i: bounds[i][1] - bounds[i][0])
            start, end = bounds[widest]
            bounds[widest : widest + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]
        return bounds

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.bounds) // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = self._sorted_indices(rng)
        # Neighbours in the sorted order are similar in size: the processes take one each of a group.
        for group in rng.permutation(len(self)):
            start, end = self.bounds[group * self.world_size + self.rank]
            yield order[start:end].tolist()

    def padding_fraction(self) -> float:
        """The share of padding in all cells, source and target, of an epoch."""
        order = self._sorted_indices(np.random.default_rng(0))
        cells = tokens = 0
        for start, end in self.bounds:
            for lengths in (self.source_lengths[order[start:end]], self.target_lengths[order[start:end]]):
                cells += len(lengths) * lengths.max()
                tokens += lengths.sum()
        return 1 - tokens / cells
