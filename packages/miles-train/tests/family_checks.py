"""What a family's tests check: one random model, made by transformers, in both."""

import dataclasses
import json

import numpy as np
from transformers import PreTrainedConfig

LOGITS = 1e-4  # of the largest
GRADIENTS = 1e-3  # of the norm
NOISE = 1e-7  # of the largest norm: a gradient that is 0 but for rounding (a router's whose weights are always 1)


def assert_agrees(ranks, path, model_type, values, dtype="float32", without=(), added=(), settings=None):
    """Make a model at `path`; its logits, gradients and tensors after import and export are those of transformers.

    Args:
        ranks: the fixture.
        path: directory to make.
        model_type: of transformers.
        values: of its config.
        dtype: of the stored weights.
        without: keys to remove from config.json,
        added: and values to add: both read what is left.
        settings: of the trainer.
    """
    ranks.run_one("in_rank_reference.make_reference_model", path, model_type, values, dtype)
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in without} | dict(added)
    (path / "config.json").write_text(json.dumps(config))
    assert differences(ranks.run_one("in_rank_reference.compare_with_transformers", path, settings)) == []


def differences(result):
    """What is not equal, in words; logits and gradients within the bounds count as equal."""
    found = [f"{name} did not come back as it was stored" for name in result["exported"]]
    for number, (ours, theirs) in enumerate(result["logits"]):
        gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
        if not gap <= LOGITS:
            found.append(f"logits of sample {number} differ by {gap:.1e} of the largest")
    noise = NOISE * max((np.linalg.norm(theirs) for _, theirs in result["gradients"].values()), default=0.0)
    for name, (ours, theirs) in result["gradients"].items():
        gap, norm = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        if not gap <= max(GRADIENTS * norm, noise):
            found.append(f"gradient of {name} differs by {gap:.1e}, its norm is {norm:.1e}")
    return found


def fields_of(config_class):
    """What a config class of transformers has of its own: what every class has says nothing of an architecture."""
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    return {field.name for field in dataclasses.fields(config_class)} - shared
