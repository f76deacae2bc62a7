"""What describes an adapter: where it goes, how large it is and how strongly it acts."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from miles_lora.errors import LoraError


@dataclass(frozen=True)
class LoraConfig:
    r"""An adapter: y = W x + scaling * B A dropout(x), with A `[rank, in]` and B `[out, rank]` (arXiv:2106.09685).

    Attributes:
        rank: Columns of B and rows of A.
        alpha: Strength; `scaling` is alpha / rank.
        targets: Which linears, by the names of `model.named_modules()` and with PEFT's rules. A list names whole
            modules or their last components: `["q_proj", "mlp.up_proj"]`. One string is a regular expression that a
            whole name matches: `r".*layers\.[01]\..*_proj"`. A list is kept sorted, each entry once.
        dropout: Share of the inputs that the low-rank path drops while training, from 0 up to 1 (excluded).
        rslora: Scale by alpha / sqrt(rank) instead, so that a larger rank does not act more weakly
            (arXiv:2312.03732). SGLang 0.5.17 ignores this flag of a directory and serves alpha / rank.
        base_model: Name or path of the model it was made for; kept in PEFT directories, used for nothing here.
        task_type: PEFT's word for the model's head, such as `"CAUSAL_LM"`; kept likewise.

    Raises:
        LoraError: A value out of its range, no targets, or a regular expression that does not compile.
    """

    rank: int
    alpha: float
    targets: str | Sequence[str]
    dropout: float = 0.0
    rslora: bool = False
    base_model: str | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise LoraError(f"rank={self.rank!r} must be an integer of at least 1, such as 16")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise LoraError(f"alpha={self.alpha!r} must be a finite number above 0, such as twice the rank")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise LoraError(f"dropout={self.dropout!r} must be at least 0 and below 1; 0 switches it off")
        if isinstance(self.targets, str):
            _require_expression(self.targets)
        else:
            names = sorted(set(self.targets)) if all(isinstance(name, str) for name in self.targets) else []
            if not names or "" in names:
                raise LoraError(
                    f"targets={self.targets!r} must name at least one linear, such as ['q_proj', 'v_proj'], or be a "
                    "regular expression"
                )
            object.__setattr__(self, "targets", tuple(names))

    @property
    def scaling(self) -> float:
        """What the low-rank path is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def matches(self, name: str) -> bool:
        """Whether the module of this name is a target."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(target_names(target, name) for target in self.targets)


def target_names(target: str, name: str) -> bool:
    """Whether one entry of a list of targets names this module: all of its name, or its last components."""
    return name == target or name.endswith(f".{target}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_expression(targets: str) -> None:
    if targets in ("", "all-linear", "all"):
        raise LoraError(f"targets={targets!r} is not spelled out: list the linears, such as ['q_proj', 'v_proj']")
    try:
        re.compile(targets)
    except re.error as error:
        raise LoraError(
            f"targets={targets!r} is not a regular expression ({error}): a list of names is written ['q_proj', ...]"
        ) from error
