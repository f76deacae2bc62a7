"""Micro-batches hold every token once, within the budget, and point back at the right columns."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import miles_train.conformance as conformance
from miles_train.microbatches import cut


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


def test_the_example_of_the_docstring_holds():
    batch = batch_of(0, 2)
    micro = next(cut(batch.take([int(batch.lengths.argmax()), int(batch.lengths.argmin())]), 100))
    assert list(micro.lengths) == sorted(micro.lengths)
