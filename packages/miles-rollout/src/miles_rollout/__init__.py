"""Generating samples: engines, rollout workers and rewards."""

from miles_rollout.curriculum import Curriculum, CurriculumSettings
from miles_rollout.dynamic import DynamicSampling
from miles_rollout.engine import Completion, Engine, SamplingParams
from miles_rollout.errors import EngineDied, EngineError, EngineStartError, EngineUnavailable
from miles_rollout.generate import GenerateContext, GenerateFn, LostSample, Tool, multi_turn, single_turn
from miles_rollout.rewards import InProcessJudge, Judge, Verdict
from miles_rollout.tokenizer import Tokenizer
from miles_rollout.worker import Dropped, Rollout, RolloutWorker, WorkerSettings, sample_seed

__all__ = [  # noqa: RUF022 (grouped by subject)
    # engines (miles_rollout.sglang is the one there is)
    "Completion",
    "Engine",
    "SamplingParams",
    # generating
    "GenerateContext",
    "GenerateFn",
    "LostSample",
    "Tokenizer",
    "Tool",
    "multi_turn",
    "single_turn",
    # judging
    "InProcessJudge",
    "Judge",
    "Verdict",
    # choosing what to learn from
    "Curriculum",
    "CurriculumSettings",
    "DynamicSampling",
    # the worker
    "Dropped",
    "Rollout",
    "RolloutWorker",
    "WorkerSettings",
    "sample_seed",
    # errors
    "EngineDied",
    "EngineError",
    "EngineStartError",
    "EngineUnavailable",
]
