"""What config.json says of a mixture of experts, in one checked shape.

The weight table and the layer spec of every family with experts start here.
"""

from dataclasses import dataclass

from miles_core.errors import InputError
from miles_train.megatron.dense_config import DenseConfig


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Routed experts, each a SiLU-gated MLP, and perhaps shared ones that every token passes.

    Attributes:
        num_experts: routed experts.
        top_k: experts that each token goes to.
        expert_size: width of one expert.
        score: what makes the router's logits scores: "softmax" over all experts, "sigmoid" of each, or "sqrtsoftplus",
            the root of each one's softplus.
        normalize: whether the chosen experts' scores are divided by their sum.
        scaling: factor on the weights that result.
        num_groups: equal groups of neighbouring experts; 1 for none.
        top_groups: groups that a token may choose from: those whose two best scores (bias included) sum highest.
        has_bias: whether a bias per expert is added to its score for the choice, never for the weight.
        router_fp32: whether the router multiplies in float32 whatever the model's dtype.
        shared_size: width of all shared experts together; 0 for none.
        shared_gate: whether the shared experts' output is multiplied by the sigmoid of a linear function of the token.

    Raises:
        InputError: groups or choices that do not fit the number of experts.
    """

    num_experts: int
    top_k: int
    expert_size: int
    score: str = "softmax"
    normalize: bool = True
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    has_bias: bool = False
    router_fp32: bool = False
    shared_size: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        """Refuse what no router can compute."""
        if self.score not in {"softmax", "sigmoid", "sqrtsoftplus"}:
            raise InputError("scoring_func", self.score, "must be softmax, sigmoid or sqrtsoftplus", "Use one of them.")
        choices = self.num_experts
        fits = 1 <= self.top_groups <= self.num_groups
        self._check("topk_group", self.top_groups, fits, f"must lie in 1 to n_group = {self.num_groups}")
        if self.is_grouped:
            self._check("n_group", self.num_groups, self.num_experts % self.num_groups == 0, "must divide the experts")
            size = self.num_experts // self.num_groups
            self._check("n_group", self.num_groups, size >= 2, "must leave two experts in a group: two are scored")
            choices = self.top_groups * size
        fits = 1 <= self.top_k <= choices
        self._check("num_experts_per_tok", self.top_k, fits, f"must lie in 1 to {choices}, the experts to choose from")

    @property
    def is_grouped(self) -> bool:
        """Whether groups limit the choice: choosing all of them limits nothing."""
        return self.num_groups > 1 and self.top_groups != self.num_groups

    def _check(self, setting: str, value: int, holds: bool, rule: str) -> None:
        if not holds:
            raise InputError(
                setting,
                value,
                f"{rule} ({self.num_experts} experts)",
                "Use the config that the model was trained with.",
            )


@dataclass(frozen=True, slots=True)
class MoEDecoder:
    """A decoder with grouped-query attention whose layers have experts, or a dense MLP.

    Attributes:
        dense: everything but the experts.
        moe: the experts; None where no layer has any.
        layers: which layers have them.
        num_more_layers: layers stored behind the decoder's, for multi-token prediction.
    """

    dense: DenseConfig
    moe: MoEConfig | None
    layers: tuple[int, ...]
    num_more_layers: int = 0

    @property
    def more_layers(self) -> tuple[int, ...]:
        """Numbers of the layers for multi-token prediction, as stored."""
        return tuple(range(self.dense.num_layers, self.dense.num_layers + self.num_more_layers))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The other layers."""
        return tuple(layer for layer in range(self.dense.num_layers) if layer not in self.layers)
