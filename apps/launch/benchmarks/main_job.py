"""Measures the main job on this machine and writes JSON: learning curves, controls, phase shares, overhead, memory.

    python apps/launch/benchmarks/main_job.py --out results.json            # three seeds, two controls, the bare engine
    python apps/launch/benchmarks/main_job.py --seeds 0 --no-controls ...   # less

Each arm is `miles run recipes/quickstart.toml` as a user starts it. The engine's rate under our worker is compared with
the same server driven bare: the same prompts, sampling and concurrency, no worker, no rewards, no queue.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from miles_core import load_recipe
from miles_core.observe import read_metrics

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "quickstart.toml"
LEARNED = 0.8  # mean reward
WARM_STEPS = 5  # left out of rates: caches and allocators settle


class PeakMemory(threading.Thread):
    """Samples the proportional memory (PSS) of a process and all its descendants twice a second."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.peak_bytes = 0

    def run(self) -> None:
        while self._root.is_running():
            total = 0
            try:
                for process in [self._root, *self._root.children(recursive=True)]:
                    try:
                        total += process.memory_full_info().pss
                    except psutil.Error:
                        continue
            except psutil.Error:
                return
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(0.5)


def run_job(folder: Path, name: str, *settings: str) -> dict[str, Any]:
    """One run as a user starts it; the clock starts with the command."""
    overrides = [part for setting in (f"name='{name}'", *settings) for part in ("--set", setting)]
    command = [sys.executable, "-m", "miles_launch", "run", str(RECIPE), *overrides]
    started = time.time()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    memory = PeakMemory(process.pid)
    memory.start()
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}:\n{errors}")
    return {"name": name, "wall_s": time.time() - started, "peak_pss_bytes": memory.peak_bytes} | summary(
        folder / "runs" / name, started
    )


def summary(run: Path, started: float) -> dict[str, Any]:
    """What metrics and trace of a run say, times counted from its command."""
    records = read_metrics(run / "metrics.jsonl")
    rewards = [record["rollout/reward"] for record in records]
    events = [event for event in json.loads((run / "trace" / "driver.json").read_text()) if event.get("ph") == "X"]
    loop_start = min(event["ts"] for event in events) / 1e6 - started
    ends, clock = [], loop_start
    for record in records:
        clock += record["perf/time/step"]
        ends.append(clock)
    smooth = [statistics.fmean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
    learned = next((i for i, reward in enumerate(smooth) if i >= 4 and reward > LEARNED), None)
    warm = records[WARM_STEPS:]
    total = sum(record["perf/time/step"] for record in warm)
    share = {
        phase: sum(record.get(f"perf/time/{phase}", 0) for record in warm) / total
        for phase in ("generate", "batch", "train", "sync", "record", "save", "rest")
    }
    return {
        "steps": len(records),
        "first_step_done_s": ends[0],
        "reward_above_0.8_at_step": learned,
        "reward_above_0.8_s": None if learned is None else ends[learned],
        "reward_first": smooth[4],
        "reward_last": smooth[-1],
        "exact_last": statistics.fmean(record["rollout/exact"] for record in records[-5:]),
        "rewards": [round(reward, 4) for reward in rewards],
        "logprob_gap_max": max(record["train/logprob_gap"] for record in records),
        "step_s_median": statistics.median(record["perf/time/step"] for record in warm),
        "phase_share": share,
        "overhead_share": share["batch"] + share["record"] + share["rest"],
        "engine_tokens_per_s": statistics.median(record["perf/engine_tokens_per_s"] for record in warm),
        "sync_bytes": records[-1]["sync/bytes"],
    }


async def bare_engine(folder: Path, steps: int = 30) -> dict[str, Any]:
    """The same SGLang server, driven by nothing but an HTTP client: what its rate is without us."""
    from miles_rollout.sglang import ServerSettings, SGLangServer  # noqa: PLC0415 (only this arm needs it)
    from miles_rollout.tokenizer import Tokenizer  # noqa: PLC0415

    recipe = load_recipe(RECIPE)
    model = folder / recipe.model.path
    os.environ |= {"OMP_NUM_THREADS": "1"}
    server = SGLangServer(ServerSettings(str(model), folder / "bare.log", recipe.rollout.sglang))
    started = time.monotonic()
    address = server.start()
    ready_s = time.monotonic() - started
    tokenizer = Tokenizer(str(model))
    params = {"max_new_tokens": recipe.rollout.max_new_tokens, "stop_token_ids": list(tokenizer.stop_token_ids)}
    rates: list[float] = []
    headers = {"Authorization": f"Bearer {address.api_key}"}
    try:
        async with aiohttp.ClientSession(address.url, headers=headers) as session:

            async def group(index: int) -> int:
                ids = [tokenizer.encode(f"{index % 10000:04d}=")] * recipe.rollout.group_size
                body = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
                async with session.post("/generate", json=body) as response:
                    answers = await response.json()
                return sum(len(answer["meta_info"]["output_token_logprobs"]) for answer in answers)

            size = recipe.rollout.prompts_per_step
            for step in range(steps):
                begin = time.monotonic()
                tokens = await asyncio.gather(*(group(step * size + index) for index in range(size)))
                rates.append(sum(tokens) / (time.monotonic() - begin))
    finally:
        server.stop()
    return {"ready_s": ready_s, "tokens_per_s": statistics.median(rates[WARM_STEPS:])}


def main() -> None:
    """Run the arms one after the other: they would share the cores otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="miles-bench-") as name:
        folder = Path(name)
        arms = [run_job(folder, f"seed-{seed}", f"seed={seed}") for seed in options.seeds]
        controls = [] if options.no_controls else ["shuffle_rewards", "freeze_engine"]
        arms += [run_job(folder, control, f"controls.{control}=true") for control in controls]
        bare = asyncio.run(bare_engine(folder))
    machine = {"cores": os.cpu_count(), "cpu": platform.processor() or platform.machine(), "python": sys.version}
    ratio = statistics.median(arm["engine_tokens_per_s"] for arm in arms[: len(options.seeds)]) / bare["tokens_per_s"]
    result = {"machine": machine, "arms": arms, "bare_engine": bare, "engine_ratio_to_bare": ratio}
    options.out.write_text(json.dumps(result, indent=1))
    for arm in arms:
        print({key: value for key, value in arm.items() if key != "rewards"})
    print(bare, "ratio to bare:", round(ratio, 3))


if __name__ == "__main__":
    main()
