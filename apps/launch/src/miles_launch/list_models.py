"""`miles models`: what can be trained, and how, asked of the families themselves."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console as Terminal
from rich.table import Column, Table

_HEADS = ("ForCausalLM", "ForConditionalGeneration")


def list_models() -> list[dict[str, Any]]:
    """Every architecture with what its family supports, JSON-able.

    Configs are those of transformers' classes, as large as the models: nothing is built of them. An architecture that
    transformers does not have is asked about by the config of another one of its family.
    """
    from miles_train.megatron.specs import SPECS, spec_for  # noqa: PLC0415 (Megatron)
    from miles_train.megatron.support import support_of  # noqa: PLC0415
    from miles_train.tensor_files import DTYPES  # noqa: PLC0415 (torch)

    configs = {name: _default_config(name) for name in SPECS}
    stored = sorted(
        str(dtype).removeprefix("torch.")
        for dtype in DTYPES.values()
        if dtype.is_floating_point and dtype.itemsize in (2, 4)
    )
    known: dict[int, dict[str, Any]] = {}
    families = []
    for name in sorted(SPECS):
        spec = SPECS[name]
        if id(spec) not in known:
            like = next(other for other in SPECS if SPECS[other] is spec and configs[other] is not None)
            known[id(spec)] = asdict(support_of(spec, configs[like] or {}))
        try:
            more = spec_for(name, predicts_more=True) is not None
        except KeyError:
            more = False
        families.append(
            {
                "architecture": name,
                "in_transformers": configs[name] is not None,
                **known[id(spec)],
                "multi_token_prediction": None if more else "its layers are not trained",
                "lora": None
                if importlib.util.find_spec("miles_lora.megatron")
                else "miles-lora has no Megatron layers",
                "stored": stored,
            }
        )
    return families


def _default_config(architecture: str) -> dict[str, Any] | None:
    """config.json as the class in transformers makes it; None if there is no such class."""
    from transformers.models.auto import configuration_auto  # noqa: PLC0415 (seconds)

    stem = next((architecture.removesuffix(head) for head in _HEADS if architecture.endswith(head)), architecture)
    names = configuration_auto.CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]  # in no __all__
    by_class = {name: model_type for model_type, name in names.items()}
    # A model with a vision tower keeps the plain name; its text model's config has one of its own.
    for name in (f"{stem}TextConfig", f"{stem}Config") if architecture.endswith(_HEADS[0]) else (f"{stem}Config",):
        if name in by_class:
            return configuration_auto.AutoConfig.for_model(by_class[name]).to_dict()
    return None


def print_models(families: Sequence[Mapping[str, Any]], terminal: Terminal) -> None:
    """Write a table, and below it the reason of every no."""
    others = {"packing": "packing", "routing_replay": "replay", "lora": "LoRA", "multi_token_prediction": "MTP"}
    reasons: dict[str, list[str]] = {}
    table = Table(Column("architecture", no_wrap=True), "layouts", "precisions", "also")
    for family in families:
        also = {title: family[key] for key, title in others.items()}
        cells = []
        for column in (family["layouts"], family["precisions"], also):
            cells.append(" ".join(title for title, reason in column.items() if reason is None))
            for title, reason in column.items():
                if reason is not None:
                    reasons.setdefault(f"no {title}: {reason}", []).append(family["architecture"])
        table.add_row(family["architecture"], *cells)
    terminal.print(table)
    for reason, names in reasons.items():
        who = "all" if len(names) == len(families) else ", ".join(names)
        terminal.print(f"{reason} ({who})", markup=False, highlight=False, soft_wrap=True)
    terminal.print(f"reads {', '.join(families[0]['stored'])}, and FP8 with a factor for each block", soft_wrap=True)
    terminal.print("a family of your own: [model] family in a recipe, see the README of miles-train", markup=False)
