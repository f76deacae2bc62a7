"""`miles export`: a checkpoint of the trainer becomes a Hugging Face directory, in as few ranks as its layout takes."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console as Terminal

from miles_core import InputError, Recipe, load_recipe
from miles_launch.loading import decode_fp8
from miles_launch.short_ranks import run_ranks
from miles_launch.tool_settings import probe_of, tool_recipe
from miles_train.checkpoint_header import read_header

if TYPE_CHECKING:
    from miles_train.megatron.runtime import Address
    from miles_train.megatron.trainer import MegatronTrainer

LOGPROBS = 1e-5  # what two layouts of ranks may differ by; the same layout, as here, computes the same


def export(
    source: Path, out: Path, overrides: Sequence[str], model: Path | None, *, verify: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write a directory.

    Args:
        source: the folder of a run, of its checkpoints (the one that `latest` names is taken), or of one checkpoint.
        out: the directory to make; an older export there is replaced.
        overrides: of `--set`: the layout, where the run's own does not fit this machine.
        model: the directory that the run started from; None for what the run's recipe says.
        verify: load what was written again, and compare logprobs with the trainer's.
        say: told what begins.

    Returns:
        The report, JSON-able; "holds" is False where logprobs differ.

    Raises:
        InputError: a folder or setting is wrong.
        MilesError: a rank failed, or the checkpoint does not fit the model.
    """
    run = next((folder for folder in (source, *source.resolve().parents) if (folder / "recipe.toml").is_file()), None)
    recipe = None if run is None else load_recipe(run / "recipe.toml")
    header = read_header(source / "checkpoints" if source == run else source)
    path = _model(source, model, recipe)
    settings = tool_recipe(
        path,
        overrides,
        {} if recipe is None else recipe.train.megatron,
        None if recipe is None else recipe.model.family,
    )
    request = {
        "megatron": dict(settings.train.megatron),
        "family": settings.model.family,
        "micro_batch_tokens": settings.train.micro_batch_tokens,
        **probe_of(path),
    }
    with tempfile.TemporaryDirectory(prefix="miles-export-") as folder:
        before, after = Path(folder, "trainer.npy"), Path(folder, "export.npy")
        wrote = {**request, "path": str(path), "checkpoint": str(header.folder.resolve()), "out": str(out.resolve())}
        wrote["logprobs"] = str(before) if verify else None
        say(f"loading {header.folder} and exporting")
        report = run_ranks(f"{__name__}:export_rank", wrote, settings.train.num_ranks, Path(folder, "export"))
        report |= {"checkpoint": str(header.folder), "out": str(out), "num_ranks": settings.train.num_ranks}
        if not verify:
            return {**report, "holds": True}
        say(f"loading {out} and comparing")
        read = {**request, "path": str(out.resolve()), "logprobs": str(after)}
        run_ranks(f"{__name__}:logprobs_rank", read, settings.train.num_ranks, Path(folder, "verify"))
        ours, again = np.load(before), np.load(after)
    gap = float(np.abs(ours - again).max())
    return {**report, "max_logprob_gap": gap, "num_tokens": len(ours), "holds": gap <= LOGPROBS}


def export_rank(
    address: "Address", *, path: str, checkpoint: str, out: str, logprobs: str | None, **settings: Any
) -> dict[str, Any]:
    """What each process does that exports."""
    trainer, batch = _trainer(address, path, settings)
    started = time.perf_counter()
    state = trainer.load(checkpoint)
    loaded = time.perf_counter()
    if logprobs is not None:
        _keep(address, logprobs, trainer.logprobs(batch))
    computed = time.perf_counter()
    trainer.export(out)
    exported = time.perf_counter()
    trainer.close()
    return {"state": state, "load_s": loaded - started, "export_s": exported - computed, "bytes": _bytes_of(Path(out))}


def logprobs_rank(address: "Address", *, path: str, logprobs: str, **settings: Any) -> None:
    """What each process does that reads the export back."""
    trainer, batch = _trainer(address, path, settings)
    _keep(address, logprobs, trainer.logprobs(batch))
    trainer.close()


def _trainer(address: "Address", path: str, settings: Mapping[str, Any]) -> "tuple[MegatronTrainer, Any]":
    from miles_train.comparison import negative_log_likelihood, probe_batch  # noqa: PLC0415 (torch)
    from miles_train.megatron.trainer import MegatronTrainer  # noqa: PLC0415 (Megatron)

    trainer = MegatronTrainer(
        path,
        settings["megatron"],
        negative_log_likelihood,
        address=address,
        family=settings["family"],
        micro_batch_tokens=settings["micro_batch_tokens"],
        decode=decode_fp8,
    )
    return trainer, probe_batch(settings["vocab_size"], settings["longest"])


def _keep(address: "Address", file: str, logprobs: Any) -> None:
    if address.rank == 0:
        np.save(file, logprobs)


def _bytes_of(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def _model(source: Path, model: Path | None, recipe: Recipe | None) -> Path:
    if model is not None:
        return model.resolve()
    if recipe is None:
        raise InputError(
            "checkpoint",
            str(source),
            "does not lie in the folder of a run, whose recipe.toml says which model it belongs to",
            "Add --model HF_DIR, the directory that training started from.",
        )
    path = Path(recipe.model.path).resolve()
    if not path.is_dir():
        rule = "the run's recipe names it, and there is no such directory from here"
        raise InputError("model.path", recipe.model.path, rule, "Add --model HF_DIR, where it lies now.")
    return path


def print_report(report: Mapping[str, Any], terminal: Terminal) -> None:
    """Say what was written."""
    rate = report["bytes"] / max(report["export_s"], 1e-9) / 1e9
    terminal.print(
        f"{report['checkpoint']} > {report['out']}: {report['bytes'] / 1e9:.3g} GB in {report['export_s']:.1f} s "
        f"({rate:.2g} GB/s, read back), checkpoint loaded in {report['load_s']:.1f} s, {report['num_ranks']} rank(s)",
        soft_wrap=True,
    )
    if "max_logprob_gap" in report:
        color = "green" if report["holds"] else "red"
        terminal.print(
            f"[{color}]read again by a new trainer: logprobs of {report['num_tokens']} tokens differ by at most "
            f"{report['max_logprob_gap']:.1e}[/] (bound {LOGPROBS:.0e})",
            soft_wrap=True,
        )
