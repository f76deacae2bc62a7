import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from miles_core import InputError
from miles_core.tasks import copy_digits
from miles_launch.models.tiny import EOS, VOCABULARY, make_copy_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_copy_model(path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_transformers_loads_it_whole(directory: Path):
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    assert model.num_parameters() == 75_136
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == VOCABULARY[EOS]


def test_weights_start_as_transformers_would_start_them(directory: Path):
    ours: Any = transformers.AutoModelForCausalLM.from_pretrained(directory)
    theirs: Any = transformers.AutoModelForCausalLM.from_config(ours.config)
    for (name, mine), (_, reference) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if mine.dim() == 1:
            assert torch.equal(mine, reference), name
        else:  # 1024 draws or more: the standard deviation is known to 1 part in 45, three times over
            assert mine.std().item() == pytest.approx(reference.std().item(), rel=0.1), name
            assert abs(mine.mean().item()) < 0.003, name


def test_the_tokenizer_reads_characters(directory: Path):
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("1234=").input_ids
    assert ids == [1, 2, 3, 4, 10]
    assert tokenizer.decode(ids) == "1234="
    assert tokenizer.decode([1, 2, VOCABULARY[EOS]], skip_special_tokens=True) == "12"
    assert tokenizer("7x").input_ids == [7, VOCABULARY["<unk>"]]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (14, 13, 16)


def test_every_prompt_of_the_copy_task_is_one_token_a_character(directory: Path):
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    for prompt in copy_digits(seed=3)(0, 50):
        text = str(prompt.content) + prompt.metadata["answer"] + EOS
        assert tokenizer(text).input_ids == [VOCABULARY[token] for token in (*text.removesuffix(EOS), EOS)]


def test_the_seed_decides_every_byte(directory: Path, tmp_path: Path):
    make_copy_model(tmp_path / "same")
    make_copy_model(tmp_path / "other", seed=1)
    assert contents(tmp_path / "same") == contents(directory)
    different = [name for name, value in contents(tmp_path / "other").items() if value != contents(directory)[name]]
    assert different == ["model.safetensors"]


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": 20}, {"hidden_size": 0}, {"num_layers": 0}, {"seed": -1}], ids=lambda wrong: str(wrong)
)
def test_impossible_sizes_are_named(tmp_path: Path, wrong: dict[str, int]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        make_copy_model(tmp_path / "model", **wrong)
    assert not (tmp_path / "model").exists()


def test_making_it_imports_neither_torch_nor_transformers(tmp_path: Path):
    code = (
        "import sys; from miles_launch.models.tiny import make_copy_model; make_copy_model(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'ray', 'sglang', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)
