"""`[train.megatron]`: every mistake is one error, found without importing Megatron."""

import subprocess
import sys

import pytest

from miles_core.errors import InputError
from miles_train.megatron.settings import DERIVED, OWNED, READ, check_settings, known_arguments

OK = {"lr": 1e-6}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 1},
        {"bf16": True, "lr_warmup_iters": 5, "lr_warmup_init": 1e-7, "adam_beta2": 0.95, "clip_grad": 1.0},
        {"lr_decay_style": "cosine", "lr_decay_iters": 100, "min_lr": 1e-7},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"tensor_model_parallel_size": 1},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 4},
    ],
)
def test_good_settings_pass(settings):
    check_settings({**OK, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adam_beta3": 0.9}, r"train.megatron.adam_beta3 .*Did you mean adam_beta[12]\?"),
        ({"learning_rate": 1.0}, "no such argument"),
        ({"num_layers": 2}, "derived from config.json"),
        ({"micro_batch_size": 2}, "micro_batch_tokens"),
        ({"attention_dropout": 0.1}, "dropout is off"),
        ({"tensorboard_dir": "x"}, "nothing reads it"),
        ({"num_experts": 8}, "derived from config.json"),
        ({"moe_router_topk": 2}, "derived from config.json"),
        ({"moe_aux_loss_coeff": [0.01]}, "the recipe's loss is the only one"),
        ({"moe_token_dispatcher_type": "allgather"}, 'micro-batches of one shape.*Set "alltoall"'),
        ({"overlap_p2p_comm": True}, "it follows from the pipeline"),
        ({"sequence_parallel": True}, "has no effect: tensor_model_parallel_size = 1"),
        (
            {"num_virtual_stages_per_pipeline_rank": 2, "num_layers_per_virtual_pipeline_stage": 1},
            "num_virtual_stages_per_pipeline_rank says the same",
        ),
        ({"clip_grad": "1"}, "must be a number"),
        ({"lr_warmup_iters": 1.5}, "must be an integer"),
        ({"lr_warmup_iters": True}, "must be an integer"),
        ({"bf16": 1}, "must be true or false"),
        ({"lr_decay_style": "square"}, "must be one of constant, linear"),
        ({"recompute_modules": "core_attn", "recompute_granularity": "selective"}, "must be a list"),
        ({"lr_decay_style": "linear"}, "needs lr_decay_iters"),
        ({"min_lr": 1e-8}, "has no effect.*never decays"),
        ({"lr_warmup_init": 1e-8}, "there is no warm-up"),
        ({"recompute_method": "uniform"}, "nothing is recomputed"),
        ({"grad_reduce_in_bf16": True}, "the model is in float32"),
        ({"start_weight_decay": 0.1}, "constant weight decay"),
        ({"lr_decay_style": "linear", "lr_decay_iters": 5, "lr_wsd_decay_iters": 2}, "does not read it"),
        ({"decoupled_min_lr": 0.1}, "no decoupled_lr"),
    ],
)
def test_bad_settings_are_one_error_each(settings, message):
    with pytest.raises(InputError, match=message):
        check_settings({**OK, **settings})


def test_lr_must_be_there():
    with pytest.raises(InputError, match=r"train\.megatron\.lr = None: must be set"):
        check_settings({})


def test_two_spellings_of_one_argument_are_one_too_many():
    names = [name for name, argument in known_arguments().items() if argument.dest in READ and name != argument.dest]
    for name in names:
        with pytest.raises(InputError, match="sets the same argument"):
            check_settings({**OK, known_arguments()[name].dest: True, name: True})


def test_every_listed_name_is_an_argument_and_of_one_kind():
    dests = {argument.dest for argument in known_arguments().values()}
    listed = [*DERIVED, *OWNED, *READ]
    assert set(listed) <= dests
    assert len(listed) == len(set(listed))


def test_the_check_imports_neither_torch_nor_megatron():
    code = (
        "import sys; from miles_train.megatron.settings import check_settings; check_settings({'lr': 1.0});"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
