"""Pause to first new token: a stock SGLang server on GPU 1 takes weights from GPU 0 while 64 requests are in flight.

    python packages/miles-sync/benchmarks/sglang_gpu.py --out results.json              all arms, two GPUs
    python packages/miles-sync/benchmarks/sglang_gpu.py --out results.json --arms tiny  correctness alone

The shapes are Qwen3-8B's; tiny is a model of four layers.

Weights are random (`--load-format dummy`, a config written here, no tokenizer). Arms, all on one server in one run:

    miles-in_place, miles-staged    miles-sync over NCCL, pause ▸ push ▸ continue
    stock                           update_weights_from_distributed in flat buckets of 512 MiB, paused likewise
    tiny                            on servers of its own: after a push, logprobs equal to those of a server that loaded
                                    the same weights from disk, digests equal, a second push changes nothing

The JSON file is written after every arm; an arm that fails leaves its traceback there. Nothing waits without a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from miles_sync import WeightSync
from miles_sync.messages import Mode
from miles_sync.sglang import LOADER, SGLangTarget
from miles_sync.sglang.conformance import examine

QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
TINY = QWEN3_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
REQUESTS = 64
REPEATS = 5
READY_S = 240.0
ARM_S = 180.0
STOCK_BUCKET = 512 << 20
TOKEN = secrets.token_hex()
Result = dict[str, Any]


# -- the model -----------------------------------------------------------------------------------------


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Qwen3's tensors under Hugging Face names."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "self_attn.q_proj.weight": (q, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q),
            prefix + "self_attn.q_norm.weight": (head,),
            prefix + "self_attn.k_norm.weight": (head,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random weights on GPU 0."""
    generator = torch.Generator("cuda:0").manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, device="cuda:0").mul_(0.02).bfloat16()
        for name, shape in shapes(config).items()
    }


# -- the server ----------------------------------------------------------------------------------------


@contextmanager
def server(config: dict[str, Any], *extra: str, weights: dict[str, torch.Tensor] | None = None) -> Iterator[str]:
    """Run a stock server on GPU 1, of random weights or of these; its log is printed where it does not start."""
    folder = Path(tempfile.mkdtemp(prefix="miles-sync-bench-"))
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        from safetensors.torch import save_file  # noqa: PLC0415 - this arm alone needs it

        save_file({name: tensor.cpu() for name, tensor in weights.items()}, folder / "model.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--port", str(port)),
        *("--load-format", "dummy" if weights is None else "safetensors", "--skip-tokenizer-init"),
        *("--base-gpu-id", "1", "--mem-fraction-static", "0.5", "--custom-weight-loader", LOADER),
        *("--cuda-graph-max-bs-decode", str(REQUESTS), "--cuda-graph-backend-prefill", "disabled"),  # 75 s of a start
        *("--log-level", "warning", *extra),
    ]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env=os.environ | {"MILES_SYNC_TOKEN": TOKEN}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the group that start_new_session made: this server alone
        process.wait(30)


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no server within {READY_S:g} s:\n{log.read_text()[-4000:]}")


