"""PEFT directories, both ways, with the peft library at the other end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from miles_lora import (
    LoraConfig,
    LoraError,
    adapter_config,
    adapter_state,
    attach,
    load_peft,
    merge,
    save_peft,
    unmerge,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)

FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENS = torch.arange(10)[None]
NAMES = ["q_proj", "v_proj", "down_proj"]
EXPRESSION = r".*\.layers\.1\.(self_attn|mlp)\.\w+_proj"


def base(dtype=torch.float32, **values):
    """A Qwen3 of 0.03 M parameters, the same at every call."""
    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, **values,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def stir(parameters, seed=1):
    """Values as after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def ours(config, model=None, dtype=torch.float32):
    model = model or base()
    attach(model, config, dtype=dtype)
    stir(adapter_state(model).values())
    return model


def theirs(model=None, **values):
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": NAMES} | values))
    model = peft.get_peft_model(model or base(), config).eval()
    stir(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    return model


def contents(directory):
    assert sorted(path.name for path in directory.iterdir()) == list(FILES)
    return [(directory / file).read_bytes() for file in FILES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=12, targets=NAMES, dropout=0.1, base_model="models/tiny", task_type="CAUSAL_LM"),
        LoraConfig(rank=3, alpha=0.7, targets=["layers.0.self_attn.q_proj", "lm_head"], rslora=True),
        LoraConfig(rank=8, alpha=16, targets=EXPRESSION),
    ],
    ids=["names", "rslora", "expression"],
)
def test_our_export_gives_the_same_logits_in_peft(tmp_path, config, dtype):
    model = ours(config, base(dtype))
    save_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(dtype), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(base(dtype)))
    read = loaded.peft_config["default"]
    assert (read.r, read.lora_alpha, read.lora_dropout, read.use_rslora) == (
        config.rank, config.alpha, config.dropout, config.rslora,
    )  # fmt: skip
    assert (read.base_model_name_or_path, read.task_type) == (config.base_model, config.task_type)

    merge(model)
    if dtype == torch.float32:
        assert torch.equal(logits(loaded.merge_and_unload()), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "values",
    [
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
        {"use_rslora": True, "r": 3, "init_lora_weights": "gaussian"},
        {"target_modules": EXPRESSION},
    ],
    ids=["names", "rslora", "expression"],
)
def test_their_export_gives_the_same_logits_here(tmp_path, values, dtype):
    model = theirs(base(dtype), **values)
    model.save_pretrained(str(tmp_path / "theirs"))
    loaded = base(dtype)
    config = load_peft(loaded, tmp_path / "theirs")
    assert torch.equal(logits(loaded), logits(model))
    assert adapter_config(loaded) == config and config.rslora == values.get("use_rslora", False)
    assert config.dropout == values.get("lora_dropout", 0.0) and config.task_type == values.get("task_type")

    save_peft(loaded, tmp_path / "ours")
    tensors = "adapter_model.safetensors"
    assert (tmp_path / "ours" / tensors).read_bytes() == (tmp_path / "theirs" / tensors).read_bytes()
    back = peft.PeftModel.from_pretrained(base(dtype), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", [NAMES, EXPRESSION], ids=["names", "expression"])
def test_a_second_trip_is_byte_identical(tmp_path, targets, dtype):
    model = ours(LoraConfig(rank=4, alpha=6.5, targets=targets, rslora=True, dropout=0.05), dtype=dtype)
    save_peft(model, tmp_path / "one")
    loaded = base()
    assert load_peft(loaded, tmp_path / "one") == adapter_config(model)
    assert all(tensor.dtype == dtype for tensor in adapter_state(loaded).values())
    save_peft(loaded, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    model = ours(LoraConfig(rank=4, alpha=8, targets=NAMES))
    save_peft(model, tmp_path / "one")
    merge(model)
    save_peft(model, tmp_path / "two")
    unmerge(model)
    save_peft(model, tmp_path / "three")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_a_bfloat16_file_may_be_trained_on_in_float32(tmp_path):
    save_peft(ours(LoraConfig(rank=4, alpha=8, targets=NAMES), dtype=torch.bfloat16), tmp_path / "adapter")
    narrow, wide = base(), base()
    load_peft(narrow, tmp_path / "adapter")
    load_peft(wide, tmp_path / "adapter", dtype=torch.float32)
    for name, tensor in adapter_state(wide).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, adapter_state(narrow)[name].float())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, r"use_dora=True, which is not supported: only plain LoRA on linears is"),
        ({"bias": "all"}, r"bias='all', which is not supported"),
        ({"bias": "lora_only"}, r"bias='lora_only', which is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern=\{'q_proj': 8\}, which is not supported"),
        ({"alpha_pattern": {"q_proj": 8}}, r"alpha_pattern=.*which is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which is not supported"),
        ({"layers_to_transform": [1]}, r"layers_to_transform=\[1\], which is not supported"),
        ({"exclude_modules": ["v_proj"]}, r"exclude_modules=\['v_proj'\], which is not supported"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa', which changes the base weights"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=.*which is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_features_of_peft_that_are_not_supported(tmp_path, values, message):
    """Directories that peft itself wrote; the model stays as it was."""
    theirs(**values).save_pretrained(str(tmp_path / "adapter"))
    model = base()
    with pytest.raises(LoraError, match=rf"adapter_config.json says {message}"):
        load_peft(model, tmp_path / "adapter")
    assert model.state_dict().keys() == base().state_dict().keys()


def test_other_adapters_of_peft_are_refused(tmp_path):
    peft.get_peft_model(base(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        str(tmp_path / "adapter")
    )
    with pytest.raises(LoraError, match=r"is not a LoRA adapter: peft_type must be 'LORA'"):
        load_peft(base(), tmp_path / "adapter")


def test_tensors_of_the_base_in_the_file_are_refused(tmp_path):
    """With `lm_head` among the targets, peft saves the head's own weight too."""
    theirs(target_modules=["lm_head"]).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    with pytest.raises(LoraError, match=r"lm_head.base_layer.weight.*belongs to no target of this adapter"):
        load_peft(base(), tmp_path / "adapter")


def rewrite(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: rewrite(d, r=8), r"has shape \(4, \d+\), the adapter here \(8, \d+\): rank \(8 here\)"),
        (lambda d: rewrite(d, target_modules=["q_proj"]), r"belongs to no target of this adapter: it has 4 tensors"),
        (lambda d: rewrite(d, target_modules=[*NAMES, "k_proj"]), r"lack .*k_proj.lora_A.weight.*16 are needed, 12"),
        (lambda d: rewrite(d, target_modules=[*NAMES, "c_attn"]), r"target 'c_attn' matches no module"),
        (lambda d: rewrite(d, target_modules=None), r"lacks target_modules: without it"),
        (lambda d: rewrite(d, target_modules="all-linear"), r"'all-linear' is not spelled out"),
        (lambda d: rewrite(d, lora_alpha=-1), r"adapter_config.json: alpha=-1 must be"),
        (
            lambda d: rewrite(d, invented_in_2030={"on": True}),
            r"says invented_in_2030=\{'on': True\}, which is not supp",
        ),
        (lambda d: (d / FILES[0]).write_text("{"), r"adapter_config.json cannot be read \(Expecting"),
        (lambda d: (d / FILES[0]).unlink(), r"adapter_config.json cannot be read \(.*No such file"),
        (
            lambda d: (d / FILES[1]).rename(d / "adapter_model.bin"),
            r"safetensors cannot be read .*pickled adapters are",
        ),
        (cut, r"adapter_model.safetensors cannot be read .*must be a whole safetensors file"),
    ],
)
def test_a_damaged_directory_changes_nothing(tmp_path, damage, message):
    directory = tmp_path / "adapter"
    save_peft(ours(LoraConfig(rank=4, alpha=8, targets=NAMES)), directory)
    damage(directory)
    model = base()
    with pytest.raises(LoraError, match=message):
        load_peft(model, directory)
    assert model.state_dict().keys() == base().state_dict().keys()
    assert torch.equal(logits(model), logits(base()))


