"""User code: the protocol of every extension point, and how a name in a recipe becomes a checked callable.

Code is named `"package.module:name"`, with parameters beside it in the recipe; by a short name, if it comes with Miles
or an installed package has an entry point of the group `miles.hooks`; or passed as an object in Python.
"""

from miles_core.hooks.load import ENTRY_POINTS, bind, full_name, load_hook, load_object
from miles_core.hooks.points import POINTS, Point, point_of
from miles_core.hooks.protocols import (
    AfterModelInit,
    AfterStep,
    AfterTrainStep,
    BeforeLogprobs,
    BeforeTrainStep,
    DataSource,
    Generate,
    GroupReward,
    Judgement,
    MakesDataSource,
    MakesModel,
    Metrics,
    OnCheckpoint,
    Reduction,
    Reward,
    Rollout,
    SampleFilter,
)

__all__ = [  # noqa: RUF022 (grouped by subject)
    # rollout
    "DataSource",
    "Generate",
    "GroupReward",
    "Judgement",
    "MakesDataSource",
    "Reward",
    "Rollout",
    "SampleFilter",
    # learning
    "AfterModelInit",
    "AfterTrainStep",
    "BeforeLogprobs",
    "BeforeTrainStep",
    "MakesModel",
    "Reduction",
    # the driver
    "AfterStep",
    "Metrics",
    "OnCheckpoint",
    # loading
    "ENTRY_POINTS",
    "POINTS",
    "Point",
    "bind",
    "full_name",
    "load_hook",
    "load_object",
    "point_of",
]
