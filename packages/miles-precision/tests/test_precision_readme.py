"""The README's example runs as written."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_example_runs():
    example, checkpoint, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    exec(checkpoint, names)
    assert set(names["tensors"]) == {f"model.layers.0.mlp.down_proj.{part}" for part in ("weight", "weight_scale_inv")}
