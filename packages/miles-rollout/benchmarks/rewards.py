"""What judging costs, against doing nothing: `python packages/miles-rollout/benchmarks/rewards.py [--samples N]`.

Prints JSON: for each way to judge, samples a second over groups of 16, the best of three; `nothing` is a judge that
returns constants. `code_tests` runs two tests a sample, each in a sandbox of its own.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from aiohttp import web

from miles_core.config import HookSpec, RewardSection
from miles_core.types import Prompt, Sample
from miles_rollout.rewards import Judge, Verdict, make_judge

GROUP = 16
CODE = "```python\nprint(int(input()) * 2)\n```"
METADATA = {"answer": "46", "tests": [{"input": "2", "output": "4"}, {"input": "3", "output": "6"}]}


class Nothing:
    """Judges without looking."""

    async def judge(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        return [Verdict(1.0)] * len(samples)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


def sample(text: str, tokens: int) -> Sample:
    """A response of so many tokens."""
    ids = np.arange(tokens, dtype=np.int32)
    return Sample(ids, ids > 0, ids.astype(np.float32), (), "stop", text)


async def rate(judge: Judge, text: str, num_samples: int, tokens: int = 1024) -> float:
    """Samples a second, the best of three."""
    prompt = Prompt("p", "12+34=", METADATA)
    samples = [sample(text, tokens)] * GROUP
    best = 0.0
    try:
        await judge.start()
        await judge.judge(prompt, samples)
        for _ in range(3):
            start = time.perf_counter()
            groups = await asyncio.gather(*[judge.judge(prompt, samples) for _ in range(num_samples // GROUP)])
            best = max(best, num_samples / (time.perf_counter() - start))
            failed = next((verdict for group in groups for verdict in group if verdict.failure), None)
            if failed is not None:
                raise SystemExit(str(failed))
    finally:
        await judge.close()
    return round(best)


def judge(name: str, *, isolate: bool = True, processes: int = 1, **params: Any) -> Judge:
    """As a recipe would make it."""
    section = RewardSection(isolate=isolate, processes=processes, timeout_s=60.0)  # pyright: ignore[reportCallIssue]
    return make_judge(HookSpec(name=name, params=params), section)


async def serve() -> tuple[web.AppRunner, str]:
    """A reward server in this process, and its URL."""

    async def score(request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"rewards": [1.0] * len(body["responses"])})

    app = web.Application()
    app.router.add_post("/", score)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/"


async def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=4096)
    number = parser.parse_args().samples
    cores = len(os.sched_getaffinity(0))
    few = GROUP * cores
    report: dict[str, float] = {
        "nothing": await rate(Nothing(), "46", number),
        "exact_match, in process": await rate(judge("exact_match", isolate=False), "46", number),
        "exact_match, pool of 1": await rate(judge("exact_match"), "46", number),
        f"exact_match, pool of {cores}": await rate(judge("exact_match", processes=cores), "46", number),
        f"math_equal, pool of {cores}": await rate(judge("math_equal", processes=cores), "so \\boxed{46}", number // 8),
        f"code_tests, pool of {cores}": await rate(judge("code_tests", processes=cores), CODE, few),
    }
    server, url = await serve()
    report["http_server, loopback"] = await rate(judge("http_server", url=url), "46", number)
    await server.cleanup()
    print(json.dumps({"cores": cores, "load": os.getloadavg()[0], "samples_per_s": report}, indent=1))


asyncio.run(main())
