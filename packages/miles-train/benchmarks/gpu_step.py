"""Times and checks the trainer on one GPU, beside stock Megatron and Transformer Engine in the same run.

    python3 packages/miles-train/benchmarks/gpu_step.py --out DIR [--arms gemm correct ...] [--seconds 450]

Every arm appends one JSON object to DIR/results.jsonl as soon as it ends; profiles lie beside it as text. Arms run one
after the other in one child process. An arm that takes longer than its limit, or takes the process down, is recorded
and the others go on in a new process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Seconds each arm may take, in the order they run.
LIMITS = {
    "gemm": 60,
    "correct": 110,
    "ours-0.6b": 110,
    "stock-0.6b": 90,
    "correct-moe": 80,
    "ours-30b-a3b": 110,
    "ours-8b": 130,
    "padded-0.6b": 60,
}
# The first arm of a process pays for the imports.
START_S = 90


def main() -> None:
    """Run the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="*", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--seconds", type=float, default=450, help="start no arm, and let none go on, after these")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script itself")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        from gpu_arms import run_arms  # noqa: PLC0415  # the parent imports nothing heavy

        run_arms(options.arms, options.out, tiny=options.tiny)
        return
    deadline = time.monotonic() + options.seconds
    waiting = [arm for arm in LIMITS if arm in options.arms]
    while waiting and time.monotonic() < deadline:
        waiting = watch(waiting, options, deadline)
    for arm in waiting:
        record(options.out, {"arm": arm, "error": "no time was left"})


def watch(arms: list[str], options: argparse.Namespace, deadline: float) -> list[str]:
    """Run arms in one process until they are through or one fails; those that are left."""
    results = options.out / "results.jsonl"
    done_before = len(results.read_text().splitlines()) if results.exists() else 0
    command = [sys.executable, __file__, "--child", "--out", str(options.out), "--arms", *arms]
    if options.tiny:
        command.append("--tiny")
    child = subprocess.Popen(command, env=environment())
    finished, since = 0, time.monotonic() + START_S
    while True:
        code = child.poll()
        lines = results.read_text().splitlines()[done_before:] if results.exists() else []
        if len(lines) > finished:
            finished, since = len(lines), time.monotonic()
        if code is not None:
            if finished < len(arms):
                record(options.out, {"arm": arms[finished], "error": f"the process ended with {code}"})
                finished += 1
            return arms[finished:]
        if time.monotonic() > min(since + LIMITS[arms[min(finished, len(arms) - 1)]], deadline):
            child.kill()
            child.wait()
            if finished < len(arms):
                record(options.out, {"arm": arms[finished], "error": "it took too long"})
            return arms[finished + 1 :]
        time.sleep(0.2)


def environment() -> dict[str, str]:
    """Of the child."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        # A handful of small fused functions: starting a pool of compilers takes longer than compiling them.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def record(folder: Path, result: dict[str, object]) -> None:
    """Append one result, and show it."""
    line = json.dumps(result)
    with (folder / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
