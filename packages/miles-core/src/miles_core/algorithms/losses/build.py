"""From `[algorithm]` of a recipe to one loss."""

from miles_core.algorithms.losses.kl_term import KLTerm
from miles_core.algorithms.losses.objective import Objective
from miles_core.config import AlgorithmSection
from miles_core.hooks import POINTS


def build_loss(section: AlgorithmSection) -> Objective:
    """Load the terms that the section names, check them, and put them together.

    Raises:
        InputError: code cannot be loaded, or not be called as it will be.
    """
    kl = section.kl
    return Objective(
        surrogate=POINTS["loss"].load(section.loss),
        corrections=tuple(map(POINTS["correction"].load, section.corrections)),
        kl=None if kl is None or kl.place != "loss" else KLTerm(kl.coef, POINTS["kl"].load(kl.estimator), kl.gradient),
        entropy_coef=section.entropy_coef,
    )
