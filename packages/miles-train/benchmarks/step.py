"""Times the trainer on the quickstart's tiny model: one JSON object on stdout.

OMP_NUM_THREADS=1 python benchmarks/step.py [--steps 20]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

START = time.perf_counter()

import numpy as np  # noqa: E402  # the imports are part of what is timed
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from miles_core.algorithms.losses import Objective, PPOClip  # noqa: E402
from miles_core.types import Batch  # noqa: E402
from miles_train.megatron import MegatronTrainer  # noqa: E402
from miles_train.megatron.weights.qwen3 import table  # noqa: E402

IMPORT_S = time.perf_counter() - START
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def make_model(path: Path) -> None:
    """Write a random model."""
    path.mkdir()
    weights = {name: 0.05 * torch.randn(shape) for name, shape in table(CONFIG).shapes().items()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))


def make_batch(num_samples: int = 512, length: int = 10) -> Batch:
    """The shapes of a quickstart step: the second half of each sample is trained."""
    rng = np.random.default_rng(0)
    mask = np.tile(np.arange(length) >= length // 2, num_samples)
    return Batch(
        tokens=rng.integers(0, 16, num_samples * length).astype(np.int32),
        lengths=np.full(num_samples, length, np.int32),
        loss_mask=mask,
        rollout_logprobs=np.zeros(num_samples * length, np.float32),
        advantages=(rng.normal(size=num_samples * length) * mask).astype(np.float32),
        loss_weights=(mask / mask.sum()).astype(np.float32),
        rewards=np.zeros(num_samples, np.float32),
        versions=np.zeros(num_samples, np.int64),
        group_index=np.zeros(num_samples, np.int32),
        num_loss_tokens=int(mask.sum()),
        num_samples=num_samples,
    )


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Time it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"))
        start = time.perf_counter()
        settings = {"lr": 2e-3, "adam_beta2": 0.95}
        loss = Objective(PPOClip(), entropy_coef=0.01)
        trainer = MegatronTrainer(Path(folder, "model"), settings, loss)
        build_s = time.perf_counter() - start
        batch = make_batch()
        trainer.step([batch])
        times = [seconds(lambda: trainer.step([batch])) for _ in range(steps)]
        result = {
            "import_s": IMPORT_S,
            "build_s": build_s,
            "step_median_s": statistics.median(times),
            "step_min_s": min(times),
            "tokens_per_s": len(batch.tokens) / statistics.median(times),
            "logprobs_s": seconds(lambda: trainer.logprobs(batch)),
            "save_s": seconds(lambda: trainer.save(Path(folder, "checkpoint"), {})),
            "load_s": seconds(lambda: trainer.load(Path(folder, "checkpoint"))),
            "export_s": seconds(lambda: trainer.export(Path(folder, "hf"))),
        }
        trainer.close()
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
