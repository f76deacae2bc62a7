"""What the agent endpoint costs: the same conversations through it and on the bare engine. Prints one JSON object.

    python agents.py                                             a tiny random model on the CPU
    python agents.py --model DIR --arguments '{}' --new-tokens 256     a chat model on a GPU

Arms, in turns, on prompts that no other arm had: "bare" sends token ids to the engine and appends ids of its own;
"endpoint" talks chat completions to the endpoint with aiohttp; "openai" does so with OpenAI's client. All three make
the same requests of the engine: equally many, equally long. "nothing" is the endpoint before an engine that answers at
once: what it costs by itself.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
from cpu import make_model
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from miles_core.types import VersionSpan
from miles_rollout import Engine, GenerateContext, SamplingParams, Tokenizer
from miles_rollout.agents import Endpoint
from miles_rollout.engine import Completion
from miles_rollout.generate.chat import ChatFormat
from miles_rollout.sglang import ServerSettings, SGLangEngine, SGLangServer

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FOLLOW_UP = "Go on: what comes next, and why?"


def make_chat_model(folder: Path) -> None:
    """The tiny random Qwen3 with a byte-level tokenizer and a chat template."""
    make_model(folder, vocab_size=320, context_length=8192)
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [FOLLOW_UP] * 9, trainers.BpeTrainer(vocab_size=316, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked for."""

    rollouts: int
    turns: int
    new_tokens: int
    prompt_characters: int

    def first(self, number: int) -> list[dict[str, str]]:
        """The opening of one rollout, unlike all others from its first characters on."""
        text = f"{number} " + "What is the sum of these numbers? " * (self.prompt_characters // 34 + 1)
        return [{"role": "user", "content": text[: self.prompt_characters]}]


class Nothing:
    """An engine that answers at once, always the same."""

    def __init__(self, new_tokens: int):
        tokens = np.arange(new_tokens, dtype=np.int32) % 200 + 10
        self.answer = Completion(tokens, -np.ones(new_tokens, np.float32), "length", (VersionSpan(0, new_tokens, 0),))

    async def generate(self, input_ids: Sequence[int], sampling: Any, num_samples: int, **_: Any) -> list[Completion]:
        """See Engine.generate."""
        return [self.answer] * num_samples


Ask = Callable[[list[Any]], Awaitable[str]]
Arm = Callable[[GenerateContext, Load, int], Awaitable[None]]


async def bare(context: GenerateContext, load: Load, salt: int) -> None:
    """Token ids to the engine, as many as the endpoint sends."""
    chat = ChatFormat(context.tokenizer)
    reply = {"role": "assistant", "content": ""}
    follow_up = [{"role": "user", "content": FOLLOW_UP}]
    appended = chat.follow("", load.first(0), reply, "", follow_up).ids.tolist()

    async def one(number: int) -> None:
        ids = chat.open(load.first(number)).ids.tolist()
        for _ in range(load.turns):
            (made,) = await context.engine.generate(ids, context.sampling, 1, seeds=[number], namespace="0")
            ids = [*ids, *made.tokens.tolist(), *appended]

    await asyncio.gather(*[one(salt + number) for number in range(load.rollouts)])


async def endpoint(context: GenerateContext, load: Load, salt: int) -> None:
    """Chat completions with aiohttp."""
    async with Endpoint(context) as server, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        def connect(key: str) -> Ask:
            headers = {"Authorization": f"Bearer {key}"}

            async def ask(messages: list[Any]) -> str:
                body = {"model": "policy", "messages": messages}
                async with http.post(f"{server.base_url}/chat/completions", json=body, headers=headers) as answer:
                    return (await answer.json())["choices"][0]["message"]["content"]

            return ask

        await _talk(server, load, salt, connect)


async def openai_client(context: GenerateContext, load: Load, salt: int) -> None:
    """Chat completions with OpenAI's client, one connection pool for all."""
    async with Endpoint(context) as server, openai.DefaultAsyncHttpxClient() as http:
        shared = openai.AsyncOpenAI(base_url=server.base_url, api_key="", http_client=http, max_retries=0)

        def connect(key: str) -> Ask:
            client = shared.copy(api_key=key)

            async def ask(messages: list[Any]) -> str:
                answer = await client.chat.completions.create(model="policy", messages=messages)
                return answer.choices[0].message.content or ""

            return ask

        await _talk(server, load, salt, connect)


async def _talk(server: Endpoint, load: Load, salt: int, connect: Callable[[str], Ask]) -> None:
    async def one(number: int) -> None:
        key, _ = server.open(number)
        ask = connect(key)
        messages: list[Any] = load.first(number)
        for _ in range(load.turns):
            messages.append({"role": "assistant", "content": await ask(messages)})
            messages.append({"role": "user", "content": FOLLOW_UP})
        (sample,) = server.close(key)  # one branch: the history was recognised every time
        assert sample.response_len == load.turns * load.new_tokens

    await asyncio.gather(*[one(salt + number) for number in range(load.rollouts)])


async def measure(context: GenerateContext, load: Load, arms: Mapping[str, Arm], repeats: int) -> dict[str, Any]:
    """Medians of the arms, which take turns; the first round does not count."""
    wall: dict[str, list[float]] = {name: [] for name in arms}
    processor: dict[str, list[float]] = {name: [] for name in arms}
    salt = 0
    for _ in range(repeats + 1):
        for name, arm in arms.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            await arm(context, load, salt)
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - start_cpu)
            salt += load.rollouts
    return {
        name: {
            "wall_s": statistics.median(wall[name][1:]),
            "wall_s_all": wall[name][1:],
            "client_cpu_s": statistics.median(processor[name][1:]),
        }
        for name in arms
    }


async def run(engine: Engine, tokenizer: Tokenizer, load: Load, repeats: int) -> dict[str, Any]:
    """All arms on the engine, and the endpoint by itself."""
    sampling = SamplingParams(load.new_tokens)  # no stop tokens: every reply has its full length
    context = GenerateContext(engine, tokenizer, sampling, weight_version=0)
    arms: dict[str, Arm] = {"bare": bare, "endpoint": endpoint, "openai": openai_client}
    figures = await measure(context, load, arms, repeats)
    await engine.close()
    nothing: Any = Nothing(load.new_tokens)
    alone = GenerateContext(nothing, tokenizer, sampling, weight_version=0)
    requests = load.rollouts * load.turns
    cost = await measure(alone, load, arms, repeats)
    figures["nothing"] = {f"{name}_us_per_request": 1e6 * cost[name]["wall_s"] / requests for name in cost}
    bare_s = figures["bare"]["wall_s"]
    figures["overhead"] = {name: figures[name]["wall_s"] / bare_s - 1 for name in ("endpoint", "openai")}
    figures["requests"] = requests
    figures["tokens_per_s_bare"] = requests * load.new_tokens / bare_s
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face directory with a chat template; by default a tiny random one")
    parser.add_argument("--arguments", type=json.loads, default={"device": "cpu", "dtype": "float32"}, help="SGLang's")
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-characters", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    load = Load(asked.rollouts, asked.turns, asked.new_tokens, asked.prompt_characters)
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or folder
        if asked.model is None:
            make_chat_model(Path(folder))
        server = SGLangServer(ServerSettings(model, Path(folder, "log"), asked.arguments))
        try:
            engine = SGLangEngine(server.start())
            figures = asyncio.run(run(engine, Tokenizer(model), load, asked.repeats))
        finally:
            server.stop()
    print(json.dumps({"load": vars(asked), **figures}, indent=1))


if __name__ == "__main__":
    main()
