"""Rewards from servers that answer, answer late, badly, or not at all."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from miles_core.config import HookSpec, RewardSection
from miles_core.errors import InputError, RolloutError
from miles_core.types import Prompt, Sample
from miles_rollout.rewards import Judge, Verdict, make_judge
from miles_rollout.rewards.remote import HttpServer, SGLangModel
from miles_rollout.tokenizer import Tokenizer

PROMPT = Prompt("p1", "12+34=", {"answer": "46"})
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def sample(text: str) -> Sample:
    tokens = np.arange(3, 7, dtype=np.int32)
    return Sample(tokens, tokens > 4, tokens.astype(np.float32), (), "stop", text)


def served(handler: Handler, use: Callable[[str], Awaitable[Any]]) -> Any:
    """What `use` returns, given the URL of a server on loopback that has this one handler."""

    async def run() -> Any:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            (address, *_) = runner.addresses
            return await use(f"http://127.0.0.1:{address[1]}")
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def judged(handler: Handler, *texts: str, **settings: Any) -> list[Verdict]:
    async def use(url: str) -> list[Verdict]:
        judge = HttpServer(url=url + "/score", **{"retries": 0, "timeout_s": 30.0, **settings})
        try:
            return await judge.judge(PROMPT, [sample(text) for text in texts])
        finally:
            await judge.close()

    return served(handler, use)


def replying(*answers: tuple[int, Any]) -> Handler:
    """Status and JSON of one answer after the other; the last for good."""
    left = list(answers)

    async def reply(request: web.Request) -> web.Response:
        status, value = left.pop(0) if len(left) > 1 else left[0]
        return web.Response(status=status, text=value if isinstance(value, str) else json.dumps(value))

    return reply


def test_a_group_is_one_request_and_comes_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None, Any]] = []

    async def score(request: web.Request) -> web.Response:
        body = await request.json()
        seen.append((request.path, request.headers.get("Authorization"), body))
        return web.json_response({"rewards": [len(text) for text in body["responses"]], "model": "m"})

    monkeypatch.setenv("MY_REWARD_KEY", "k")
    assert judged(score, "a", "bbb", api_key_variable="MY_REWARD_KEY") == [Verdict(1.0), Verdict(3.0)]
    body = {"prompt": "12+34=", "metadata": {"answer": "46"}, "responses": ["a", "bbb"], "finish_reasons": ["stop"] * 2}
    assert seen == [("/score", "Bearer k", body)]


def test_parts_and_bad_numbers_are_per_sample() -> None:
    answer = {"rewards": [{"reward": 0.5, "style": 0.1}, {"style": 1.0}, 2]}
    good, bad, rest = judged(replying((200, answer)), "a", "b", "c")
    assert (good, rest) == (Verdict(0.5, {"style": 0.1}), Verdict(2.0)) and bad.failure == "reward malformed"


@pytest.mark.parametrize(
    ("status", "answer", "failure"),
    [
        (200, {"rewards": [1.0]}, "reward server malformed"),
        (200, {"reward": [1.0, 1.0]}, "reward server malformed"),
        (200, '{"rewards": [NaN, 1.0]}', "reward server malformed"),
        (200, {"rewards": ["1", "2"]}, "reward server malformed"),
        (200, "hello", "reward server malformed"),
        (200, "[" * (17 << 20), "reward server malformed"),
        (400, "too long", "reward request refused"),
        (302, "", "reward request refused"),
        (500, "cuda", "reward server failed"),
        (429, "busy", "reward server failed"),
    ],
)
def test_what_a_server_does_wrong_has_a_reason(status: int, answer: Any, failure: str) -> None:
    verdicts = judged(replying((status, answer)), "a", "b")
    assert [verdict.failure for verdict in verdicts] == [failure] * 2
    assert "http://127.0.0.1" in verdicts[0].detail and len(verdicts[0].detail) <= 500
    if status >= 400:
        assert f"{status} {answer}" in verdicts[0].detail


def test_what_may_pass_is_tried_again_and_nothing_else() -> None:
    good = (200, {"rewards": [1.0]})
    assert judged(replying((503, ""), (429, ""), good), "a", retries=2) == [Verdict(1.0)]
    assert judged(replying((503, ""), (503, ""), good), "a", retries=1)[0].failure == "reward server failed"
    assert judged(replying((400, ""), good), "a", retries=5)[0].failure == "reward request refused"


def test_a_server_that_drips_is_too_slow() -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b" ")
            await asyncio.sleep(0.02)
        return response

    (verdict,) = judged(drip, "a", timeout_s=0.3)
    assert verdict.failure == "reward server too slow"


def test_nobody_there() -> None:
    async def run() -> list[Verdict]:
        judge = HttpServer(url="http://127.0.0.1:9/score", retries=1, timeout_s=5.0)
        try:
            return await judge.judge(PROMPT, [sample("a")])
        finally:
            await judge.close()

    (verdict,) = asyncio.run(run())
    assert verdict.failure == "reward server unreachable" and ":9" in verdict.detail


def test_no_more_connections_than_allowed_and_waiting_is_not_the_servers_time() -> None:
    now, most, peers = 0, 0, set()

    async def score(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        await asyncio.sleep(0.2)
        now -= 1
        return web.json_response({"rewards": [1.0]})

    async def use(url: str) -> list[list[Verdict]]:
        judge = HttpServer(url=url, connections=2, timeout_s=2.0, retries=0)
        try:
            return await asyncio.gather(*[judge.judge(PROMPT, [sample("a")]) for _ in range(24)])
        finally:
            await judge.close()

    assert served(score, use) == [[Verdict(1.0)]] * 24
    assert most == 2 and len(peers) == 2


def test_it_is_a_reward_too() -> None:
    async def use(url: str) -> dict[str, float]:
        reward = HttpServer(url=url, retries=0)
        try:
            return await reward(PROMPT, sample("a"))
        finally:
            await reward.close()

    assert served(replying((200, {"rewards": [{"reward": 1.0, "x": 2.0}]})), use) == {"reward": 1.0, "x": 2.0}
    with pytest.raises(RolloutError, match=r"reward server failed: .*500"):
        served(replying((500, "")), use)


TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}={% endfor %}"


@pytest.mark.parametrize(
    ("settings", "body"),
    [
        ({"feed": "tokens"}, {"input_ids": [[3, 4, 5, 6], [3, 4, 5, 6]]}),
        ({"feed": "text"}, {"text": ["12+34=46", "12+34=4"]}),
        ({"feed": "chat"}, {"input_ids": "rendered"}),
    ],
)
def test_sglang_reads_what_it_is_fed(tiny_model: Path, tmp_path: Path, settings: dict[str, Any], body: Any) -> None:
    for file in tiny_model.glob("tokenizer*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    if body["input_ids" if "input_ids" in body else "text"] == "rendered":
        encode = Tokenizer(str(tmp_path)).encode_more
        body = {"input_ids": [encode("u12+34=" + f"=a{answer}=") for answer in ("46", "4")]}
    seen: list[tuple[str, Any]] = []

    async def classify(request: web.Request) -> web.Response:
        seen.append((request.path, await request.json()))
        return web.json_response([{"embedding": [0.5, -1.5], "meta_info": {}}, {"embedding": [2.0, 1.0]}])

    async def use(url: str) -> list[Verdict]:
        judge = SGLangModel(url=url + "/", tokenizer=str(tmp_path), index=1, **settings)
        try:
            return await judge.judge(PROMPT, [sample("46"), sample("4")])
        finally:
            await judge.close()

    assert served(classify, use) == [
        Verdict(-1.5, {"score_0": 0.5, "score_1": -1.5}),
        Verdict(1.0, {"score_0": 2.0, "score_1": 1.0}),
    ]
    assert seen == [("/classify", body)]


def test_one_score_is_a_plain_reward_and_null_is_not_finite() -> None:
    async def use(url: str) -> list[Verdict]:
        judge = SGLangModel(url=url, feed="tokens")
        try:
            return await judge.judge(PROMPT, [sample("46"), sample("4")])
        finally:
            await judge.close()

    good, bad = served(replying((200, [{"embedding": [0.25]}, {"embedding": [None]}])), use)
    assert good == Verdict(0.25) and bad.failure == "reward not finite"


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("http_server", {"url": "127.0.0.1:80"}, "must begin with http"),
        ("http_server", {"url": "http://x", "api_key_variable": "NO_SUCH_KEY"}, "is not set"),
        ("http_server", {"address": "http://x"}, "unexpected keyword argument 'address'"),
        ("sglang_model", {"url": "http://x"}, "directory"),
        ("sglang_model", {"url": "http://x", "feed": "words"}, "must be"),
        ("sglang_model", {"url": "http://x", "tokenizer": "/no/where"}, "must hold tokenizer.json"),
    ],
)
def test_wrong_settings_are_found_before_anything_is_asked(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_judge(HookSpec(name=name, params=params), RewardSection())  # pyright: ignore[reportCallIssue]


def test_the_recipe_gets_one_judge_that_asks_for_all() -> None:
    spec = HookSpec(name="http_server", params={"url": "http://127.0.0.1:9"})
    judge: Judge = make_judge(spec, RewardSection(processes=4))  # pyright: ignore[reportCallIssue]
    assert isinstance(judge, HttpServer)
    asyncio.run(judge.start())
