import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from miles_core.errors import InputError
from miles_rollout import Tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as SmolLM2 has it: digits one by one, special tokens, a chat template; and a bos for texts."""
    folder = tmp_path_factory.mktemp("chat-model")
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["which is the largest number of these", "reply with only the number"] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [0, 2]}))
    return folder


MESSAGES = [{"role": "user", "content": "Which is the largest: 874, 404?\nReply é 数."}]


def test_says_what_transformers_says(chat_model: Path, tiny_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for folder, texts in {chat_model: ["the number 12", "a<|im_end|>b", " é"], tiny_model: ["1234=", "7"]}.items():
        ours, theirs = Tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
        for text in texts:
            assert ours.encode(text) == theirs(text)["input_ids"]
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.decode(np.asarray(ids, np.int32)) == theirs.decode(ids)
    ours, theirs = Tokenizer(str(chat_model)), transformers.AutoTokenizer.from_pretrained(chat_model)
    wanted = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)
    assert ours.encode(MESSAGES) == list(wanted["input_ids"] if hasattr(wanted, "keys") else wanted)


def test_a_template_in_a_file_of_its_own(chat_model: Path, tmp_path: Path) -> None:
    for file in chat_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.decode(np.asarray(tokenizer.encode(MESSAGES))) == "<|im_start|>" + MESSAGES[0]["content"]


def test_stop_tokens_from_all_files(chat_model: Path, tiny_model: Path) -> None:
    assert Tokenizer(str(chat_model)).stop_token_ids == (0, 2)
    assert Tokenizer(str(tiny_model)).stop_token_ids == (13,)


def test_special_tokens_are_seen(tiny_model: Path) -> None:
    tokenizer = Tokenizer(str(tiny_model))
    assert tokenizer.decode(np.asarray([1, 14, 2], np.int32)) == "1<pad>2"


def test_bad_input(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold tokenizer\.json"):
        Tokenizer(str(tmp_path))
    tokenizer = Tokenizer(str(tiny_model))
    with pytest.raises(InputError, match="at least one token"):
        tokenizer.encode("")
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.encode(MESSAGES)
