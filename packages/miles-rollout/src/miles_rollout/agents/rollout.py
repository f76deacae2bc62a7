"""Rollouts by agents: user code that talks to a model over HTTP, and returns how well it went."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from miles_core.hooks import bind, load_object
from miles_core.types import Prompt, Sample
from miles_rollout._concurrent import run_all
from miles_rollout.agents._session import Session
from miles_rollout.agents.endpoint import Endpoint
from miles_rollout.generate.types import GenerateContext, LostSample
from miles_rollout.rewards.judge import verdict_of

_GRACE_S = 2.0  # for an agent to clean up after it was told to end; then it is left behind


class Agent(Protocol):
    """One attempt at a prompt, over OpenAI's API."""

    async def __call__(self, base_url: str, api_key: str, prompt: Prompt) -> float | Mapping[str, float] | None:
        """Work on the prompt with the model at `base_url`.

        Leave temperature and top_p out: replies sampled otherwise than the run samples are not trained on.

        Args:
            base_url: ends in /v1; the model is called "policy".
            api_key: of this attempt alone: every request made with it is recorded.
            prompt: with the row's metadata.

        Returns:
            The reward, or named parts with the total under "reward"; None leaves it to the recipe's reward. A raise
            loses this sample, with that reason.
        """
        ...


async def agent_rollout(
    prompt: Prompt,
    seeds: Sequence[int],
    context: GenerateContext,
    *,
    agent: Agent | str,
    params: Mapping[str, Any] | None = None,
    timeout_s: float = 600.0,
    max_total_tokens: int = 32768,
) -> list[Sample | LostSample]:
    """Run the agent once for each seed, all at once, and make samples of what the model said to it.

    Agents run on this event loop: one that computes or blocks holds up the others (`asyncio.to_thread` helps).

    Args:
        prompt: for the agent.
        seeds: one an attempt.
        context: what samples, and how.
        agent: the function, or its "package.module:name".
        params: more keyword arguments for it.
        timeout_s: seconds for one attempt.
        max_total_tokens: most tokens of one conversation; at most what the model can take.

    Returns:
        One sample a conversation: as a rule one an attempt, more where an agent holds several conversations or changes
        what was said. All of an attempt have its reward. Attempts that failed are LostSamples.
    """
    run = load_agent(agent, params or {})
    async with Endpoint(context, max_total_tokens=max_total_tokens) as endpoint:
        made = await run_all(_attempt(run, endpoint, prompt, seed, timeout_s) for seed in seeds)
    return [sample for samples in made for sample in samples]


def load_agent(agent: Agent | str, params: Mapping[str, Any]) -> Agent:
    """Load an agent and check its signature.

    Raises:
        InputError: it cannot be imported, takes other arguments, or is not async.
    """
    code: Any = load_object(agent, "agent") if isinstance(agent, str) else agent
    return bind(code, params, "agent", Agent)


async def _attempt(
    agent: Agent, endpoint: Endpoint, prompt: Prompt, seed: int, timeout_s: float
) -> list[Sample | LostSample]:
    key, session = endpoint.open(seed)
    try:
        result = await _run(agent(endpoint.base_url, key, prompt), timeout_s)
    finally:
        samples = endpoint.close(key)
    if isinstance(result, LostSample):
        error = session.engine_error
        return [result if error is None else LostSample(error.reason, f"{error.detail} ({result.detail})")]
    if not samples:
        return [_nothing_to_train(session)]
    if result is None:
        return list(samples)
    verdict = verdict_of(result, "agent")
    if verdict.failure:
        return [LostSample(verdict.failure, verdict.detail)]
    return [sample.replace(reward=verdict.reward, reward_parts=verdict.parts) for sample in samples]


async def _run(work: Any, timeout_s: float) -> Any:
    task = asyncio.ensure_future(_without_exit(work))
    try:
        done, _ = await asyncio.wait([task], timeout=timeout_s)
        if not done:
            return LostSample("agent timeout", f"not done after {timeout_s:g} s")
        return task.result()
    except asyncio.CancelledError:
        if task.cancelled():  # the agent's own doing, not ours
            return LostSample("agent raised", "CancelledError")
        raise
    except Exception as error:  # noqa: BLE001  whatever an agent raises is data here
        return LostSample("agent raised", f"{type(error).__name__}: {error}")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=_GRACE_S)


async def _without_exit(work: Any) -> Any:
    try:
        return await work
    except SystemExit as error:  # asyncio would end the worker with it
        raise RuntimeError(f"SystemExit({error})") from error


def _nothing_to_train(session: Session) -> LostSample:
    if not session.turns:
        return LostSample("agent asked nothing", "no request was answered with its key")
    return LostSample(
        "agent samples its own way",
        f"none of {len(session.turns)} replies was sampled with the run's temperature and top_p: leave them out",
    )
