"""`miles verify`: any model directory, as transformers computes it and as the trainer does.

    reference (one process)   load with transformers ▸ logits ▸ gradients ▸ to files, and gone
    ranks                     load with miles-train ▸ logits ▸ gradients ▸ export ▸ each held against the files

Memory: the two never run at once. Disk (TMPDIR): the gradients in float32, and the export.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as Terminal
from rich.table import Column, Table

from miles_core import InputError
from miles_core.config import ModelSection, TrainSection
from miles_launch.loading import decode_fp8
from miles_launch.short_ranks import run_ranks
from miles_launch.tool_settings import probe_of, tool_recipe
from miles_train.megatron.layout import check_layout

if TYPE_CHECKING:
    from miles_train.megatron.runtime import Address
    from miles_train.model_dir import ModelDirectory

_WORST = 5  # gradients shown


def verify(path: Path, overrides: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Compare.

    Args:
        path: a Hugging Face directory.
        overrides: of `--set`: layout, family.
        say: told what begins.

    Returns:
        The report, JSON-able; "holds" says whether all bounds are kept and the export gave back every tensor.

    Raises:
        InputError: the directory or a setting is wrong, or transformers cannot load the model.
        MilesError: a rank failed.
    """
    recipe = tool_recipe(path, overrides)
    train, model = recipe.train, recipe.model
    _refuse_what_transformers_lacks(train)
    directory = _checked(path, model)
    check_layout(train.megatron, train.num_ranks, directory.config)
    probe = {"path": str(path.resolve()), **probe_of(path)}
    with tempfile.TemporaryDirectory(prefix="miles-verify-") as folder:
        _check_room(Path(folder), directory)
        common = {**probe, "folder": folder}
        say("computing with transformers")
        run_ranks(f"{__name__}:reference_rank", common, 1, Path(folder, "reference-log"))
        say(f"computing with miles-train on {train.num_ranks} rank{'s' * (train.num_ranks > 1)}")
        request = {
            **common,
            "megatron": dict(train.megatron),
            "family": model.family,
            "micro_batch_tokens": train.micro_batch_tokens,
        }
        found = run_ranks(f"{__name__}:trainer_rank", request, train.num_ranks, Path(folder, "ranks-log"))
        summary = json.loads(Path(folder, "reference.json").read_text(encoding="utf-8"))
    return _report(directory, train, probe, summary, found)


def reference_rank(_: "Address", *, path: str, vocab_size: int, longest: int, folder: str) -> None:
    """What the reference's process does."""
    from transformers.utils import logging  # noqa: PLC0415 (seconds, in this process alone)

    from miles_train.comparison import probe_batch  # noqa: PLC0415
    from miles_train.reference import write_reference  # noqa: PLC0415

    logging.disable_progress_bar()
    write_reference(path, probe_batch(vocab_size, longest), Path(folder))


def trainer_rank(
    address: "Address",
    *,
    path: str,
    vocab_size: int,
    longest: int,
    folder: str,
    megatron: Mapping[str, Any],
    family: str | None,
    micro_batch_tokens: int,
) -> dict[str, Any]:
    """What each of the trainer's processes does."""
    from miles_train.comparison import probe_batch  # noqa: PLC0415 (torch)
    from miles_train.megatron.verify import verify_rank  # noqa: PLC0415 (Megatron)

    found = verify_rank(
        path,
        megatron,
        Path(folder),
        probe_batch(vocab_size, longest),
        address=address,
        family=family,
        decode=decode_fp8,
        micro_batch_tokens=micro_batch_tokens,
    )
    gaps = {kind: [{**asdict(gap), "holds": gap.holds} for gap in getattr(found, kind)] for kind in _KINDS}
    return {**asdict(found), **gaps, "export": {**asdict(found.export), "holds": found.export.holds}}


_KINDS = ("logits", "gradients")


def _refuse_what_transformers_lacks(train: TrainSection) -> None:
    for key, rule in (
        ("bf16", "float32 is compared: rounding to bfloat16 would hide what differs"),
        ("mtp_loss_scaling_factor", "transformers drops layers for multi-token prediction"),
    ):
        if train.megatron.get(key):
            raise InputError(f"train.megatron.{key}", train.megatron[key], rule, "Remove the key.")


def _checked(path: Path, model: ModelSection) -> "ModelDirectory":
    """The directory; that of a family of the trainer's own with every tensor accounted for, before a process starts."""
    from miles_train.megatron.families import check_name  # noqa: PLC0415 (torch)
    from miles_train.megatron.weights import table_for  # noqa: PLC0415
    from miles_train.model_dir import open_model_directory  # noqa: PLC0415

    directory = open_model_directory(path)
    if model.family is None:
        table_for(directory)
    else:
        check_name(model.family)
    return directory


