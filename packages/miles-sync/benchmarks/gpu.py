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
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from fused import SHAPES, FusedReceiver, Shapes, change, trainer_tensors

from miles_sync import ReceiverTarget, SyncError, WeightSync, serve
from miles_sync.digest import BLOCK_BYTES, Digest, Run, Runs
from miles_sync.sources import NamedTensors

TOKEN = "the token of this benchmark"
MIB = 1 << 20
READY_S = 120.0

Result = dict[str, Any]


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
    shapes = fitting(arm, options, result)
    trainer, engine = options.place(0), options.place(0 if arm.colocated else 1)
    tensors = trainer_tensors(shapes, trainer, seed=1)
    source = NamedTensors(tensors.items())
    result |= {"tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}
    with receiver(shapes, engine) as (port, memory):
        sync = WeightSync(
            [ReceiverTarget("127.0.0.1", port)],
            token=TOKEN,
            transport=transport_of(arm, options),
            mode=arm.mode,
            deadline_s=40.0,
            bucket_bytes=None if arm.bucket_mib is None else arm.bucket_mib * MIB,
        )
        with sync:
            reports, walls = [], []
            for version in range(options.repeats + 1):
                change(tensors, version)
                settle(trainer)
                start = time.perf_counter()
                report = sync.push(source, version)
                walls.append(time.perf_counter() - start)
                reports.append(report.as_dict())
                result["pushes"] = reports
                save()
            sync.check(options.repeats, str(reports[-1]["digest"]))
            result["live_weights_equal"] = True
        totals = [float(report["total_s"]) for report in reports]
        steady = totals[2:] or totals
        result |= {
            "first_s": totals[0],
            "second_s": totals[1] if len(totals) > 1 else None,
            "steady_s": statistics.median(steady),
            "best_s": min(steady),
            "wall_steady_s": statistics.median(walls[2:] or walls),
            "gb_per_s": result["bytes"] / statistics.median(steady) / 1e9,
            "engine_memory": memory(),
        }


def fault_arm(arm: Arm, options: Options, result: Result, save: Callable[[], None]) -> None:
    """Receivers that die or freeze in the middle of a transfer; then a fresh one."""
    shapes = fitting(arm, options, result)
    tensors = trainer_tensors(shapes, options.place(0), seed=1)
    source = NamedTensors(tensors.items())
    settings = {"token": TOKEN, "transport": transport_of(arm, options), "mode": arm.mode, "deadline_s": 8.0}
    for how in (signal.SIGKILL, signal.SIGSTOP):
        with receiver(shapes, options.place(1)) as (port, _), contextlib.ExitStack() as stack:
            sync = stack.enter_context(WeightSync([ReceiverTarget("127.0.0.1", port)], **settings))
            sync.push(source, 0)  # the first makes the connections
            base = sync.push(source, 1)
            change(tensors, 2)
            settle(options.place(0))
            pid = children[-1].pid
            timer = threading.Timer(0.4 * base.total_s, os.kill, (pid, how))
            timer.start()
            start = time.perf_counter()
            try:
                sync.push(source, 2)
                outcome = "no error"
            except SyncError as error:
                outcome = f"{type(error).__name__}: {error}"
            result[how.name] = {"error": outcome, "seconds": time.perf_counter() - start, "deadline_s": 8.0}
            save()
    with receiver(shapes, options.place(1)) as (port, _):
        with WeightSync([ReceiverTarget("127.0.0.1", port)], **settings) as sync:
            report = sync.push(source, 2)
            sync.check(2, report.digest)
        result["retry"] = {"total_s": report.total_s, "live_weights_equal": True}


def trainer_killed_arm(arm: Arm, options: Options, result: Result, save: Callable[[], None]) -> None:
    """A trainer that is killed in the middle of a transfer in place; the engine is dirty, the next trainer heals it."""
    shapes = fitting(arm, options, result)
    with receiver(shapes, options.place(1)) as (port, _):
        command = [sys.executable, __file__, "--doomed", str(port), "--model", result["model"], "--layers"]
        command += [str(shapes.layers), "--device", options.device, "--transport", transport_of(arm, options)]
        child = subprocess.run(command, timeout=80, check=False, capture_output=True, text=True)
        result["trainer_exit"] = child.returncode
        result["trainer_said"] = (child.stdout + child.stderr)[-2000:]
        save()
        tensors = trainer_tensors(shapes, options.place(0), seed=2)
        settings = {"token": TOKEN, "transport": transport_of(arm, options), "mode": arm.mode, "deadline_s": 20.0}
        with WeightSync([ReceiverTarget("127.0.0.1", port)], **settings) as sync:
            before = sync.status()[0]
            result["after_kill"] = {"version": before.version, "dirty": before.dirty}
            version = max(before.version or 0, 1) + 1
            report = sync.push(tensors, version)
            sync.check(version, report.digest)
            result["healed"] = not sync.status()[0].dirty


def doomed(args: argparse.Namespace) -> None:
    """The trainer that is killed."""
    shapes = resized(SHAPES[args.model], args.layers)
    options = Options(args.device, 1, False)
    tensors = trainer_tensors(shapes, options.place(0), seed=1)
    source = NamedTensors(tensors.items())
    target = ReceiverTarget("127.0.0.1", args.doomed)
    sync = WeightSync([target], token=TOKEN, transport=args.transport, mode="in_place", deadline_s=10.0)
    sync.push(source, 0)
    base = sync.push(source, 1)
    threading.Timer(0.4 * base.total_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for version in range(2, 1000):
        sync.push(source, version)


def link_arm(arm: Arm, options: Options, result: Result, save: Callable[[], None]) -> None:
    """What the hardware does: copies within and between devices, torch's own NCCL broadcast."""
    if options.device == "cpu":
        one, other = torch.zeros(256 * MIB, dtype=torch.uint8), torch.ones(256 * MIB, dtype=torch.uint8)
        result["memcpy_gb_per_s"] = rate(lambda: other.copy_(one), one.nbytes, options.place(0))
        return
    for mib in (192, 2048):
        one = torch.zeros(mib * MIB, dtype=torch.uint8, device="cuda:0")
        other = torch.empty_like(one)
        result[f"device_memcpy_{mib}_mib_gb_per_s"] = rate(functools.partial(other.copy_, one), one.nbytes, one.device)
        if torch.cuda.device_count() > 1:
            far = torch.empty_like(one, device="cuda:1")
            result[f"peer_copy_{mib}_mib_gb_per_s"] = rate(functools.partial(far.copy_, one), one.nbytes, one.device)
        save()
    if torch.cuda.device_count() > 1:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--link-rank", str(rank), "--port", str(port)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        children.extend(ranks)
        result["nccl_broadcast_gb_per_s"] = json.loads(ranks[0].communicate(timeout=60)[0].splitlines()[-1])
        ranks[1].wait(20)


def link_rank(args: argparse.Namespace) -> None:
    """One rank of torch's own broadcast, in processes that do nothing else."""
    import torch.distributed as dist  # noqa: PLC0415 - only here is there a default group

    torch.cuda.set_device(args.link_rank)
    dist.init_process_group("nccl", f"tcp://127.0.0.1:{args.port}", rank=args.link_rank, world_size=2)
    found = {}
    for mib in (16, 64, 128, 192, 256, 2048):
        data = torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")
        found[f"{mib}_mib"] = rate(functools.partial(dist.broadcast, data, 0), data.nbytes, data.device)
    if args.link_rank == 0:
        say(json.dumps(found))
    dist.destroy_process_group()


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
    Arm("30b-nccl-in_place", sync_arm, "30b", limit_s=120),
    Arm("30b-ipc-colocated-in_place", sync_arm, "30b", "ipc", colocated=True, limit_s=120, gpus=1),
    Arm("faults-nccl", fault_arm, "8b", limit_s=120),
    Arm("trainer-killed-nccl", trainer_killed_arm, "8b", limit_s=120),
    Arm("8b-nccl-64mib", sync_arm, "8b", bucket_mib=64),
    Arm("8b-nccl-128mib", sync_arm, "8b", bucket_mib=128),
    Arm("8b-nccl-240mib", sync_arm, "8b", bucket_mib=240),
    Arm("30b-ipc-in_place", sync_arm, "30b", "ipc", limit_s=120),
    Arm("8b-ipc-staged", sync_arm, "8b", "ipc", mode="staged"),
]


# -- what arms share -----------------------------------------------------------------------------------

children: list[subprocess.Popen[str]] = []


def transport_of(arm: Arm, options: Options) -> Any:
    """What stands in for it without a GPU."""
    return (
        {"nccl": "gloo", "ipc": "shm"}.get(arm.transport, arm.transport) if options.device == "cpu" else arm.transport
    )


def fitting(arm: Arm, options: Options, result: Result) -> Shapes:
    """The model, with fewer layers where it does not fit."""
    name = {"8b": "tiny", "30b": "tiny-moe"}[arm.model] if options.tiny else arm.model
    shapes = SHAPES[name]
    layers = shapes.layers
    if options.device != "cpu":
        copies = 2 if arm.colocated or arm.mode == "staged" else 1
        free = torch.cuda.mem_get_info(0)[0] - 6 * (1 << 30)
        while shapes.nbytes() * copies > free and shapes.layers > 1:
            shapes = resized(shapes, shapes.layers - 1)
    result |= {"model": name, "layers": shapes.layers, "layers_of_the_model": layers}
    return shapes


def resized(shapes: Shapes, layers: int) -> Shapes:
    """The same with another number of layers."""
    return Shapes(**{**vars(shapes), "layers": layers})


@contextlib.contextmanager
def receiver(shapes: Shapes, device: torch.device) -> Iterator[tuple[int, Callable[[], Result]]]:
    """An engine process: its port, and what its device memory did."""
    memory = Path(os.environ["MILES_SYNC_BENCH_DIR"]) / f"memory-{time.time_ns()}.json"
    command = [sys.executable, __file__, "--receive", json.dumps(vars(shapes)), "--device", str(device)]
    child = subprocess.Popen([*command, "--memory", str(memory)], stdout=subprocess.PIPE, text=True)
    children.append(child)
    try:
        timer = threading.Timer(READY_S, child.kill)
        timer.start()
        assert child.stdout is not None
        line = child.stdout.readline()
        timer.cancel()
        if not line.startswith("port "):
            raise RuntimeError(f"the receiver did not start: {line!r}")
        yield int(line.split()[1]), lambda: json.loads(memory.read_text()) if memory.exists() else {}
    finally:
        child.kill()
        child.wait(20)


def receive(args: argparse.Namespace) -> None:
    """The engine process."""
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    engine = FusedReceiver(Shapes(**json.loads(args.receive)), device)
    with serve(engine, token=TOKEN) as server:
        say(f"port {server.port}")
        if device.type != "cuda":
            server.wait()
        base = peak = 0
        while True:
            free, total = torch.cuda.mem_get_info(device)
            used = total - free
            if not base or used > peak:
                base, peak = base or used, max(peak, used)
                Path(args.memory).write_text(
                    json.dumps({"before_bytes": base, "peak_bytes": peak, "extra_bytes": peak - base})
                )
            time.sleep(0.01)


def settle(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(act: Callable[[], object], nbytes: int, device: torch.device) -> float:
    """Best of five, ten calls each, in GB/s."""
    calls = 10 if device.type == "cuda" else 1
    act()
    settle(device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            act()
        settle(device)
        best = min(best, time.perf_counter() - start)
    return calls * nbytes / best / 1e9


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
        for child in children:
            child.kill()


def main() -> None:
    """Run arms and write what they found."""
    args = parsed()
    if args.receive:
        return receive(args)
    if args.link_rank is not None:
        return link_rank(args)
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
        "MILES_SYNC_BENCH_DIR": str(scratch),
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
    for inner in ("--receive", "--arm", "--memory", "--model", "--transport"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    for inner in ("--link-rank", "--port", "--doomed", "--layers"):
        parser.add_argument(inner, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
