"""What a comparison of two models counts as a difference."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from miles_train.comparison import export_changes, gradient_gap, logit_gaps, probe_batch
from miles_train.megatron.layout import fewest_ranks
from miles_train.model_dir import open_model_directory

pytestmark = pytest.mark.xdist_group("train-megatron")  # one pool of ranks a run


def make(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"architectures": ["Some"], **config}))
    return open_model_directory(path)


def test_an_export_is_compared_bit_for_bit(tmp_path):
    old = {"a": torch.randn(3, 4).bfloat16(), "b": torch.tensor([0.0, 1.0]), "c": torch.ones(2), "e": torch.ones(1)}
    new = {"a": old["a"].float(), "b": torch.tensor([-0.0, 1.0]), "d": torch.ones(2), "e": torch.ones(1, 1)}
    source, exported = make(tmp_path / "old", old, dtype="bfloat16"), make(tmp_path / "new", new, dtype="float32")
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    with source.reader() as read:
        changes = export_changes(source, exported, read)
    assert (changes.missing, changes.extra, changes.changed) == (["c"], ["d"], ["b", "e"])
    assert changes.dtypes == {"bfloat16 > float32": 1} and changes.files_missing == ["tokenizer.json"]
    assert changes.config == {"dtype": ("bfloat16", "float32")} and not changes.holds


def test_a_gradient_that_is_0_but_for_rounding_is_held_against_all_others():
    ones = torch.ones(100)
    assert gradient_gap("a", 1.0009 * ones, ones, 10.0).holds and not gradient_gap("a", 1.002 * ones, ones, 10.0).holds
    gap = gradient_gap("router", 3e-8 * ones, 1e-9 * ones, 10.0)
    assert gap.kind == "absolute" and gap.holds
    assert not gradient_gap("router", 1e-3 * ones, 0 * ones, 10.0).holds
    assert not gradient_gap("a", float("nan") * ones, ones, 10.0).holds
    assert gradient_gap("a", 0 * ones, 0 * ones, 0.0).holds


def test_probes_hold_long_and_short_samples_and_logits_are_judged_by_sample():
    batch = probe_batch(vocab_size=7, longest=40)
    assert batch.lengths.tolist() == [40, 20, 10, 5, 2, 2] and batch.tokens.max() < 7
    assert np.isclose(batch.loss_weights.sum(), 1) and batch.num_loss_tokens == 79 - 6
    theirs = np.random.default_rng(0).normal(size=(79, 7)).astype(np.float32)
    ours = theirs.copy()
    ours[45, 3] += 0.1
    assert [gap.holds for gap in logit_gaps(ours, theirs, batch)] == [True, False, True, True, True, True]


def test_a_layout_takes_as_few_ranks_as_hold_one_copy():
    tp2, ep2 = {"tensor_model_parallel_size": 2}, {"expert_model_parallel_size": 2}
    assert fewest_ranks({}) == 1 and fewest_ranks({**tp2, "pipeline_model_parallel_size": 3}) == 6
    assert fewest_ranks(ep2) == 2 and fewest_ranks({**tp2, **ep2}) == 4
    assert fewest_ranks({**tp2, **ep2, "expert_tensor_parallel_size": 1}) == 2
