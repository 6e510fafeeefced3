"""Every pair can be read back from the packed row, which holds each prefix once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pyterrier_llmrerank.engine.inputs import Ids
from pyterrier_llmrerank.engine.packing import PackedPairs

PREFIXES = [[], [1], [1, 2], [1, 2, 3], [4]]
PART = st.lists(st.integers(10, 99), max_size=9)
PAIRS = st.lists(
    st.builds(Ids, st.sampled_from(PREFIXES), PART, PART.map(lambda ids: [*ids, 5])), min_size=1, max_size=9
)


@given(PAIRS)
def test_pairs_are_read_back_unchanged(pairs: list[Ids]) -> None:
    rows = PackedPairs(pairs)
    assert len(rows) == len(pairs)
    assert rows.longest == max(pair.length for pair in pairs)
    for index, pair in enumerate(pairs):
        assert rows.ids[rows.places[index, : pair.length]].tolist() == pair.flat()
        assert rows.last[index] == rows.places[index, pair.length - 1]
    distinct = {tuple(pair.prefix) for pair in pairs}
    assert len(rows.ids) == sum(map(len, distinct)) + sum(len(pair.body) + len(pair.suffix) for pair in pairs)


@given(PAIRS, st.sampled_from(PREFIXES), st.sampled_from([1, 2, 4]))
def test_a_cached_prefix_follows_the_row(pairs: list[Ids], cached: list[int], ratio: int) -> None:
    pairs = [*pairs, Ids([6], [], [])]  # read at the end of its prefix
    rows = PackedPairs(pairs, cached_prefix=cached)
    in_places = np.concatenate([rows.ids, np.array(cached, dtype=int)])
    for index, pair in enumerate(pairs):
        assert in_places[rows.places[index, : pair.length]].tolist() == pair.flat()
        assert (rows.owner[index] < 0) == (pair.prefix == cached)
    distinct = {tuple(pair.prefix) for pair in pairs} - {tuple(cached)}
    assert len(rows.ids) == sum(map(len, distinct)) + sum(len(pair.body) + len(pair.suffix) for pair in pairs)
    assert rows.ids[rows.last_prefix].tolist() == pairs[-1].prefix
    assert PackedPairs(pairs, cached_prefix=[6]).owner[-1] == len(pairs) - 1
    pooled = rows.pooled(ratio)
    own = pooled.places[pooled.pair_of_token, pooled.positions]
    np.testing.assert_array_equal(own, np.arange(len(own)))


@given(PAIRS, st.none() | st.just(7))
def test_pair_and_position_of_each_token_lead_back_to_it(pairs: list[Ids], pad_id: int | None) -> None:
    rows = PackedPairs(pairs, pad_id)
    back = rows.places[rows.pair_of_token, rows.positions]
    np.testing.assert_array_equal(back, np.arange(len(rows.ids)))
    assert set(rows.pair_of_token[rows.positions < rows.prefix[rows.pair_of_token]]) <= set(rows.owner)


@given(PAIRS)
def test_pairs_are_padded_to_a_multiple_of_eight(pairs: list[Ids]) -> None:
    rows = PackedPairs(pairs, pad_id=7)
    for index, pair in enumerate(pairs):
        assert rows.lengths[index] % 8 == 0
        assert rows.lengths[index] - pair.length < 8
        assert rows.ids[rows.places[index, pair.length : rows.lengths[index]]].tolist() == [7] * rows.padding[index]
        assert rows.ids[rows.last[index]] == pair.flat()[-1]
    assert not rows.pooled(1).padding.any()


@given(PAIRS, st.sampled_from([2, 4, 8]))
def test_pooling_shortens_bodies_only(pairs: list[Ids], ratio: int) -> None:
    after = PackedPairs(pairs).pooled(ratio)
    assert after.body.tolist() == [-(-len(pair.body) // ratio) for pair in pairs]
    assert after.lengths.tolist() == [len(p.prefix) + -(-len(p.body) // ratio) + len(p.suffix) for p in pairs]