def post(url: str, body: dict[str, Any], timeout: float = 60.0) -> Any:
    """POST JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.loads(response.read() or b"null")


class Load:
    """Requests in flight: streams that note when each chunk of tokens came."""

    def __init__(self, url: str) -> None:
        """Start them, and wait until all have generated something."""
        self._url = url
        self._times: list[float] = []
        self._started = threading.Semaphore(0)
        self._stop = threading.Event()
        for index in range(REQUESTS):
            threading.Thread(target=self._stream, args=(index,), daemon=True).start()
        for _ in range(REQUESTS):
            if not self._started.acquire(timeout=60):
                raise RuntimeError("not all requests have started within 60 s")

    def first_after(self, moment: float, limit_s: float = 30.0) -> float:
        """Seconds from `moment` to the first chunk after it."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            later = [at for at in self._times if at > moment]
            if later:
                return min(later) - moment
            time.sleep(0.0005)
        raise RuntimeError(f"no token within {limit_s:g} s")

    def stop(self) -> None:
        """End them."""
        self._stop.set()
        post(f"{self._url}/abort_request", {"rid": "", "abort_all": True})

    def _stream(self, index: int) -> None:
        prompt = [(index * 131 + i) % 1000 + 2 for i in range(256)]
        sampling = {"max_new_tokens": 16_000, "temperature": 1.0, "ignore_eos": True}
        body = json.dumps({"input_ids": prompt, "sampling_params": sampling, "stream": True}).encode()
        request = urllib.request.Request(f"{self._url}/generate", body, {"Content-Type": "application/json"})
        first = True
        try:
            with urllib.request.urlopen(request, timeout=ARM_S) as response:
                for line in response:
                    if self._stop.is_set():
                        return
                    if line.startswith(b"data:"):
                        self._times.append(time.monotonic())
                        if first:
                            self._started.release()
                            first = False
        except OSError:
            return  # aborted at the end


# -- arms ----------------------------------------------------------------------------------------------


def measured(url: str, push: Callable[[int], None], pause: Callable[[], None], resume: Callable[[], None]) -> Result:
    """Pause, push, continue; over and over with requests in flight."""
    load = Load(url)
    rows = []
    try:
        for repeat in range(REPEATS + 1):  # the first is told apart
            start = time.monotonic()
            pause()
            paused = time.monotonic()
            push(repeat)
            pushed = time.monotonic()
            resume()
            resumed = time.monotonic()
            rows.append(
                {
                    "pause_s": paused - start,
                    "push_s": pushed - paused,
                    "continue_s": resumed - pushed,
                    "pause_to_first_token_s": load.first_after(pushed) + pushed - start,
                }
            )
            time.sleep(0.5)
    finally:
        load.stop()
    medians = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
    return {"requests": REQUESTS, "first": rows[0], "median": medians, "all": rows[1:]}


def miles_arm(url: str, config: dict[str, Any], mode: Mode) -> Result:
    """miles-sync over NCCL."""
    versions = [tensors(config, seed) for seed in (1, 2)]
    target = SGLangTarget(url)
    digests: list[str] = []
    with WeightSync([target], token=TOKEN, transport="nccl", mode=mode, deadline_s=60) as sync:
        served = sync.status()[0].version
        base = 0 if served is None else served + 1

        def push(repeat: int) -> None:
            digests.append(sync.push(versions[repeat % 2], base + repeat).digest)

        result = measured(url, push, lambda: target.pause("in_place"), target.resume)
        assert len(set(digests)) == 2, "the same weights must have the same digest"
        sync.check(base + REPEATS, digests[-1])
    return result | {"bytes": sum(t.nbytes for t in versions[0].values()), "digests": digests[-2:]}


def stock_arm(url: str, config: dict[str, Any]) -> Result:
    """update_weights_from_distributed with flat buckets, the trainer's side with SGLang's own group."""
    from sglang.srt.utils import init_custom_process_group  # noqa: PLC0415 - this arm alone needs it

    weights = tensors(config, 3)
    buckets: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        if buckets[-1] and filled + tensor.nbytes > STOCK_BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(name)
        filled += tensor.nbytes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = {
        "master_address": "127.0.0.1",
        "master_port": port,
        "rank_offset": 1,
        "world_size": 2,
        "group_name": "bench",
        "backend": "nccl",
    }
    joining = threading.Thread(target=post, args=(f"{url}/init_weights_update_group", join), daemon=True)
    joining.start()
    torch.cuda.set_device(0)
    group: Any = init_custom_process_group(
        backend="nccl", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name="bench"
    )
    joining.join(60)

    def push(repeat: int) -> None:
        for index, names in enumerate(buckets):
            body = {
                "names": names,
                "dtypes": ["bfloat16"] * len(names),
                "shapes": [list(weights[name].shape) for name in names],
                "group_name": "bench",
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": f"stock-{repeat}-{index}",
            }
            call = threading.Thread(target=post, args=(f"{url}/update_weights_from_distributed", body), daemon=True)
            call.start()
            flat = torch.cat([weights[name].view(-1).view(torch.uint8) for name in names])
            torch.distributed.broadcast(flat, src=0, group=group)
            call.join(60)
            if call.is_alive():
                raise RuntimeError("an update was not answered within 60 s")

    target = SGLangTarget(url)
    result = measured(url, push, lambda: target.pause("in_place"), target.resume)
    return result | {"buckets": len(buckets)}


