"""A family from outside the package, in a rank's process: the example's, and broken ones."""

import sys
from pathlib import Path

import torch
from in_rank_layouts import LINEAR
from in_rank_reference import ours_logits
from in_rank_trainer import make_trainer
from train_tiny import batch_of

from miles_core.errors import InputError
from miles_train.comparison import negative_log_likelihood
from miles_train.megatron import runtime
from miles_train.megatron.families import Family, load_family
from miles_train.model_dir import open_model_directory

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
FAMILY = "gated_heads:FAMILY"

NO_FAMILY = object()


def _family():
    return load_family(FAMILY)


def reference_logits(path, tokens):
    """What the example says it computes, in plain torch."""
    directory = open_model_directory(path)
    config = directory.config
    with directory.reader() as read:
        weights = {name: read(name).clone() for name in directory.tensors}
    heads, dim = config["num_attention_heads"], config["head_dim"]
    x = weights["model.embed_tokens.weight"][tokens]

    def norm(x, name):
        return weights[name] * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def project(x, name, prefix=prefix):
            return x @ weights[f"{prefix}{name}.weight"].t()

        y = norm(x, prefix + "input_layernorm.weight")
        outputs = []
        query, key, value = (project(y, f"self_attn.{part}_proj").view(len(x), heads, dim) for part in "qkv")
        gate = torch.sigmoid(project(y, "self_attn.gate_proj"))
        for head in range(heads):
            scores = query[:, head] @ key[:, head].t() / dim**0.5
            for i in range(len(x)):
                for j in range(len(x)):
                    scores[i, j] = scores[i, j] - 2 ** (-8 * (head + 1) / heads) * (i - j) if j <= i else -torch.inf
            outputs.append(gate[:, head, None] * (scores.softmax(-1) @ value[:, head]))
        x = x + project(torch.cat(outputs, -1), "self_attn.o_proj")
        y = norm(x, prefix + "post_attention_layernorm.weight")
        mlp = torch.nn.functional.silu(project(y, "mlp.gate_proj")) * project(y, "mlp.up_proj")
        x = x + project(mlp, "mlp.down_proj")
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].t()


def train(address, path, folder):
    """Logits of both; then the losses of some steps; what was exported before them."""
    trainer = make_trainer(address, path, {"lr": 1e-2}, negative_log_likelihood, family=FAMILY)
    trainer.export(folder / "hf")
    batch = batch_of()
    tokens = torch.from_numpy(batch.take([0]).tokens).long()
    ours = ours_logits(trainer._cores[0], tokens)
    losses = [trainer.step([batch])["loss"] for _ in range(8)]
    trainer.close()
    return ours, reference_logits(path, tokens).numpy(), losses


def logprobs_and_checkpoint(address, path, settings, folder):
    """Logprobs before and after a step, which is saved in one layout and loaded in this one."""
    trainer = make_trainer(address, path, {**LINEAR, **settings}, negative_log_likelihood, family=FAMILY)
    mine = batch_of().take(range(trainer.shard, 12, trainer.num_shards))
    before = trainer.logprobs(mine)
    trainer.step([mine])
    after = trainer.logprobs(mine)
    if not settings:
        trainer.save(folder / "checkpoint", {})
    trainer.load(folder / "checkpoint")
    loaded = trainer.logprobs(mine)
    trainer.close()
    return before, after, loaded


def refusal(address, path, plug_in, settings=None):
    try:
        make_trainer(address, path, settings or {}, family=plug_in).close()
    except InputError as error:
        return str(error)
    finally:
        runtime.stop()  # a spec is asked for its layers when groups stand


def __getattr__(name):  # families that are none, made when they are asked for
    spec = _family().spec
    made = {
        "SPECLESS": lambda: Family(table=_family().table, spec=None),
        "ONE_ARGUMENT": lambda: Family(table=lambda config: None, spec=spec),
        "NO_TABLE": lambda: Family(table=lambda config, stored: {}, spec=spec),
        "FEW_LAYERS": lambda: Family(
            table=_family().table,
            spec=type(spec)(spec.arguments, lambda *given: spec.layers(*given)[1:]),
        ),
    }
    if name not in made:
        raise AttributeError(name)
    return made[name]()
