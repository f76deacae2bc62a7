"""What the client makes of answers that a healthy engine does not give, from a server on loopback that gives them."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from miles_rollout import EngineError, EngineUnavailable, SamplingParams
from miles_rollout.sglang import EngineAddress, SGLangEngine

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SAMPLING = SamplingParams(2, stop_token_ids=(9,))


def ask(handler: Handler, use: Callable[[SGLangEngine], Awaitable[Any]], **options: Any) -> tuple[Any, int]:
    """Run `use` on a client of a server that answers with `handler`; its result and the number of requests."""
    requests = 0

    async def count(request: web.Request) -> web.StreamResponse:
        nonlocal requests
        requests += 1
        return await handler(request)

    async def run() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", count)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        engine = SGLangEngine(EngineAddress(f"http://{host}:{port}", "key", "admin"), **options)
        try:
            return await use(engine)
        finally:
            await engine.close()
            await runner.cleanup()

    try:
        return asyncio.run(run()), requests
    except EngineError as error:
        return error, requests


def sample(engine: SGLangEngine) -> Awaitable[Any]:
    return engine.generate([1, 2], SAMPLING, 1, seeds=[7], namespace="5")


def reply(**changes: Any) -> list[dict[str, Any]]:
    meta = {
        "id": "x",
        "finish_reason": {"type": "length", "length": 2},
        "weight_version": "5",
        "output_token_logprobs": [[-0.5, 3, None], [-1.5, 4, None]],
    }
    answer: dict[str, Any] = {"output_ids": changes.pop("output_ids", [3, 4])}
    return [{**answer, "meta_info": {**meta, **changes}}]


def always(body: Any, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text=body if isinstance(body, str) else json.dumps(body), status=status)

    return handler


def test_a_request_says_what_was_asked() -> None:
    seen: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.update(await request.json(), key=request.headers["Authorization"], path=request.path)
        return web.json_response(reply())

    (completion,), _ = ask(handler, sample)
    assert seen["path"] == "/generate" and seen["key"] == "Bearer key"
    assert seen["input_ids"] == [[1, 2]] and seen["extra_key"] == ["5"] and seen["return_logprob"] is True
    assert seen["sampling_params"][0]["sampling_seed"] == 7 and seen["sampling_params"][0]["stop_token_ids"] == [9]
    assert completion.tokens.tolist() == [3, 4] and completion.logprobs.tolist() == [-0.5, -1.5]
    assert completion.version_spans == ((0, 2, 5),) and completion.finish_reason == "length"


def test_admin_calls_use_the_admin_key() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"key": request.headers["Authorization"], "body": await request.json()})

    answer, _ = ask(handler, lambda engine: engine.admin("/update", {"a": 1}))
    assert answer == {"key": "Bearer admin", "body": {"a": 1}}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply(output_token_logprobs=[[-0.5, 3, None], [None, 4, None]]), "logprob not finite"),
        (reply(output_token_logprobs=[[-0.5, 3, None]]), "tokens and logprobs differ"),
        (reply(output_token_logprobs=[[-0.5, 3, None], [-1.5, 5, None]]), "tokens and logprobs differ"),
        (reply(weight_version="default"), "weight version is not a number"),
        (reply(finish_reason={"type": "matched"}), "unknown finish reason"),
        (reply() + reply(), "wrong number of samples"),
        ("[{", "unreadable answer"),
        ([{"output_ids": [1]}], "unreadable answer"),
        (reply(output_ids=[], output_token_logprobs=[], finish_reason={"type": "abort"}), "request aborted"),
    ],
)
def test_what_cannot_be_learned_from_is_an_error(answer: Any, reason: str) -> None:
    error, requests = ask(always(answer), sample)
    assert isinstance(error, EngineError) and error.reason == reason
    assert requests == 1, "asking again would give the same"


def test_refused_once_with_the_engines_words() -> None:
    error, requests = ask(always({"error": {"message": "too long", "code": 400}}, 400), sample)
    assert requests == 1 and not isinstance(error, EngineUnavailable)
    assert str(error) == "request refused: engine /generate: 400 too long"


def test_tried_again_until_it_answers() -> None:
    answers = iter([500, 503, 200])

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(reply(), status=next(answers))

    (completion,), requests = ask(handler, sample, max_retries=2)
    assert requests == 3 and completion.tokens.tolist() == [3, 4]


def test_given_up_after_max_retries() -> None:
    error, requests = ask(always("", 500), sample, max_retries=1)
    assert requests == 2 and isinstance(error, EngineUnavailable) and error.reason == "engine failed"


def test_a_broken_connection_is_tried_again() -> None:
    seen = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal seen
        seen += 1
        if seen == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(reply())

    (completion,), _ = ask(handler, sample, max_retries=1)
    assert seen == 2 and completion.tokens.tolist() == [3, 4]


def test_an_engine_that_hangs_has_a_deadline() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    error, requests = ask(handler, sample, max_retries=1, request_deadline_s=0.2)
    assert requests == 2 and isinstance(error, EngineUnavailable) and error.reason == "engine too slow"


def test_nobody_there() -> None:
    async def run() -> None:
        engine = SGLangEngine(EngineAddress("http://127.0.0.1:1", "key", "admin"), max_retries=0)
        with pytest.raises(EngineUnavailable, match="engine unreachable"):
            await engine.weight_version()
        await engine.close()

    asyncio.run(run())


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    answer = reply(output_ids=[3, 9], output_token_logprobs=[[-0.5, 3, None], [-1.5, 9, None]])
    (completion,), _ = ask(always(answer), sample)
    assert completion.finish_reason == "stop"