def tiny_arm() -> Result:
    """What a push makes of a server is what loading the same weights makes of it."""
    weights = tensors(TINY, 7)
    prompt = {
        "input_ids": list(range(2, 130)),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }

    def logprobs(url: str) -> list[float]:
        post(f"{url}/flush_cache", {})
        return [entry[0] for entry in post(f"{url}/generate", prompt)["meta_info"]["input_token_logprobs"][1:]]

    with server(TINY, weights=weights) as url:
        expected = logprobs(url)
    with server(TINY) as url:
        before = logprobs(url)
        modes: tuple[Mode, ...] = ("staged", "in_place")
        transports = []
        for mode in modes:
            target = SGLangTarget(url)
            with WeightSync([target], token=TOKEN, mode=mode, deadline_s=60) as sync:
                served = sync.status()[0].version
                version = 0 if served is None else served + 1
                for again in range(2):
                    target.pause("retract")
                    report = sync.push(weights, version + again)
                    target.resume()
                    sync.check(version + again, report.digest)
                    transports.append(report.routes[0].transport)
                    assert logprobs(url) == expected, f"{mode}: other logprobs than a server that loaded the weights"
        assert before != expected
        examine(url, weights, token=TOKEN)
    return {"logprobs": "equal", "tensors": len(weights), "transports": transports}


# -- running -------------------------------------------------------------------------------------------


def run(name: str, act: Callable[[], Result], results: Result, out: Path) -> None:
    """Run an arm in a thread with a limit, and write what came of it."""
    done: Result = {"error": f"no result within {ARM_S:g} s"}

    def body() -> None:
        nonlocal done
        try:
            done = act()
        except BaseException:  # noqa: BLE001 - it becomes the result
            done = {"error": traceback.format_exc()}

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(ARM_S + 2 * READY_S if name == "tiny" else ARM_S)
    results[name] = done
    out.write_text(json.dumps(results, indent=1))
    print(name, json.dumps(done.get("median", done))[:2000], flush=True)


def main() -> None:
    """Read the command line, run the arms, end in any case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = ("tiny", "miles-in_place", "miles-staged", "stock")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument("--sglang", nargs="*", default=[], help="more arguments of the server, without the dashes' --")
    options = parser.parse_args()
    if torch.cuda.device_count() < 2:
        raise SystemExit("two GPUs are needed: the trainer's and the server's")
    extra = [f"--{argument}" if index % 2 == 0 else argument for index, argument in enumerate(options.sglang)]
    results: Result = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    if "tiny" in options.arms:
        run("tiny", tiny_arm, results, options.out)
    if set(options.arms) - {"tiny"}:
        with server(QWEN3_8B, *extra) as url:
            if "miles-in_place" in options.arms:
                run("miles-in_place", lambda: miles_arm(url, QWEN3_8B, "in_place"), results, options.out)
            if "miles-staged" in options.arms:
                run("miles-staged", lambda: miles_arm(url, QWEN3_8B, "staged"), results, options.out)
            if "stock" in options.arms:
                run("stock", lambda: stock_arm(url, QWEN3_8B), results, options.out)
    sys.stdout.flush()
    os._exit(0 if all("error" not in value for value in results.values() if isinstance(value, dict)) else 1)


if __name__ == "__main__":
    main()
