"""The examiner of engines: what every `Engine` promises, as checks that any implementation can be put to.

In the tests of an engine, on one event loop:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_conforms(check, engine):
        await check(Subject(engine, vocab_size=16, context_length=64, deterministic=True))

A check knows the engine through the protocol alone, raises AssertionError with what does not hold, and leaves the
engine as it found it. The model should be random or nearly so: a model that always says the same proves little.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from miles_rollout.engine import Completion, Engine, SamplingParams
from miles_rollout.errors import EngineError, EngineUnavailable

_SHORT = SamplingParams(max_new_tokens=8)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined.

    Attributes:
        engine: idle, not paused.
        vocab_size: of its model; prompts are made of ids below it.
        context_length: most tokens of prompt and response together, or more than the model can take.
        deterministic: seeds decide the response, bit by bit.
    """

    engine: Engine
    vocab_size: int
    context_length: int
    deterministic: bool = False

    def prompt(self, number: int = 0, length: int = 5) -> list[int]:
        """One of many prompts."""
        return np.random.default_rng(number).integers(0, self.vocab_size, length).tolist()


async def well_formed(subject: Subject) -> None:
    """As many responses as asked for, of the promised dtypes, not too long, each token under a known version."""
    version = await subject.engine.weight_version()
    completions = await subject.engine.generate(subject.prompt(), _SHORT, 5)
    assert len(completions) == 5, f"asked for 5 samples, got {len(completions)}"
    for completion in completions:
        _check_form(completion, 8)
        assert completion.finish_reason == "length", f"nothing could stop it but {completion.finish_reason!r}"
        versions = {span.weight_version for span in completion.version_spans}
        assert versions == {version}, f"sampled by {versions}, but the engine serves {version}"