def test_another_base_model_is_refused(tmp_path):
    save_peft(ours(LoraConfig(rank=4, alpha=8, targets=NAMES)), tmp_path / "adapter")
    with pytest.raises(LoraError, match=r"down_proj.lora_A.weight has shape \(4, 48\), the adapter here \(4, 64\)"):
        load_peft(
            transformers.Qwen3ForCausalLM(
                base().config.__class__(**base().config.to_dict() | {"intermediate_size": 64})
            ),
            tmp_path / "adapter",
        )


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    model = ours(LoraConfig(rank=4, alpha=8, targets=NAMES))
    save_peft(model, tmp_path / "deep" / "adapter")
    before = contents(tmp_path / "deep" / "adapter")
    stir(adapter_state(model).values(), seed=2)
    (tmp_path / "file").write_text("mine")
    for taken in ("deep/adapter", "file"):
        with pytest.raises(LoraError, match=rf"{taken} exists: save to a new place"):
            save_peft(model, tmp_path / taken)
    assert contents(tmp_path / "deep" / "adapter") == before and (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name.startswith(".")) == []


def test_others_may_read_it(tmp_path):
    """Permissions are those of any new file: an engine may run as another user."""
    save_peft(ours(LoraConfig(rank=4, alpha=8, targets=NAMES)), tmp_path / "adapter")
    (tmp_path / "plain").write_text("")
    for file in FILES:
        assert (tmp_path / "adapter" / file).stat().st_mode == (tmp_path / "plain").stat().st_mode


SAVER = """
import itertools, sys, torch
from miles_lora import LoraConfig, attach, save_peft
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(512, 512))
attach(model, LoraConfig(rank=256, alpha=1, targets=["0"]))
for step in itertools.count():
    save_peft(model, f"{sys.argv[1]}/step-{step}")
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_whole_directories_only(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as writer:
        assert writer.stdout is not None
        for _ in range(5):
            assert writer.stdout.readline()
        time.sleep(0.003)
        writer.send_signal(signal.SIGKILL)
    steps = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(steps) >= 5
    for step in steps:
        contents(step)
        load_peft(nn.Sequential(nn.Linear(512, 512)), step)
