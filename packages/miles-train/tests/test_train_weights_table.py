"""Fusions are undone bit for bit, and a table is checked against a model both ways."""

import pytest
import torch
import train_tiny
from hypothesis import given
from hypothesis import strategies as st

from miles_core.errors import InputError
from miles_train.megatron.rope import Rope
from miles_train.megatron.weights import TABLES, GroupedQKV, Row, Stacked, WeightTable, Whole
from miles_train.megatron.weights.convert import hf_weights


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.sampled_from([(), (3,)]))
def test_qkv_is_undone_and_lies_by_groups(groups, per_group, dim, rest):
    heads = groups * per_group
    fusion = GroupedQKV(heads, groups, dim)
    parts = [torch.randn(count * dim, *rest) for count in (heads, groups, groups)]
    whole = fusion.join(parts)
    assert all(torch.equal(a, b) for a, b in zip(fusion.split(whole), parts, strict=True))
    # The second group begins with its first query head, which follows the first group's value head.
    if groups > 1:
        start = (per_group + 2) * dim
        assert torch.equal(whole[start : start + dim], parts[0][per_group * dim : (per_group + 1) * dim])
        assert torch.equal(whole[start - dim : start], parts[2][:dim])


@given(st.integers(1, 3), st.integers(1, 4))
def test_stacked_and_whole_are_undone(num_parts, rows):
    parts = [torch.randn(rows, 2) for _ in range(num_parts)]
    fusion = Stacked(num_parts)
    assert all(torch.equal(a, b) for a, b in zip(fusion.split(fusion.join(parts)), parts, strict=True))
    assert Whole().split(Whole().join(parts[:1]))[0] is parts[0]


def test_every_name_occurs_once():
    for architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        table = TABLES[architecture](
            {**train_tiny.CONFIG, "architectures": [architecture], "attention_bias": True, "mlp_bias": True}
        )
        rows = list(table.expand())
        names = [name for row in rows for name in row.hf]
        assert len(names) == len(set(names)) == len(table.shapes())
        assert len({row.megatron for row in rows}) == len(rows)


def test_a_model_is_checked_both_ways():
    table = WeightTable((Row(("a.{layer}.w",), ((2,),), "layers.{layer}.w"),), num_layers=2)
    table.check_model(["layers.0.w", "layers.1.w"])
    with pytest.raises(InputError, match=r"missing: layers\.1\.w \(nearest: layers\.1\.v\).*not in the table: layers"):
        table.check_model(["layers.0.w", "layers.1.v"])


def test_padding_never_leaves_and_ties_are_repeated():
    table = WeightTable((Row(("e",), ((3, 2),), "embedding", padded=True),), 0, tied={"head": "e"})
    parameter = torch.arange(8.0).view(4, 2)
    weights = dict(hf_weights({"embedding": parameter}, table, {"head": "e"}))
    assert torch.equal(weights["e"], parameter[:3]) and torch.equal(weights["head"], parameter[:3])
    assert list(dict(hf_weights({"embedding": parameter}, table, {}))) == ["e"]


def test_a_rope_of_factor_one_is_the_default():
    plain = Rope(10000.0, 16).inverse_frequencies()
    assert torch.equal(plain, Rope(10000.0, 16, "linear", 1.0).inverse_frequencies())
    torch.testing.assert_close(plain, Rope(10000.0, 16, "llama3", 1.0).inverse_frequencies())
