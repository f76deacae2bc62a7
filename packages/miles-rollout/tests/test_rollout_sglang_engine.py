"""The real thing: stock SGLang on the CPU, without a compiler. Two engines for all of these tests."""

import asyncio
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from safetensors.numpy import load_file

from miles_core.types import Prompt, Sample
from miles_rollout import GenerateContext, InProcessJudge, RolloutWorker, SamplingParams, Tokenizer, WorkerSettings
from miles_rollout.agents import agent_rollout
from miles_rollout.conformance import CHECKS, Check, Subject
from miles_rollout.engine import Completion
from miles_rollout.errors import EngineDied, EngineStartError, EngineUnavailable
from miles_rollout.rewards import position_match
from miles_rollout.sglang import EngineAddress, ServerSettings, SGLangEngine, SGLangServer

pytestmark = pytest.mark.xdist_group("rollout-engine")

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "/bin/false")
        patch.setenv("CXX", "/bin/false")
        log = tmp_path_factory.mktemp("engine") / "engine.log"
        server = SGLangServer(ServerSettings(str(tiny_model), log, CPU, deterministic=True))
        server.start()
    yield server
    server.stop()


@pytest.fixture
def address(server: SGLangServer) -> EngineAddress:
    server.check()
    return server.address


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(check: Check, address: EngineAddress) -> None:
    async def examine() -> None:
        engine = SGLangEngine(address)
        try:
            await check(Subject(engine, vocab_size=16, context_length=128, deterministic=True))
        finally:
            await engine.close()

    asyncio.run(examine())


def generate(address: EngineAddress, prompts: list[list[int]], sampling: SamplingParams) -> list[list[Completion]]:
    async def run() -> list[list[Completion]]:
        engine = SGLangEngine(address)
        calls = [
            engine.generate(prompt, sampling, 4, seeds=range(4 * i, 4 * i + 4)) for i, prompt in enumerate(prompts)
        ]
        try:
            return await asyncio.gather(*calls)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_logprobs_are_the_models(address: EngineAddress, tiny_model: Path) -> None:
    prompts = [Subject(None, 16, 128).prompt(number, 1 + number % 7) for number in range(16)]  # type: ignore[arg-type]
    for temperature in (1.0, 0.7):
        answers = generate(address, prompts, SamplingParams(20, temperature=temperature))
        for prompt, completions in zip(prompts, answers, strict=True):
            for completion in completions:
                tokens = [*prompt, *completion.tokens.tolist()]
                wanted = reference_logprobs(tiny_model, tokens, temperature)[len(prompt) - 1 :]
                np.testing.assert_allclose(completion.logprobs, wanted, atol=2e-5)


def reference_logprobs(model: Path, tokens: list[int], temperature: float) -> np.ndarray:
    """log p(tokens[i+1] | tokens[:i+1]) of a Qwen3, written out in float64."""
    weights = {name: value.astype(np.float64) for name, value in load_file(model / "model.safetensors").items()}
    count = len(tokens)
    angles = np.outer(np.arange(count), 10000.0 ** (-np.arange(0, 16, 2) / 16))
    cosine, sine = (np.tile(part, 2)[:, None] for part in (np.cos(angles), np.sin(angles)))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights[name]

    def rotate(x: np.ndarray) -> np.ndarray:
        return x * cosine + np.concatenate([-x[..., 8:], x[..., :8]], -1) * sine

    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(2):
        layer = f"model.layers.{index}."
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = ((h @ weights[f"{layer}self_attn.{n}_proj.weight"].T).reshape(count, -1, 16) for n in "qkv")
        q, k = rotate(norm(q, layer + "self_attn.q_norm.weight")), rotate(norm(k, layer + "self_attn.k_norm.weight"))
        k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / 4 + np.triu(np.full((count, count), -np.inf), 1)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", share, v).reshape(count, -1)
        x = x + attended @ weights[layer + "self_attn.o_proj.weight"].T
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[layer + "mlp.down_proj.weight"].T
    logits = norm(x, "model.norm.weight") @ weights["model.embed_tokens.weight"].T / temperature
    logprobs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return logprobs[np.arange(count - 1), tokens[1:]]


async def two_turns(base_url: str, api_key: str, prompt: Prompt) -> float:
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": prompt.content}]
        for question in ("1+1", "2"):
            reply = await client.chat.completions.create(model="policy", messages=messages, logprobs=True)
            messages += [reply.choices[0].message.model_dump(), {"role": "user", "content": question}]
            assert reply.usage is not None and reply.choices[0].logprobs is not None
            assert len(reply.choices[0].logprobs.content or ()) == reply.usage.completion_tokens
        return float(len(messages))


def test_agents_learn_from_what_the_engine_sampled(address: EngineAddress, tiny_model: Path, tmp_path: Path) -> None:
    """Through OpenAI's client, over two turns: logprobs are the model's at each token trained; seeds decide."""
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ 'b' if m.role == 'assistant' else 'a' }}{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}b{% endif %}"
    )
    prompts = [Prompt(f"row{number}", f"{number}=") for number in range(4)]

    async def make() -> list[Sample]:
        engine, tokenizer = SGLangEngine(address), Tokenizer(str(tmp_path))
        context = GenerateContext(engine, tokenizer, SamplingParams(10, 0.8, stop_token_ids=(13,)), weight_version=0)
        try:
            made = [await agent_rollout(prompt, [1, 2, 3], context, agent=two_turns) for prompt in prompts]
        finally:
            await engine.close()
        return [sample for samples in made for sample in samples if isinstance(sample, Sample)]

    one, two = asyncio.run(make()), asyncio.run(make())
    assert len(one) == 12 and len({sample.text for sample in one}) > 6
    for sample, again in zip(one, two, strict=True):
        assert sample.metadata["turns"] == 2 and sample.metadata["branches"] == 1 and sample.reward == 5.0
        np.testing.assert_array_equal(sample.tokens, again.tokens)
        np.testing.assert_array_equal(sample.rollout_logprobs, again.rollout_logprobs)
        wanted = reference_logprobs(tiny_model, sample.tokens.tolist(), 0.8)
        np.testing.assert_allclose(sample.rollout_logprobs[1:], np.where(sample.loss_mask[1:], wanted, 0), atol=2e-5)
        assert [span.weight_version for span in sample.version_spans] == [0, 0]


