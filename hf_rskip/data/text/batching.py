"""Batches of a token budget, bucketed by length."""

from collections.abc import Iterator, Sequence

import numpy as np
from transformers.trainer_pt_utils import BatchRebalanceSampler

from ...errors import UserError


class TokenBatchSampler(BatchRebalanceSampler):
    """Yields the batches, as lists of sentence indices, of one process.

    A batch holds so many sentences that its padded source, rows times the longest, has at most `max_tokens` cells, and
    its padded target likewise. Sentences are sorted by length, those of equal lengths in an order drawn anew for every
    epoch, cut into batches, and the batches are shuffled. The sequence of lengths, and so the number of batches, is the
    same in every epoch. Each epoch holds every sentence exactly once over all processes, and every process yields the
    same number of batches, similar in size at the same time.

    With `shares` a batch is planned for all processes and all accumulated batches of a step together, and shared out
    among them: `shares` batches of a process, one after the other, are its part of a step. Which sentences form which
    step then depends neither on `world_size` nor on `shares`.

    It is a `BatchRebalanceSampler` so that the Trainer neither batches it nor shares it out again.

    Args:
        source_lengths, target_lengths: tokens of every sentence.
        max_tokens: budget of a batch, in padded tokens a side; of a whole step with `shares`.
        seed: of the shuffling, together with the epoch.
        rank, world_size: this process, and how many there are.
        shares: number of batches in which a process takes its part of a step, or `None` for independent batches.
        pad_to_multiple_of: to which lengths the batches will be padded.

    Raises:
        [`UserError`]: if a sentence is longer than the budget, or if there are fewer sentences than processes, or
            fewer in a step than there are shares of it.
    """

    def __init__(
        self,
        source_lengths: Sequence[int],
        target_lengths: Sequence[int],
        max_tokens: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shares: int | None = None,
        pad_to_multiple_of: int = 1,
    ):
        self.source_lengths = np.asarray(source_lengths)
        self.target_lengths = np.asarray(target_lengths)
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self.shares, self.multiple = shares, pad_to_multiple_of
        self.lengths = self._padded(np.maximum(self.source_lengths, self.target_lengths))
        if len(self.lengths) < world_size:
            raise UserError(f"{len(self.lengths)} sentences are too few for {world_size} processes")
        if self.lengths.max() > max_tokens:
            raise UserError(
                f"The longest sentence has {self.lengths.max()} tokens, more than the batch budget of {max_tokens}"
            )
        lengths = self.lengths[self._sorted_indices(np.random.default_rng(0))]
        self.bounds = self._cut(lengths, max_tokens)
        if shares is not None:
            self.bounds = self._share_out(self._even_out_the_end(self.bounds, lengths, max_tokens))

    def _padded(self, lengths):
        return -(-lengths // self.multiple) * self.multiple

    def _sorted_indices(self, rng: np.random.Generator) -> np.ndarray:
        """Sorts the sentences by target length, ties by source length, ties of both at random."""
        # Source lengths rise and fall in turn, so that neighbours are alike where the target length changes too.
        source = np.where(self.target_lengths % 2, self.source_lengths, -self.source_lengths)
        return np.lexsort((rng.random(len(self.lengths)), source, self.target_lengths))

    def _cut(self, lengths: np.ndarray, max_tokens: int) -> list[tuple[int, int]]:
        """Bounds `(start, end)` of the batches in the sorted order; without `shares` a multiple of `world_size`."""
        bounds, start, longest = [], 0, 0
        for index, length in enumerate(lengths.tolist()):
            longest = max(longest, length)
            if longest * (index + 1 - start) > max_tokens:
                bounds.append((start, index))
                start, longest = index, length
        bounds.append((start, len(lengths)))
        while self.shares is None and len(bounds) % self.world_size:
            widest = max(range(len(bounds)), key=lambda i: bounds[i][1] - bounds[i][0])
            start, end = bounds[widest]
            bounds[widest : widest + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]
        return bounds

    def _even_out_the_end(self, bounds, lengths: np.ndarray, max_tokens: int) -> list[tuple[int, int]]:
        """Moves sentences from the last batch but one to the last, a remainder, up to equal sizes and the budget."""
        if len(bounds) > 1:
            (first, middle), (_, end) = bounds[-2:]
            rows = min((end - first) // 2, max_tokens // lengths[first:].max())
            middle = min(middle, end - int(rows))
            bounds[-2:] = [(first, middle), (middle, end)]
        return bounds

    def _share_out(self, steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Bounds of the batches of all processes, in the order of the steps; those of a step differ by one sentence."""
        parts = self.shares * self.world_size
        fewest = min(end - start for start, end in steps)
        if fewest < parts:
            raise UserError(
                f"A step of this batch budget has as few as {fewest} sentences, too few to be shared among "
                f"{self.world_size} processes that accumulate {self.shares} batches each"
            )
        return [
            (start + part * (end - start) // parts, start + (part + 1) * (end - start) // parts)
            for start, end in steps
            for part in range(parts)
        ]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.bounds) // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = self._sorted_indices(rng)
        # Neighbours in the sorted order are similar in size: the processes take one each of a group.
        shares = self.shares or 1
        for step in rng.permutation(len(self) // shares):
            for share in range(shares):
                start, end = self.bounds[(step * shares + share) * self.world_size + self.rank]
                yield order[start:end].tolist()

    def padding_fraction(self) -> float:
        """Returns the share of padding in all cells, source and target, of an epoch."""
        order = self._sorted_indices(np.random.default_rng(0))
        cells = tokens = 0
        for start, end in self.bounds:
            for lengths in (self.source_lengths[order[start:end]], self.target_lengths[order[start:end]]):
                cells += len(lengths) * self._padded(lengths.max())
                tokens += lengths.sum()
        return 1 - tokens / cells
