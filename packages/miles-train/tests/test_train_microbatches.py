"""Micro-batches hold every token once, within the budget, and point back at the right columns."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import miles_train.conformance as conformance
from miles_train.microbatches import cut, cut_packed

settings.register_profile("train", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("train")


def batch_of(seed, num_samples):
    return conformance.Subject(lambda: None, None, 50).batch(seed, num_samples)


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 60), st.booleans())
def test_every_token_is_there_once(seed, num_samples, max_tokens, all_tokens):
    batch = batch_of(seed, num_samples)
    micros = list(cut(batch, max_tokens, all_tokens=all_tokens))
    columns = np.concatenate([micro.columns for micro in micros])
    np.testing.assert_array_equal(np.sort(columns), np.arange(len(batch.tokens)))
    selected = np.sort(np.concatenate([micro.columns[micro.selected] for micro in micros]))
    not_first = np.ones(len(batch.tokens), bool)
    not_first[batch.offsets[:-1]] = False
    np.testing.assert_array_equal(selected, np.flatnonzero(not_first if all_tokens else batch.loss_mask))
    for micro in micros:
        assert micro.tokens.size <= max_tokens or len(micro.samples) == 1
        assert micro.tokens.shape == (len(micro.samples), micro.lengths.max())
        # The token after the predicting position is the target, and the sample's own.
        np.testing.assert_array_equal(micro.tokens[micro.rows, micro.positions + 1], micro.targets)
        np.testing.assert_array_equal(batch.tokens[micro.columns[micro.selected]], micro.targets)
        for row, sample in enumerate(micro.samples):
            tokens = batch.tokens[batch.offsets[sample] : batch.offsets[sample + 1]]
            np.testing.assert_array_equal(micro.tokens[row, : len(tokens)], tokens)
            assert (micro.tokens[row, len(tokens) :] == 0).all()


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 60), st.booleans())
def test_whole_groups_stay_together_and_no_token_is_lost(seed, num_samples, max_tokens, packed):
    batch = batch_of(seed, num_samples)
    batch = dataclasses.replace(batch, group_index=np.random.default_rng(seed).integers(0, 5, num_samples))
    micros = list((cut_packed if packed else cut)(batch, max_tokens, whole_groups=True))
    columns = np.concatenate([micro.columns for micro in micros])
    np.testing.assert_array_equal(np.sort(columns), np.arange(len(batch.tokens)))
    groups = [set(batch.group_index[micro.samples].tolist()) for micro in micros]
    assert sum(map(len, groups)) == len(set.union(*groups))
    for micro, inside in zip(micros, groups, strict=True):
        assert micro.tokens.size <= max_tokens or len(inside) == 1


def test_the_example_of_the_docstring_holds():
    batch = batch_of(0, 2)
    micro = next(cut(batch.take([int(batch.lengths.argmax()), int(batch.lengths.argmin())]), 100))
    assert list(micro.lengths) == sorted(micro.lengths)


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 60), st.booleans(), st.sampled_from([1, 8]))
def test_packed_rows_hold_every_token_once(seed, num_samples, max_tokens, all_tokens, multiple):
    batch = batch_of(seed, num_samples)
    micros = list(cut_packed(batch, max_tokens, all_tokens=all_tokens, multiple=multiple))
    columns = np.concatenate([micro.columns for micro in micros])
    np.testing.assert_array_equal(np.sort(columns), np.arange(len(batch.tokens)))
    for micro in micros:
        assert len(micro.columns) <= max_tokens or len(micro.samples) == 1
        assert micro.tokens.shape == (1, -(-len(micro.columns) // multiple) * multiple)
        np.testing.assert_array_equal(micro.tokens[0, : len(micro.columns)], batch.tokens[micro.columns])
        np.testing.assert_array_equal(micro.ends[: len(micro.samples)], np.cumsum(micro.lengths))
        assert micro.ends[-1] == micro.tokens.size
        # What is predicted, and from where, is the same as in padded rows.
        np.testing.assert_array_equal(micro.tokens[micro.rows, micro.positions + 1], micro.targets)
        np.testing.assert_array_equal(batch.tokens[micro.columns[micro.selected]], micro.targets)
        starts = np.append(0, micro.ends)[: len(micro.samples)]
        assert not set(micro.positions + 1) & set(starts)  # no sample is predicted from its neighbour
        if all_tokens:
            assert len(micro.selected) == len(micro.columns) - len(micro.samples)


def test_packed_rows_are_filled_evenly():
    batch = batch_of(3, 200)
    loads = [len(micro.columns) for micro in cut_packed(batch, 300)]
    assert len(loads) == -(-len(batch.tokens) // 300)
    assert max(loads) - min(loads) <= batch.lengths.max()
