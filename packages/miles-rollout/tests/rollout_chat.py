"""A chat model's tokenizer in the manner of Qwen3, and an engine that says what it is told to, token by token."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from miles_core.types import VersionSpan
from miles_rollout import SamplingParams
from miles_rollout.engine import Completion
from miles_rollout.errors import EngineError

# As Qwen3's: tools in the system turn, results in a user turn, thoughts of turns before the last user's left out.
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\n# Tools' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- set last = namespace(user=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content and loop.index0 < last.user %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
END = "<|im_end|>"


def write_chat_model(folder: Path, template: str = TEMPLATE) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words = ["assistant user system tool_response tool_call name arguments add What is the sum of"] * 9
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


class ScriptedEngine:
    """Says its lines in order, a character a token (no tokenizer would), and ends each with <|im_end|>.

    A line that ends in "..." is broken off there, as by the limit of tokens; an exception is raised.
    """

    def __init__(self, encode: Callable[[str], list[int]], lines: Sequence[str | EngineError]):
        self.encode, self.lines = encode, list(lines)
        self.prompts: list[list[int]] = []
        self.asked: list[SamplingParams] = []
        self.seeds: list[int] = []

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: SamplingParams,
        num_samples: int,
        *,
        seeds: Sequence[int] | None = None,
        namespace: str = "",
    ) -> list[Completion]:
        assert num_samples == 1 and seeds is not None and namespace == "5"
        line = self.lines.pop(0)
        if isinstance(line, EngineError):
            raise line
        self.prompts.append(list(input_ids))
        self.asked.append(sampling)
        self.seeds.extend(seeds)
        cut = line.endswith("...")
        tokens = [token for character in line.removesuffix("...") for token in self.encode(character)]
        tokens = tokens if cut else [*tokens, *self.encode(END)]
        logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32) / 64 - len(self.prompts)
        span = VersionSpan(0, len(tokens), 5)
        return [Completion(np.asarray(tokens, np.int32), logprobs, "length" if cut else "stop", (span,))]

    async def close(self) -> None:
        pass
