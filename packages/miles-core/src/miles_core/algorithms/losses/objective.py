"""Several terms as one loss."""

from dataclasses import dataclass

from miles_core.algorithms.losses.inputs import Correction, Loss, LossInputs, Scored
from miles_core.algorithms.losses.kl_term import KLTerm
from miles_core.algorithms.needs import needs_of


@dataclass(frozen=True, slots=True)
class Objective:
    """What `[algorithm]` of a recipe says, as one loss.

    Per token:

        loss = product of corrections * surrogate + KL term - entropy_coef * entropy

    Corrections weigh the surrogate alone. A token that they mask still counts in the mean: its weight is 0, the others'
    stay.

    Attributes:
        surrogate: the loss proper.
        corrections: for what engine and trainer disagree about.
        kl: to the reference.
        entropy_coef: weight of the entropy bonus in nats; 0 turns it off and saves its computation.
    """

    surrogate: Loss
    corrections: tuple[Correction, ...] = ()
    kl: KLTerm | None = None
    entropy_coef: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        """The optional columns that any of the terms reads."""
        terms = (self.surrogate, *self.corrections, *([self.kl] if self.kl else []))
        entropy = frozenset({"entropy"}) if self.entropy_coef else frozenset[str]()
        return frozenset[str]().union(entropy, *map(needs_of, terms))

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return per-token losses [T] and the metrics of all terms [T]."""
        loss, metrics = self.surrogate(inputs)
        metrics = dict(metrics)
        for correction in self.corrections:
            weights, told = correction(inputs)
            loss = loss * weights
            metrics |= told
        if self.kl is not None:
            term, told = self.kl(inputs)
            loss = loss + term
            metrics |= told
        if self.entropy_coef:
            loss = loss - self.entropy_coef * inputs.column("entropy")
        return loss, metrics
