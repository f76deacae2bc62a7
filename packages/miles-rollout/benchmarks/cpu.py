"""Start, throughput and cost of rewards on a CPU, with a tiny random model. Prints one JSON object."""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import save_file

from miles_core.types import Prompt, Sample, VersionSpan
from miles_rollout import InProcessJudge, Judge, SamplingParams
from miles_rollout.rewards import RewardPool, position_match
from miles_rollout.sglang import ServerSettings, SGLangEngine, SGLangServer

GROUPS, GROUP_SIZE, NEW_TOKENS = 32, 16, 5


def make_model(folder: Path, vocab_size: int = 16, context_length: int = 256) -> None:
    """A random Qwen3: hidden 64, 2 layers."""
    rng = np.random.default_rng(0)
    sizes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
    sizes |= {"self_attn.o_proj": (64, 64), "self_attn.q_norm": (16,), "self_attn.k_norm": (16,)}
    sizes |= {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    sizes |= {"input_layernorm": (64,), "post_attention_layernorm": (64,)}
    weights = {f"model.layers.{i}.{name}.weight": size for i in range(2) for name, size in sizes.items()}
    weights |= {"model.embed_tokens.weight": (vocab_size, 64), "model.norm.weight": (64,)}
    tensors = {name: rng.normal(0, 0.2, size).astype(np.float32) for name, size in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": vocab_size, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": context_length, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


async def median_s(act: Callable[[int], Awaitable[Any]], repeats: int) -> float:
    """The median time of `repeats` calls after two that do not count."""
    times: list[float] = []
    for number in range(repeats + 2):
        start = time.perf_counter()
        await act(number)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure_engine(deterministic: bool, repeats: int) -> dict[str, float]:
    """Start an engine, generate steps of the quickstart's size and one long batch, and stop it."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        cpu = {"device": "cpu", "dtype": "float32"}
        server = SGLangServer(ServerSettings(folder, Path(folder, "log"), cpu, deterministic=deterministic))
        start = time.perf_counter()
        address = server.start()
        start_s = time.perf_counter() - start
        processes = [psutil.Process(pid) for pid in server.processes]
        figures = {
            "start_s": start_s,
            "start_cpu_s": sum(sum(process.cpu_times()[:2]) for process in processes),
            "memory_bytes": sum(process.memory_full_info().pss for process in processes),
        }

        async def generate() -> None:
            engine = SGLangEngine(address)
            prompts = np.random.default_rng(0).integers(0, 10, (64, 5)).tolist()

            async def step(number: int, groups: int, size: int, length: int) -> None:
                sampling = SamplingParams(length)
                await asyncio.gather(*[
                    engine.generate(p, sampling, size, seeds=[(number * 64 + i) * size + j for j in range(size)])
                    for i, p in enumerate(prompts[:groups])
                ])  # fmt: skip

            figures["step_s"] = await median_s(lambda n: step(n, GROUPS, GROUP_SIZE, NEW_TOKENS), repeats)
            figures["tokens_per_s"] = 64 * 64 / await median_s(lambda n: step(n, 64, 1, 64), repeats)
            await engine.close()

        asyncio.run(generate())
        server.stop()
    return figures


def measure_judge(judge: Judge, repeats: int) -> float:
    """Seconds for the rewards of one step, groups at the same time."""
    tokens = np.arange(10, dtype=np.int32)
    sample = Sample(tokens, tokens > 4, tokens.astype(np.float32), (VersionSpan(5, 10, 0),), "stop", "1234")
    prompt = Prompt("p", "1234=", {"answer": "1234"})

    async def measure() -> float:
        try:
            return await median_s(
                lambda _: asyncio.gather(*[judge.judge(prompt, [sample] * GROUP_SIZE) for _ in range(GROUPS)]), repeats
            )
        finally:
            await judge.close()

    return asyncio.run(measure())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    figures = {
        "engine": measure_engine(False, repeats),
        "engine_deterministic": measure_engine(True, repeats),
        "rewards_in_process_s": measure_judge(InProcessJudge(position_match, "position_match"), repeats),
        "rewards_in_pool_s": measure_judge(RewardPool("miles_rollout.rewards:position_match"), repeats),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
