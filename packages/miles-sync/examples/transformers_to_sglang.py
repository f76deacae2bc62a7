"""A plain transformers training script that keeps a stock SGLang server on policy.

Start the server, with LOADER named so that it takes weights from miles-sync, and the same token on both sides:

    export MILES_SYNC_TOKEN=$(python -c "import secrets; print(secrets.token_hex())")
    python -m sglang.launch_server --model-path MODEL --skip-tokenizer-init --port 30000 \
        --custom-weight-loader miles_sync.sglang.loader.load
    python transformers_to_sglang.py MODEL --url http://127.0.0.1:30000 --steps 20

Each step samples from the server, rewards answers (here: for every token below half of the vocabulary), takes one
REINFORCE step and pushes. The script checks that the server answers with the version it pushed. Runs on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.request
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from miles_sync import WeightSync
from miles_sync.sglang import SGLangTarget


@dataclass(frozen=True)
class Answer:
    """One answer: its tokens, and the version of the weights that made it."""

    tokens: list[int]
    version: str


def post(url: str, body: dict[str, Any]) -> Any:
    """POST JSON, get JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def generate(url: str, prompt: list[int], count: int, tokens: int, version: int) -> list[Answer]:
    """Sample answers to one prompt.

    `extra_key` keeps cached prefixes of one version apart from those of the next.
    """
    body = {
        "input_ids": [prompt] * count,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
        "extra_key": str(version),
    }
    replies = post(f"{url}/generate", body)
    return [Answer(reply["output_ids"], reply["meta_info"]["weight_version"]) for reply in replies]


def reinforce(model: torch.nn.Module, prompt: list[int], answers: list[Answer], rewards: torch.Tensor) -> torch.Tensor:
    """Minus the mean of advantage times log probability of the answers (Williams 1992)."""
    tokens = torch.tensor([prompt + answer.tokens for answer in answers], device=next(model.parameters()).device)
    logits = model(tokens).logits[:, len(prompt) - 1 : -1].float()
    taken = tokens[:, len(prompt) :, None]
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, taken).squeeze(-1)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return -(advantages.to(logprobs.device)[:, None] * logprobs).mean()


def train(model_path: str, url: str, *, steps: int, samples: int, tokens: int, lr: float) -> list[float]:
    """Train; returns the mean reward of each step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    prompt = [2, 3, 4, 5]
    half = model.config.vocab_size // 2
    history = []
    with WeightSync([SGLangTarget(url)], token=os.environ["MILES_SYNC_TOKEN"]) as sync:
        served = sync.status()[0].version
        version = 1 if served is None else served + 1
        sync.push(model, version)
        for step in range(steps):
            answers = generate(url, prompt, samples, tokens, version)
            assert {answer.version for answer in answers} == {str(version)}
            rewards = torch.tensor([sum(t < half for t in answer.tokens) / tokens for answer in answers])
            reinforce(model, prompt, answers, rewards).backward()
            optimizer.step()
            optimizer.zero_grad()
            version += 1
            report = sync.push(model, version)
            history.append(float(rewards.mean()))
            print(f"step {step}: reward {history[-1]:.3f}, pushed in {report.total_s:.3f} s")  # noqa: T201 - a script
    return history


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory or name, the one that the server was started with")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=32, help="answers a step")
    parser.add_argument("--tokens", type=int, default=16, help="tokens an answer")
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()
    train(
        options.model,
        options.url,
        steps=options.steps,
        samples=options.samples,
        tokens=options.tokens,
        lr=options.lr,
    )


if __name__ == "__main__":
    main()
