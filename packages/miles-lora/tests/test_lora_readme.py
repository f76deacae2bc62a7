"""The README's example runs as written."""

import re
import tempfile
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_example_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(example, {})
