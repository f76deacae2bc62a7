"""The command `miles-sync`: bench and verify.

miles-sync bench 8b --transport nccl ipc                 a model by name, on GPUs 0 and 1
miles-sync bench 30b-a3b --layers 2 --device cpu         a part of it, in host memory
miles-sync bench path/to/checkpoint --json               shapes of a checkpoint's files
miles-sync verify tiny-moe                               an engine of its own: are its live weights what was pushed?
miles-sync verify path/to/checkpoint --target http://127.0.0.1:30000        the same of a server that runs
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from miles_sync.bench.link import broadcast_rates, device_rates, host_rates, run_broadcast
from miles_sync.bench.measure import Case, Result, measure
from miles_sync.bench.process import run_engine
from miles_sync.bench.shapes import NAMED, tensors_of
from miles_sync.bench.verify import verify_case, verify_running
from miles_sync.channel import TOKEN_VARIABLE
from miles_sync.errors import SyncError
from miles_sync.manifest import TensorMeta
from miles_sync.transports.shm import available_bytes

_WAYS = {"cpu": ("arena", "shm", "gloo"), "cuda": ("nccl", "ipc")}
_COLUMNS = ("case", "first s", "steady s", "best s", "GB/s", "of the link", "live weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0; 1 where weights differ or a push fails; 2 for arguments that make no sense."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except ValueError as error:
        sys.stderr.write(f"miles-sync: {error}\n")
        return 2
    except SyncError as error:
        if getattr(args, "json", False):
            _say(json.dumps({"error": type(error).__name__, "text": str(error), "live_weights_equal": False}))
        sys.stderr.write(f"miles-sync: {type(error).__name__}: {error}\n")
        return 1


# -- bench ---------------------------------------------------------------------------------------------


def bench(args: argparse.Namespace) -> int:
    """Measure cases side by side, the raw link in the same run."""
    torch.set_num_threads(1)
    metas = tensors_of(args.model, args.layers)
    nbytes = sum(meta.nbytes for meta in metas)
    cases = _cases(args)
    _check_room(metas, args)
    found: Result = {"model": args.model, "layers": args.layers, "tensors": len(metas), "bytes": nbytes}
    found["link"] = _links(cases, nbytes, args.repeats)
    found["cases"] = {}
    failed = False
    for case in cases:
        try:
            result = measure(case, metas, args.repeats, lambda _: None)
            result["share_of_link"] = _share(case, result, found["link"])
        except SyncError as error:
            failed, result = True, {"error": f"{type(error).__name__}: {error}"}
        found["cases"][case.name] = result
        said = result.get("error") or f"{result['steady_s']:.4f} s, {result['share_of_link']:.0%} of the link"
        sys.stderr.write(f"{case.name}: {said}\n")
    _say(json.dumps(found, indent=1) if args.json else _table(found))
    return int(failed)


def _cases(args: argparse.Namespace) -> list[Case]:
    trainer, engine = _places(args)
    ways = args.transport or _WAYS[trainer.type]
    bucket = None if args.bucket_mib is None else args.bucket_mib << 20
    digests = (True, False) if args.no_digest else (True,)
    cases = [
        Case(way, mode, digest, trainer, engine, bucket, args.deadline_s)
        for way in ways
        for mode in args.mode
        for digest in digests
    ]
    for case in cases:
        if (case.transport in ("nccl", "ipc")) != (trainer.type == "cuda") and case.transport != "gloo":
            raise ValueError(f"transport {case.transport} is not for weights on {trainer.type}: use --device")
    return cases


def _places(args: argparse.Namespace) -> tuple[torch.device, torch.device]:
    """Where trainer and engine are."""
    if args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu"), torch.device("cpu")
    apart = torch.cuda.device_count() > 1 and not args.colocated
    return torch.device("cuda", 0), torch.device("cuda", int(apart))


def _check_room(metas: Sequence[TensorMeta], args: argparse.Namespace) -> None:
    if _places(args)[0].type == "cuda":
        return
    nbytes, free = sum(meta.nbytes for meta in metas), available_bytes()
    if 4 * nbytes > free:
        raise ValueError(
            f"{args.model} has {nbytes / 1e9:.1f} GB, held by trainer, segment and engine, staged twice there; "
            f"{free / 1e9:.1f} GB of memory are free: use --layers"
        )


def _links(cases: Sequence[Case], nbytes: int, repeats: int) -> Result:
    trainer, engine = cases[0].trainer, cases[0].engine
    if trainer.type == "cpu":
        return host_rates(nbytes, repeats)
    found: Result = device_rates(trainer, engine, 2048)
    if any(case.transport == "nccl" for case in cases):
        found["nccl_broadcast_gb_per_s"] = broadcast_rates((192, 2048))
    return found


def _share(case: Case, result: Result, link: Result) -> float:
    """What the raw link needs for these bytes, over what the push took.

    In host memory the link is one copy, and one read of all bytes where they are digested; between GPUs torch's
    broadcast for NCCL, a peer copy for IPC; on one GPU a copy.
    """
    nbytes = result["bytes"] / 1e9
    if case.trainer.type == "cpu":
        ideal = nbytes / link["memcpy_gb_per_s"] + (nbytes / link["read_gb_per_s"] if case.digest else 0.0)
    elif case.transport == "nccl":
        ideal = nbytes / max(link["nccl_broadcast_gb_per_s"].values())
    else:
        ideal = nbytes / link.get("peer_copy_2048_mib_gb_per_s", link["device_memcpy_2048_mib_gb_per_s"])
    return ideal / result["steady_s"]


def _table(found: Result) -> str:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for name, result in found["cases"].items():
        if "error" in result:
            rows.append((name, result["error"], *[""] * 5))
            continue
        times = (f"{result[key]:.4f}" for key in ("first_s", "steady_s", "best_s"))
        equal = {True: "equal", None: "not digested"}[result["live_weights_equal"]]
        rows.append((name, *times, f"{result['gb_per_s']:.2f}", f"{result['share_of_link']:.0%}", equal))
    head = f"{found['model']}: {found['tensors']} tensors, {found['bytes'] / 1e9:.2f} GB"
    return "\n".join([head, *(f"  {key}: {_short(value)}" for key, value in found["link"].items()), *_aligned(rows)])


# -- verify --------------------------------------------------------------------------------------------


def verify(args: argparse.Namespace) -> int:
    """Push, and compare digests and live weights."""
    torch.set_num_threads(1)
    if args.target:
        rows = [_verify_target(args, mode) for mode in args.mode]
    else:
        metas = tensors_of(args.model, args.layers)
        rows = [verify_case(case, metas) for case in _cases(args)]
    if args.json:
        _say(json.dumps(rows, indent=1))
        return 0
    columns = ("transport", "mode", "bytes", "digest")
    table = [(*columns, "live weights"), *((*(str(row[key]) for key in columns), "equal") for row in rows)]
    _say("\n".join(_aligned(table)))
    return 0


def _verify_target(args: argparse.Namespace, mode: Any) -> Result:
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ValueError(f"{TOKEN_VARIABLE} is not set: give the token that the receiver has")
    if not Path(args.model).is_dir():
        raise ValueError(f"--target needs a checkpoint's directory, not {args.model!r}: random weights would be served")
    if args.transport and (len(args.transport) > 1 or args.transport[0] == "arena"):
        raise ValueError(f"--target takes one --transport of auto, shm, gloo, nccl and ipc, not {args.transport}")
    return verify_running(
        args.target,
        Path(args.model),
        token=token,
        transport=args.transport[0] if args.transport else "auto",
        mode=mode,
        admin_api_key=args.admin_api_key,
        deadline_s=args.deadline_s,
    )


# -- arguments -----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "miles-sync", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{bench,verify}")
    for name, run, modes in (("bench", bench, ("in_place", "staged")), ("verify", verify, ("staged", "in_place"))):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        _add_case(command, modes)
    commands.choices["bench"].add_argument("--repeats", type=int, default=8, help="pushes after the first")
    commands.choices["verify"].add_argument("--target", help="host:port of a receiver, http://host:port of a server")
    commands.choices["verify"].add_argument("--admin-api-key", default=None, help="of the server")
    engine = commands.add_parser("engine")
    engine.add_argument("--device", type=torch.device, required=True)
    engine.set_defaults(run=lambda args: run_engine(args.device) or 0)
    link = commands.add_parser("link")
    link.add_argument("--rank", type=int, required=True)
    link.add_argument("--port", type=int, required=True)
    link.add_argument("--mib", type=int, nargs="+", required=True)
    link.set_defaults(run=lambda args: run_broadcast(args.rank, args.port, args.mib) or 0)
    return parser


def _add_case(command: argparse.ArgumentParser, modes: Sequence[str]) -> None:
    command.add_argument("model", nargs="?", default="tiny", help=f"{', '.join(NAMED)}, a config.json, or a checkpoint")
    command.add_argument("--layers", type=int, help="leave the model this many")
    command.add_argument("--transport", nargs="+", choices=("arena", "auto", "shm", "gloo", "nccl", "ipc"))
    command.add_argument("--mode", nargs="+", choices=("in_place", "staged"), default=modes)
    command.add_argument("--no-digest", action="store_true", help="each case once more without a digest")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--colocated", action="store_true", help="trainer and engine on one GPU")
    command.add_argument("--bucket-mib", type=int)
    command.add_argument("--deadline-s", type=float, default=60.0)
    command.add_argument("--json", action="store_true")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
