"""Weight sync on GPUs, beside the raw link of the same run. Writes one JSON file, after every arm.

    python packages/miles-sync/benchmarks/gpu.py --out results.json                 all arms that this machine can run
    python packages/miles-sync/benchmarks/gpu.py --arms link 8b-nccl-in_place       some of them
    python packages/miles-sync/benchmarks/gpu.py --device cpu                       the same code over gloo and shm

Every arm is a process of its own with a time limit; its traceback is part of the result. The trainer is on GPU 0,
the engine on GPU 1, or both on GPU 0 in the colocated arms. Times are from begin to commit acknowledged, digests
included; after the last push the engine's live parameters are read and compared with the digest of what was sent.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from miles_sync import ReceiverTarget, SyncError, TensorMeta, WeightSync
from miles_sync.bench.link import MIB, broadcast_rates, device_rates, host_rates, rate, settle
from miles_sync.bench.measure import Case, Result, measure
from miles_sync.bench.process import Engine, engine
from miles_sync.bench.shapes import NAMED, Decoder, change, random_tensors
from miles_sync.digest import BLOCK_BYTES, Digest, Run, Runs
from miles_sync.routes import Transport
from miles_sync.sources import NamedTensors

TOKEN = secrets.token_hex(16)


@dataclass(frozen=True)
class Arm:
    """One case. `bucket_mib` None is the default."""

    name: str
    run: Callable[[Arm, Options, Result, Callable[[], None]], None]
    model: str = ""
    transport: Literal["nccl", "ipc", "gloo", "shm"] = "nccl"
    mode: Literal["staged", "in_place"] = "in_place"
    colocated: bool = False
    bucket_mib: int | None = None
    limit_s: float = 90.0
    gpus: int = 2


@dataclass(frozen=True)
class Options:
    """What holds for all arms."""

    device: str
    repeats: int
    tiny: bool

    def place(self, index: int) -> torch.device:
        """Where trainer (0) or engine (1) has its weights."""
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", index)


# -- arms ----------------------------------------------------------------------------------------------


def sync_arm(arm: Arm, options: Options, result: Result, save: Callable[[], None]) -> None:
    """One engine, pushes one after the other."""
    metas = fitting(arm, options, result)
    case = Case(
        transport_of(arm, options),
        arm.mode,
        trainer=options.place(0),
        engine=options.place(0 if arm.colocated else 1),
        bucket_bytes=None if arm.bucket_mib is None else arm.bucket_mib * MIB,
    )

    def keep(found: Result) -> None:
        result.update(found)
        save()

    result |= measure(case, metas, options.repeats, keep)


def fault_arm(arm: Arm, options: Options, result: Result, save: Callable[[], None]) -> None:
    """Receivers that die or freeze in the middle of a transfer; then a fresh one."""
    metas = fitting(arm, options, result)
    tensors = random_tensors(metas, options.place(0), seed=1)
    source = NamedTensors(tensors.items())
    settings = {"token": TOKEN, "transport": transport_of(arm, options), "mode": arm.mode, "deadline_s": 8.0}
    for how in (signal.SIGKILL, signal.SIGSTOP):
        with started(metas, options.place(1)) as process, contextlib.ExitStack() as stack:
            sync = stack.enter_context(WeightSync([ReceiverTarget("127.0.0.1", process.port)], **settings))
            sync.push(source, 0)  # the first makes the connections
            base = sync.push(source, 1)
            change(tensors, 2)
            settle(options.place(0))
            timer = threading.Timer(0.4 * base.total_s, os.kill, (process.pid, how))
            timer.start()
            start = time.perf_counter()
            try:
                sync.push(source, 2)
                outcome = "no error"
            except SyncError as error:
                outcome = f"{type(error).__name__}: {error}"
            result[how.name] = {"error": outcome, "seconds": time.perf_counter() - start, "deadline_s": 8.0}
            save()
    with started(metas, options.place(1)) as process:
        with WeightSync([ReceiverTarget("127.0.0.1", process.port)], **settings) as sync:
            report = sync.push(source, 2)
            sync.check(2, report.digest)
        result["retry"] = {"total_s": report.total_s, "live_weights_equal": True}


def trainer_killed_arm(arm: Arm, options: Options, result: Result, save: Callable[[], None]) -> None:
    """A trainer that is killed in the middle of a transfer in place; the engine is dirty, the next trainer heals it."""
    metas = fitting(arm, options, result)
    with started(metas, options.place(1)) as process:
        command = [sys.executable, __file__, "--doomed", str(process.port), "--model", result["model"], "--layers"]
        command += [str(result["layers"]), "--device", options.device, "--transport", transport_of(arm, options)]
        environment = {**os.environ, _TOKEN_VARIABLE: TOKEN}
        child = subprocess.run(command, timeout=80, check=False, capture_output=True, text=True, env=environment)
        result["trainer_exit"] = child.returncode
        result["trainer_said"] = (child.stdout + child.stderr)[-2000:]
        save()
        tensors = random_tensors(metas, options.place(0), seed=2)
        settings = {"token": TOKEN, "transport": transport_of(arm, options), "mode": arm.mode, "deadline_s": 20.0}
        with WeightSync([ReceiverTarget("127.0.0.1", process.port)], **settings) as sync:
            before = sync.status()[0]
            result["after_kill"] = {"version": before.version, "dirty": before.dirty}
            version = max(before.version or 0, 1) + 1
            report = sync.push(tensors, version)
            sync.check(version, report.digest)
            result["healed"] = not sync.status()[0].dirty


def doomed(args: argparse.Namespace) -> None:
    """The trainer that is killed."""
    metas = replace(NAMED[args.model], layers=args.layers).tensors()
    options = Options(args.device, 1, False)
    tensors = random_tensors(metas, options.place(0), seed=1)
    source = NamedTensors(tensors.items())
    target = ReceiverTarget("127.0.0.1", args.doomed)
    sync = WeightSync(
        [target], token=os.environ[_TOKEN_VARIABLE], transport=args.transport, mode="in_place", deadline_s=10.0
    )
    sync.push(source, 0)
    base = sync.push(source, 1)
    threading.Timer(0.4 * base.total_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for version in range(2, 1000):
        sync.push(source, version)


def link_arm(arm: Arm, options: Options, result: Result, save: Callable[[], None]) -> None:
    """What the hardware does: copies within and between devices, torch's own NCCL broadcast."""
    if options.device == "cpu":
        result |= host_rates(256 * MIB, 5)
        return
    several = torch.cuda.device_count() > 1
    for mib in (192, 2048):
        result |= device_rates(options.place(0), options.place(int(several)), mib)
        save()
    if several:
        result["nccl_broadcast_gb_per_s"] = broadcast_rates((16, 64, 128, 192, 256, 2048))