def _check_room(folder: Path, directory: "ModelDirectory") -> None:
    """Gradients and export in float32, both."""
    needed = 8 * sum(tensor.nbytes // tensor.torch_dtype.itemsize for tensor in directory.tensors.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"disk of {folder.parent}",
            f"{free / 1e9:.1f} GB free",
            f"gradients and export of this model need {needed / 1e9:.1f} GB",
            "Set TMPDIR to a folder with room.",
        )


def _report(
    directory: "ModelDirectory",
    train: TrainSection,
    probe: Mapping[str, Any],
    reference: Mapping[str, Any],
    found: dict[str, Any],
) -> dict[str, Any]:
    stored = sum(tensor.nbytes for tensor in directory.tensors.values())
    times = ("load_s", "load_bytes", "export_s", "export_bytes", "peak_bytes")
    holds = all(gap["holds"] for kind in _KINDS for gap in found[kind])
    return {
        "path": probe["path"],
        "architecture": directory.architecture,
        "num_ranks": train.num_ranks,
        "megatron": {key: value for key, value in train.megatron.items() if key != "lr"},
        "reference": {**reference},
        "stored_bytes": stored,
        **{kind: found[kind] for kind in _KINDS},
        "without_gradient": found["without_gradient"],
        "export": found["export"],
        "rank_0": {name: found[name] for name in times},
        "holds": holds and not found["without_gradient"] and found["export"]["holds"],
    }


def print_report(report: Mapping[str, Any], terminal: Terminal) -> None:
    """Write the report as tables."""
    layout = ", ".join(f"{key} = {value}" for key, value in report["megatron"].items()) or "no layout set"
    reference = report["reference"]
    terminal.print(f"[bold]{report['architecture']}[/] in {report['path']}, {report['num_ranks']} rank(s), {layout}")
    terminal.print(f"beside {reference['class']} of transformers {reference['version']}, float32, eager")
    table = Table("", "difference", "at most", Column("where", overflow="fold"))
    table.add_row(*_worst("logits", report["logits"]))
    for gap in _by_size(report["gradients"])[:_WORST]:
        table.add_row(*_worst("gradient", [gap]))
    terminal.print(table)
    gaps = report["gradients"]
    outside = [gap for gap in gaps if not gap["holds"]]
    absolute = [gap for gap in gaps if gap["kind"] == "absolute"]
    terminal.print(
        f"gradients: {len(gaps)} tensors, {len(outside)} beyond their bound; {len(absolute)} are 0 in the reference "
        "but for rounding (frozen, or of no effect) and held against the norm of all gradients"
    )
    if report["without_gradient"]:
        terminal.print(f"[red]a gradient on one side alone:[/] {_some(report['without_gradient'])}")
    if reference["unused"]:
        terminal.print(f"not used by transformers, so passed through unseen: {_some(reference['unused'])}")
    _print_export(report["export"], terminal)
    _print_costs(report, terminal)
    terminal.print("[green]agrees[/]" if report["holds"] else "[red]does not agree[/]")


def _print_export(export: Mapping[str, Any], terminal: Terminal) -> None:
    compared = f"export: {export['num_tensors']} tensors compared"
    terminal.print(f"{compared}, all equal" if export["holds"] else f"[red]{compared}[/]")
    for what, names in (
        ("tensors whose numbers changed", export["changed"]),
        ("tensors missing", export["missing"]),
        ("tensors that were not there", export["extra"]),
        ("files not copied", export["files_missing"]),
        ("dtypes (the trainer's own; numbers the same)", [f"{key}: {n}" for key, n in export["dtypes"].items()]),
        ("config.json", [f"{key}: {old!r} > {new!r}" for key, (old, new) in export["config"].items()]),
        ("FP8 tensors decoded", [str(export["decoded"])] if export["decoded"] else []),
    ):
        if names:
            terminal.print(f"  {what}: {_some(names)}", markup=False)


def _print_costs(report: Mapping[str, Any], terminal: Terminal) -> None:
    costs = report["rank_0"]
    table = Table("", "GB", "seconds", "peak memory, GB")
    reference = report["reference"]
    table.add_row("transformers", _gb(report["stored_bytes"]), _s(reference["seconds"]), _gb(reference["peak_bytes"]))
    table.add_row("build and load, rank 0", _gb(costs["load_bytes"]), _s(costs["load_s"]), _gb(costs["peak_bytes"]))
    table.add_row("export and read back", _gb(costs["export_bytes"]), _s(costs["export_s"]), "")
    terminal.print(table)


def _worst(what: str, gaps: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, str]:
    worst = _by_size(gaps)[0]
    color = "green" if worst["holds"] else "red"
    absolute = " of all" if worst["kind"] == "absolute" else ""
    return what, f"[{color}]{worst['value']:.1e}[/]{absolute}", f"{worst['bound']:.0e}", worst["name"]


def _by_size(gaps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those nearest to their bound, or beyond it, first; NaN before all."""
    return sorted(gaps, key=lambda gap: (gap["value"] != gap["value"], gap["value"] / gap["bound"]), reverse=True)


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g}"


def _s(seconds: float) -> str:
    return f"{seconds:.1f}"
