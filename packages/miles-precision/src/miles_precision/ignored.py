"""Names of the modules that a quantised checkpoint leaves alone, in the form that engines understand."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from miles_precision.errors import FormatError

FUSED_MODULES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
)
"""Layers that engines run as one: the name of the whole, and its members as checkpoints name them."""


def with_fused_modules(ignored: Iterable[str], fused: Mapping[str, Sequence[str]] = FUSED_MODULES) -> list[str]:
    """Complete a list of ignored modules, so that engines which ask for a fused layer find it by either name.

    Where all members of a fused layer are named, the whole is added; where the whole is named, its members are:

        ["l.q_proj", "l.k_proj", "l.v_proj", "lm_head"]  ->  the same and "l.qkv_proj"

    Name the linear layers themselves. A prefix such as `model.layers.1` means all of layer 1 to SGLang, and to
    transformers, which reads names as regular expressions, layers 10 to 19 as well.

    Args:
        ignored: Module names without `.weight`, such as `model.layers.0.self_attn.q_proj` or `lm_head`.
        fused: What the engine fuses. An architecture with others, or with a `q_proj` that stands alone (latent
            attention), passes its own.

    Returns:
        The names, sorted, each once.

    Raises:
        FormatError: Some but not all members of a fused layer are named: an engine holds it in one dtype.
    """
    names = set(ignored)
    whole_of = {member: whole for whole, members in fused.items() for member in members}
    for name in sorted(names):
        prefix, _, last = name.rpartition(".")
        dot = f"{prefix}." if prefix else ""
        whole = last if last in fused else whole_of.get(last)
        if whole is None:
            continue
        members = {f"{dot}{member}" for member in fused[whole]}
        if f"{dot}{whole}" not in names and (missing := members - names):
            raise FormatError(
                f"ignored modules name {name} but not {', '.join(sorted(missing))}: engines fuse them into "
                f"{dot}{whole}, which has one dtype; ignore all of them or none, or pass `fused` with what this model "
                "fuses"
            )
        names |= {f"{dot}{whole}", *members}
    return sorted(names)