async def stops(subject: Subject) -> None:
    """A response ends with the first stop token, which stays part of it and says so, in the last place allowed too."""
    stop = tuple(range(subject.vocab_size // 2))
    sampling = SamplingParams(max_new_tokens=8, stop_token_ids=stop)
    for completion in await subject.engine.generate(subject.prompt(), sampling, 64):
        _check_form(completion, 8)
        tokens = completion.tokens.tolist()
        assert not set(tokens[:-1]) & set(stop), f"{tokens} goes on after a stop token (those below {len(stop)})"
        ended = tokens[-1] in stop
        assert completion.finish_reason == ("stop" if ended else "length"), f"{tokens}: {completion.finish_reason!r}"
        assert ended or len(tokens) == 8, f"{tokens} ends for no reason"


async def samples_what_it_says(subject: Subject) -> None:
    """Tokens come as often as their logprobs say, which are those at the sampling temperature.

    Chi-square over the tokens expected at least five times; a bound that chance exceeds once in a million.
    """
    count = 1024
    for temperature in (1.0, 0.6):
        sampling = SamplingParams(max_new_tokens=1, temperature=temperature)
        completions = await subject.engine.generate(subject.prompt(1), sampling, count, seeds=range(count))
        seen = Counter(int(completion.tokens[0]) for completion in completions)
        said: dict[int, float] = {}
        for completion in completions:
            token, logprob = int(completion.tokens[0]), float(completion.logprobs[0])
            assert abs(said.setdefault(token, logprob) - logprob) < 1e-2, f"token {token}: {said[token]} and {logprob}"
        total = sum(np.exp(list(said.values())))
        assert total < 1 + 1e-3, f"temperature {temperature}: probabilities of the tokens seen sum to {total}"
        expected = {token: count * float(np.exp(logprob)) for token, logprob in said.items()}
        expected = {token: number for token, number in expected.items() if number >= 5}
        chi_square = sum((seen[token] - number) ** 2 / number for token, number in expected.items())
        freedom = max(len(expected), 1)
        bound = freedom + 5 * np.sqrt(2 * freedom) + 15
        assert chi_square < bound, f"temperature {temperature}: chi-square {chi_square:.1f} of {freedom} tokens"


async def greedy(subject: Subject) -> None:
    """Temperature 0 gives one response, the same in another namespace."""
    sampling = SamplingParams(max_new_tokens=8, temperature=0.0)
    first = await subject.engine.generate(subject.prompt(2), sampling, 3, namespace="a")
    second = await subject.engine.generate(subject.prompt(2), sampling, 1, namespace="b")
    responses = {tuple(completion.tokens.tolist()) for completion in [*first, *second]}
    assert len(responses) == 1, f"temperature 0 gave {responses}"


async def narrows(subject: Subject) -> None:
    """top_k and top_p leave only the most probable tokens, and do not change the logprobs that are said."""
    prompt, count = subject.prompt(4), 64

    async def first_tokens(sampling: SamplingParams) -> dict[int, float]:
        completions = await subject.engine.generate(prompt, sampling, count, seeds=range(count))
        return {int(completion.tokens[0]): float(completion.logprobs[0]) for completion in completions}

    (best,) = await first_tokens(SamplingParams(1, temperature=0.0))
    everything = await first_tokens(SamplingParams(1))
    three = await first_tokens(SamplingParams(1, top_k=3))
    nucleus = await first_tokens(SamplingParams(1, top_p=1e-3))
    assert best in three and 1 < len(three) <= 3, f"top_k=3 gave {three}; the best is {best}"
    assert set(nucleus) == {best}, f"top_p=0.001 gave {nucleus}; the best is {best}"
    for token in everything.keys() & (three | nucleus).keys():
        gap = abs(everything[token] - (three | nucleus)[token])
        assert gap < 1e-2, f"token {token}: narrowing changed its logprob by {gap}"


async def many_at_once(subject: Subject) -> None:
    """Requests at the same time each get the answer to their own prompt, with the logprobs they get alone."""
    sampling = SamplingParams(max_new_tokens=4, temperature=0.0)
    prompts = [subject.prompt(number, 3 + number % 5) for number in range(32)]
    together = await asyncio.gather(*[subject.engine.generate(prompt, sampling, 2) for prompt in prompts])
    for prompt, completions in list(zip(prompts, together, strict=True))[::8]:
        (alone,) = await subject.engine.generate(prompt, sampling, 1)
        for completion in completions:
            gap = abs(float(completion.logprobs[0] - alone.logprobs[0]))
            assert gap < 1e-2, f"prompt {prompt}: first logprob differs by {gap} from the one alone"


async def seeds_decide(subject: Subject) -> None:
    """The same seed gives the same response to the last bit, alone or in company; other seeds give others."""
    engine, prompt = subject.engine, subject.prompt(3)
    if not subject.deterministic:
        await engine.generate(prompt, _SHORT, 2, seeds=[1, 2])  # ignored, not refused
        return
    greedy = SamplingParams(max_new_tokens=8, temperature=0.0)  # company that narrows its own choice
    company = [engine.generate(subject.prompt(10 + i), greedy if i % 2 else _SHORT, 3) for i in range(8)]
    among, *_ = await asyncio.gather(engine.generate(prompt, _SHORT, 6, seeds=range(6)), *company)
    assert len({tuple(completion.tokens.tolist()) for completion in among}) > 1, "six seeds gave one response"
    for seed in (4, 1, 2**63 - 1):
        one, again = [(await engine.generate(prompt, _SHORT, 1, seeds=[seed]))[0] for _ in range(2)]
        _check_same(one, again, f"seed {seed} twice")
        if seed < 6:
            _check_same(one, among[seed], f"seed {seed} alone and in company")


async def needs_a_seed_each(subject: Subject) -> None:
    """A number of seeds other than the number of samples is the caller's mistake."""
    try:
        await subject.engine.generate(subject.prompt(), _SHORT, 3, seeds=[1, 2])
    except ValueError:
        return
    raise AssertionError("two seeds for three samples were accepted")


async def refuses(subject: Subject) -> None:
    """What can never be answered is an EngineError that says so at once, and the engine serves on."""
    impossible = {"an empty prompt": [], "a prompt beyond the context": [0] * (subject.context_length + 1)}
    for name, prompt in impossible.items():
        try:
            await subject.engine.generate(prompt, _SHORT, 1)
        except EngineUnavailable as error:
            raise AssertionError(f"{name} is called a passing trouble: {error}") from error
        except EngineError:
            continue
        raise AssertionError(f"{name} was answered")
    await subject.engine.generate(subject.prompt(), _SHORT, 1)


async def pauses(subject: Subject) -> None:
    """While paused nothing is sampled; what was asked meanwhile is answered after `resume`."""
    for mode in ("retract", "in_place"):
        await subject.engine.pause(mode)
        asked = asyncio.ensure_future(subject.engine.generate(subject.prompt(), _SHORT, 1))
        try:
            done, _ = await asyncio.wait([asked], timeout=0.5)
            assert not done, f"answered while paused ({mode})"
        finally:
            await subject.engine.resume()
        _check_form((await asked)[0], 8)


async def aborts(subject: Subject) -> None:
    """Pausing with "abort" ends running requests: what there is comes back as such, or the request is unavailable."""
    length = subject.context_length - 6
    asked = asyncio.ensure_future(subject.engine.generate(subject.prompt(), SamplingParams(length), 16))
    await asyncio.sleep(0.02)
    await subject.engine.pause("abort")
    await subject.engine.resume()
    try:
        completions = await asked
    except EngineUnavailable:
        return
    for completion in completions:
        _check_form(completion, length)
        assert completion.finish_reason in ("abort", "length"), f"ended with {completion.finish_reason!r}"


async def stays_well(subject: Subject) -> None:
    """Healthy; forgets its cache when idle; answers the same afterwards."""
    await subject.engine.health()
    before = await subject.engine.generate(subject.prompt(), SamplingParams(4, temperature=0.0), 1)
    await subject.engine.flush_cache()
    after = await subject.engine.generate(subject.prompt(), SamplingParams(4, temperature=0.0), 1)
    assert np.array_equal(before[0].tokens, after[0].tokens), f"{before[0].tokens} became {after[0].tokens}"


Check = Callable[[Subject], Awaitable[None]]

CHECKS: Sequence[Check] = (
    well_formed,
    stops,
    samples_what_it_says,
    greedy,
    narrows,
    many_at_once,
    seeds_decide,
    needs_a_seed_each,
    refuses,
    pauses,
    aborts,
    stays_well,
)


def _check_form(completion: Completion, max_new_tokens: int) -> None:
    tokens, logprobs, spans = completion.tokens, completion.logprobs, completion.version_spans
    assert tokens.dtype == np.int32 and logprobs.dtype == np.float32, f"{tokens.dtype} and {logprobs.dtype}"
    assert 1 <= len(tokens) <= max_new_tokens, f"{len(tokens)} tokens of at most {max_new_tokens}"
    assert len(logprobs) == len(tokens), f"{len(tokens)} tokens and {len(logprobs)} logprobs"
    assert np.isfinite(logprobs).all() and (logprobs <= 1e-5).all(), f"logprobs {logprobs}"
    edges = [0, *(stop for _, stop, _ in spans)]
    gapless = [start for start, _, _ in spans] == edges[:-1] and edges[-1] == len(tokens)
    assert gapless, f"version spans {spans} do not cover {len(tokens)} tokens"


def _check_same(one: Completion, other: Completion, what: str) -> None:
    assert np.array_equal(one.tokens, other.tokens), f"{what}: {one.tokens} and {other.tokens}"
    assert np.array_equal(one.logprobs, other.logprobs), f"{what}: {one.logprobs} and {other.logprobs}"
