"""Batches of a token budget: what every epoch, process and resumed run is owed."""

from itertools import islice

import numpy as np
import pytest

from hf_rskip.data.text.batching import TokenBatchSampler


def draw_lengths(count, seed=0):
    """Lengths like those of Multi30k in subwords: about 14 tokens, both sides correlated, a long tail."""
    rng = np.random.default_rng(seed)
    source = np.exp(rng.normal(2.6, 0.35, count)).round() + 1
    target = (source * np.exp(rng.normal(0, 0.2, count))).round() + 1
    return source.clip(2, 64).astype(int), target.clip(2, 64).astype(int)


SOURCE, TARGET = draw_lengths(1013)
BUDGET = 400


def samplers(world_size, seed=0, lengths=(SOURCE, TARGET), budget=BUDGET):
    return [TokenBatchSampler(*lengths, budget, seed, rank, world_size) for rank in range(world_size)]


def epoch_batches(world_size, epoch, **kwargs):
    ranks = samplers(world_size, **kwargs)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in ranks]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch(world_size, epoch):
    ranks = epoch_batches(world_size, epoch)
    lengths = {len(batches) for batches in ranks}
    assert lengths == {len(sampler) for sampler in samplers(world_size)}, "all ranks, and every epoch, alike"
    batches = sum(ranks, [])
    assert sorted(sum(batches, [])) == list(range(len(SOURCE))), "every sentence once"
    for batch in batches:
        assert batch and all(isinstance(index, int) for index in batch)
        assert len(batch) * SOURCE[batch].max() <= BUDGET
        assert len(batch) * TARGET[batch].max() <= BUDGET


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_order_depends_on_seed_and_epoch_alone(world_size):
    first = epoch_batches(world_size, 1)
    assert first == epoch_batches(world_size, 1)
    assert first != epoch_batches(world_size, 2)
    assert first != epoch_batches(world_size, 1, seed=1)


def test_batches_are_drawn_anew_and_not_only_shuffled():
    first, second = ({frozenset(batch) for batch in epoch_batches(1, epoch)[0]} for epoch in (0, 1))
    assert len(first & second) < len(first) / 2


def test_shapes_of_an_epoch_do_not_change():
    def shapes(epoch):
        return sorted((len(batch), SOURCE[batch].max(), TARGET[batch].max()) for batch in epoch_batches(1, epoch)[0])

    assert shapes(0) == shapes(1)


def test_a_sampler_can_be_read_twice_and_from_the_middle():
    (sampler,) = samplers(1)
    sampler.set_epoch(3)
    everything = list(sampler)
    assert list(islice(sampler, 5, None)) == everything[5:]
    assert list(sampler) == everything


def test_processes_get_batches_of_similar_size_at_the_same_time():
    lengths = draw_lengths(10_000)
    sizes = np.array(
        [
            [max(len(batch) * side[batch].max() for side in lengths) for batch in batches]
            for batches in epoch_batches(3, 0, lengths=lengths, budget=1024)
        ]
    )
    assert np.mean(sizes.mean(0) / sizes.max(0)) > 0.95, "the share of the time that no process waits"


@pytest.mark.parametrize("world_size", [1, 2])
def test_padding_is_rare(world_size):
    lengths = draw_lengths(29_000)
    (sampler, *_) = samplers(world_size, lengths=lengths, budget=4096)
    assert sampler.padding_fraction() < 0.06
    batches = sum(epoch_batches(world_size, 0, lengths=lengths, budget=4096), [])
    cells = sum(len(batch) * side[batch].max() for batch in batches for side in lengths)
    assert sampler.padding_fraction() == pytest.approx(1 - sum(side.sum() for side in lengths) / cells)


@pytest.mark.parametrize(
    "lengths",
    [([5], [5]), ([5] * 8, [5] * 8), ([1] * 7, [3] * 7), ([9, 1], [1, 9]), (np.array([4, 4]), np.array([2, 10]))],
    ids=["one", "equal", "odd", "crossed", "arrays"],
)
def test_small_corpora(lengths):
    for world_size in range(1, len(lengths[0]) + 1):
        ranks = epoch_batches(world_size, 0, lengths=lengths, budget=10)
        assert len({len(batches) for batches in ranks}) == 1
        batches = sum(ranks, [])
        assert all(batches)
        assert sorted(sum(batches, [])) == list(range(len(lengths[0])))


def test_a_sentence_may_fill_the_budget_but_not_exceed_it():
    assert epoch_batches(1, 0, lengths=([3, 10], [3, 3]), budget=10)[0]
    with pytest.raises(ValueError, match="longest sentence has 11 tokens, more than the batch budget of 10"):
        TokenBatchSampler([3, 3], [3, 11], 10)


def test_fewer_sentences_than_processes():
    with pytest.raises(ValueError, match="2 sentences are too few for 3 processes"):
        TokenBatchSampler([3, 3], [3, 3], 10, rank=0, world_size=3)


def global_steps(world_size, shares, epoch=0, budget=1024, count=3000, **kwargs):
    """The steps of an epoch, each a list of the batches of all processes."""
    lengths, ranks = draw_lengths(count), []
    for rank in range(world_size):
        sampler = TokenBatchSampler(*lengths, budget, seed=0, rank=rank, world_size=world_size, shares=shares, **kwargs)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        ranks.append([batches[start : start + shares] for start in range(0, len(batches), shares)])
    return [sum(step, []) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize(("world_size", "shares"), [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (3, 1)])
def test_a_step_of_a_global_budget_is_the_same_on_any_number_of_processes(world_size, shares):
    alone, together = (global_steps(*plan, epoch=1) for plan in [(1, 1), (world_size, shares)])
    assert [sorted(sum(step, [])) for step in together] == [sorted(sum(step, [])) for step in alone]
    assert sorted(sum(sum(together, []), [])) == list(range(3000))
    source, target = draw_lengths(3000)
    longest = max(source.max(), target.max())
    for step in together:
        sizes = [len(batch) for batch in step]
        assert len(step) == world_size * shares and max(sizes) - min(sizes) <= 1
        for side in (source, target):
            assert len(sum(step, [])) * side[sum(step, [])].max() <= 1024
            share = 1024 / (world_size * shares)
            assert all(len(batch) * side[batch].max() <= share + longest for batch in step), "a sentence more at most"


def test_a_step_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="as few as 2 sentences, .* 3 processes that accumulate 1 batches"):
        TokenBatchSampler([3] * 8, [5] * 8, 10, world_size=3, shares=1)


def test_padding_to_multiples_makes_few_shapes_within_the_budget():
    source, target = draw_lengths(20_000)

    def shapes(multiple):
        sampler = TokenBatchSampler(source, target, 4096, pad_to_multiple_of=multiple)
        padded = [
            (len(batch), *(-(-int(side[batch].max()) // multiple) * multiple for side in (source, target)))
            for batch in sampler
        ]
        assert all(rows * max(lengths) <= 4096 for rows, *lengths in padded)
        cells = sum(rows * sum(lengths) for rows, *lengths in padded)
        assert sampler.padding_fraction() == pytest.approx(1 - (source.sum() + target.sum()) / cells)
        return {lengths for _, *lengths in map(tuple, padded) for lengths in [tuple(lengths)]}

    assert len(shapes(16)) < len(shapes(1)) / 5