def test_the_worker_makes_the_same_groups_again(address: EngineAddress, tiny_model: Path) -> None:
    tokenizer = Tokenizer(str(tiny_model))
    prompts = [Prompt(str(number), f"{number}=", {"answer": str(number)}) for number in range(1000, 1012)]

    async def roll_out():
        sampling = SamplingParams(5, stop_token_ids=tokenizer.stop_token_ids)
        context = GenerateContext(SGLangEngine(address), tokenizer, sampling, weight_version=0)
        judge = InProcessJudge(position_match, "position_match")
        worker = RolloutWorker(context, judge, WorkerSettings(8, seed=3))
        try:
            return await worker.rollout(prompts, step=5, weight_version=0)
        finally:
            await worker.close()

    one, again = asyncio.run(roll_out()), asyncio.run(roll_out())
    assert [group.id for group in one.groups] == [prompt.id for prompt in prompts] and not one.dropped
    for group, same in zip(one.groups, again.groups, strict=True):
        for sample, twin in zip(group.samples, same.samples, strict=True):
            assert np.array_equal(sample.tokens, twin.tokens) and sample.reward == twin.reward
            assert np.array_equal(sample.rollout_logprobs, twin.rollout_logprobs)
            assert sample.tokens[:5].tolist() == tokenizer.encode(group.prompt.content)
            assert not sample.loss_mask[:5].any() and sample.loss_mask[5:].all()
            assert not sample.rollout_logprobs[:5].any() and np.isfinite(sample.reward)


def test_keys_open_and_do_not_show(server: SGLangServer, address: EngineAddress, tmp_path: Path) -> None:
    def status(path: str, key: str | None, method: str = "GET") -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            request = urllib.request.Request(address.url + path, headers=headers, method=method)
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/model_info", None) == 401 and status("/model_info", address.api_key) == 200
    assert status("/flush_cache", address.api_key, "POST") == 401
    assert status("/flush_cache", address.admin_api_key, "POST") == 200
    keys = (address.api_key.encode(), address.admin_api_key.encode())
    log = server._settings.log_path.read_bytes()
    assert b"api_key='***'" in log
    for pid in server.processes:
        shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert not any(key in shown + log for key in keys)
    assert not any(key.decode() in repr(address) for key in keys)


OWNER = """
import sys, time
from pathlib import Path
from miles_rollout.sglang import ServerSettings, SGLangServer
cpu = {"device": "cpu", "dtype": "float32"}
server = SGLangServer(ServerSettings(sys.argv[1], Path(sys.argv[2]), cpu, deterministic=True))
address = server.start()
print(address.url, address.api_key, address.admin_api_key, *server.processes, flush=True)
time.sleep(1000)
"""


def test_dies_with_its_owner_and_answers_as_its_twin(address: EngineAddress, tiny_model: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", OWNER, str(tiny_model), str(tmp_path / "engine.log")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        url, api_key, admin_api_key, *pids = owner.stdout.readline().split()
        twin = EngineAddress(url, api_key, admin_api_key)
        prompts = [[1, 2, 3], [4, 10], [7]]
        ours, theirs = (generate(engine, prompts, SamplingParams(12)) for engine in (address, twin))
        for one, other in zip(chain(*ours), chain(*theirs), strict=True):
            assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.logprobs, other.logprobs)
        processes = [psutil.Process(int(pid)) for pid in pids]
        processes += [child for process in processes for child in process.children(recursive=True)]
        owner.kill()
    _, alive = psutil.wait_procs(set(processes), timeout=5)
    assert not alive, f"{alive} outlived their owner"


def test_a_dead_scheduler_is_named(tiny_model: Path, tmp_path: Path) -> None:
    server = SGLangServer(ServerSettings(str(tiny_model), tmp_path / "engine.log", CPU, name="engine-7"))
    try:
        address = server.start()
        server.check()
        processes = [psutil.Process(pid) for pid in server.processes]
        temporary = Path(server._temporary)
        (pattern,) = (temporary / "shared_memory.txt").read_text().splitlines()
        assert glob(pattern)
        (scheduler,) = (pid for pid, name in server.processes.items() if name == "sglang::scheduler")
        psutil.Process(scheduler).kill()
        deadline = time.monotonic() + 5
        with pytest.raises(EngineDied, match="sglang::scheduler of engine-7 was ended by SIGKILL"):
            while time.monotonic() < deadline:
                server.check()
                time.sleep(0.05)
        with pytest.raises(EngineUnavailable, match="engine unreachable"):
            generate(address, [[1]], SamplingParams(1))
        assert not psutil.wait_procs(processes, timeout=5)[1]
    finally:
        server.stop()
    assert not temporary.exists() and not glob(pattern)


def test_cannot_start_says_why_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    server = SGLangServer(ServerSettings(str(broken), tmp_path / "logs" / "engine.log", CPU))
    with pytest.raises(EngineStartError, match=r"(?s)engine-0 \(SGLang\) could not start: .*afetensor.*end of its log"):
        server.start()
    assert server._process is not None
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(server._process.pid)
    assert not Path(server._temporary).exists()
    (named,) = (event for event in server._events if event["event"] == "named")
    assert not glob(named["shared_memory"])
