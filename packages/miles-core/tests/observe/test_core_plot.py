import struct
import sys
from pathlib import Path

import pytest

from miles_core.observe import plot_rewards


def test_the_reward_curve_is_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="extra plot")
    records = [{"step": i, "rollout/reward": i / 10, "rollout/exact": None if i == 2 else i / 20} for i in range(5)]
    path = plot_rewards(records, tmp_path / "reward.png", "tiny")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (840, 480)
    assert "matplotlib.pyplot" not in sys.modules


def test_a_run_without_steps_has_an_empty_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="extra plot")
    assert plot_rewards([], tmp_path / "reward.png", "tiny").stat().st_size > 0


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "miles-core\[plot\]"'):
        plot_rewards([], tmp_path / "reward.png", "tiny")