def digest_arm(arm: Arm, options: Options, result: Result, save: Callable[[], None]) -> None:
    """The kernel against the reference, bit by bit, and its speed."""
    device = options.place(0)
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 7, 8, 803, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 9, 5 * BLOCK_BYTES + 12345]
    offset, host, far = 0, Digest(), Digest()
    for size in sizes:
        data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        host.update([Run(offset, data)])
        far.update([Run(offset, data.to(device))])
        offset += -(-size // 64) * 64
    result["equal_to_the_reference"] = host.hexdigest("x") == far.hexdigest("x")
    save()
    for count, size in ((1, 2048 * MIB), (1000, 3 * MIB)):
        if device.type == "cpu":
            count, size = min(count, 8), min(size, 16 * MIB)
        flat = torch.zeros(count * size, dtype=torch.uint8, device=device)
        runs = Runs(Run(index * size, flat[index * size : (index + 1) * size]) for index in range(count))
        digest = Digest()
        result[f"{count}_tensors_gb_per_s"] = rate(functools.partial(digest.update, runs), count * size, device)


ARMS = [
    Arm("digest", digest_arm, limit_s=90, gpus=1),
    Arm("link", link_arm, limit_s=120, gpus=1),
    Arm("8b-nccl-in_place", sync_arm, "8b"),
    Arm("8b-nccl-staged", sync_arm, "8b", mode="staged"),
    Arm("8b-ipc-in_place", sync_arm, "8b", "ipc"),
    Arm("8b-ipc-colocated-in_place", sync_arm, "8b", "ipc", colocated=True, gpus=1),
    Arm("30b-nccl-in_place", sync_arm, "30b-a3b", limit_s=120),
    Arm("30b-ipc-colocated-in_place", sync_arm, "30b-a3b", "ipc", colocated=True, limit_s=120, gpus=1),
    Arm("faults-nccl", fault_arm, "8b", limit_s=120),
    Arm("trainer-killed-nccl", trainer_killed_arm, "8b", limit_s=120),
    Arm("8b-nccl-64mib", sync_arm, "8b", bucket_mib=64),
    Arm("8b-nccl-128mib", sync_arm, "8b", bucket_mib=128),
    Arm("8b-nccl-240mib", sync_arm, "8b", bucket_mib=240),
    Arm("30b-ipc-in_place", sync_arm, "30b-a3b", "ipc", limit_s=120),
    Arm("8b-ipc-staged", sync_arm, "8b", "ipc", mode="staged"),
]


# -- what arms share -----------------------------------------------------------------------------------

_TOKEN_VARIABLE = "MILES_SYNC_BENCH_TOKEN"


def transport_of(arm: Arm, options: Options) -> Transport:
    """What stands in for it without a GPU."""
    if options.device != "cpu":
        return arm.transport
    return "gloo" if arm.transport in ("nccl", "gloo") else "shm"


def fitting(arm: Arm, options: Options, result: Result) -> list[TensorMeta]:
    """The model's tensors, of fewer layers where it does not fit."""
    name = {"8b": "tiny", "30b-a3b": "tiny-moe"}[arm.model] if options.tiny else arm.model
    decoder = NAMED[name]
    layers = decoder.layers
    if options.device != "cpu":
        copies = 2 if arm.colocated or arm.mode == "staged" else 1
        free = torch.cuda.mem_get_info(0)[0] - 6 * (1 << 30)
        while nbytes(decoder) * copies > free and decoder.layers > 1:
            decoder = replace(decoder, layers=decoder.layers - 1)
    result |= {"model": name, "layers": decoder.layers, "layers_of_the_model": layers}
    return decoder.tensors()


def nbytes(decoder: Decoder) -> int:
    """Of its tensors."""
    return sum(meta.nbytes for meta in decoder.tensors())


def started(metas: list[TensorMeta], device: torch.device) -> contextlib.AbstractContextManager[Engine]:
    """An engine process."""
    return engine(metas, device, TOKEN)


def say(text: str) -> None:
    """To whoever started this process."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# -- running -------------------------------------------------------------------------------------------


def versions() -> Result:
    """What this ran on."""
    found: Result = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    with contextlib.suppress(ImportError):
        import triton  # noqa: PLC0415 - not there without a device

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        from miles_sync.transports import libnccl  # noqa: PLC0415 - as above

        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["nccl"] = libnccl.version()
    return found


def run_arm(args: argparse.Namespace) -> None:
    """One arm, in its own process; the result is written as it grows."""
    arm = next(arm for arm in ARMS if arm.name == args.arm)
    result: Result = {}
    path = Path(args.out)

    def save() -> None:
        path.write_text(json.dumps(result))

    try:
        if args.device != "cpu":
            torch.cuda.set_device(0)
        arm.run(arm, Options(args.device, args.repeats, args.tiny), result, save)
    except BaseException:
        result["traceback"] = traceback.format_exc()
        raise
    finally:
        save()


def main() -> None:
    """Run arms and write what they found."""
    args = parsed()
    if args.doomed:
        return doomed(args)
    if args.arm:
        return run_arm(args)
    found: Result = {"arms": {}}
    gpus = torch.cuda.device_count() if args.device != "cpu" else 2
    wanted = [arm for arm in ARMS if (not args.arms or arm.name in args.arms) and arm.gpus <= gpus]
    path = Path(args.out)
    scratch = path.with_suffix(".parts")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        found["versions"] = versions()
    except Exception:  # noqa: BLE001 - the arms may still run
        found["versions"] = traceback.format_exc()
    start = time.monotonic()
    for arm in wanted:
        if time.monotonic() - start > args.budget_s:
            found["arms"][arm.name] = {"skipped": f"the budget of {args.budget_s:g} s was spent"}
            continue
        found["arms"][arm.name] = one_arm(arm, args, scratch)
        path.write_text(json.dumps(found, indent=1))
        short = {key: value for key, value in found["arms"][arm.name].items() if key not in ("pushes", "log")}
        say(f"{arm.name}: {json.dumps(short)[:1500]}")
    path.write_text(json.dumps(found, indent=1))
    return None


def one_arm(arm: Arm, args: argparse.Namespace, scratch: Path) -> Result:
    """Run an arm's process, end it and all that it started, and read what it wrote."""
    out, log = scratch / f"{arm.name}.json", scratch / f"{arm.name}.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--arm", arm.name, "--out", str(out), "--repeats", str(args.repeats)]
    command += ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    # Without multicast, as these machines are set; and memory that another process can map.
    environment = {
        **os.environ,
        "NCCL_NVLS_ENABLE": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    start = time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(arm.limit_s)
        ended = child.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the session is its own
        child.wait()
    try:
        result: Result = json.loads(out.read_text())
    except (OSError, ValueError):
        result = {}
    result |= {"exit": ended if ended is not None else f"killed after {arm.limit_s:g} s"}
    result["arm_s"] = time.monotonic() - start
    if ended != 0:
        result["log"] = log.read_text()[-6000:]
    return result


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu-results.json")
    parser.add_argument("--arms", nargs="*", choices=[arm.name for arm in ARMS])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--device", default="cuda", help='"cpu" tries the script without a GPU')
    parser.add_argument("--tiny", action="store_true", help="models of a few MB")
    parser.add_argument("--budget-s", type=float, default=460.0, help="no arm is started later")
    for inner in ("--arm", "--model", "--transport"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    for inner in ("--doomed", "--layers"):
        parser.add_argument(inner, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
