import contextlib
import io
import re
import tomllib
from itertools import pairwise
from pathlib import Path

from miles_core.algorithms.losses.build import build_loss
from miles_core.config import AlgorithmSection
from miles_core.hooks import POINTS

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_print_what_the_readme_says():
    blocks = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)
    pairs = [(one[1], two[1]) for one, two in pairwise(blocks) if (one[0], two[0]) == ("python", "text")]
    assert len(pairs) == 2
    for code, expected in pairs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), {})
        assert printed.getvalue() == expected


def test_the_algorithm_of_the_readme_is_one():
    (table,) = re.findall(r"```toml\n(\[algorithm\].*?)```", README.read_text(), re.DOTALL)
    section = AlgorithmSection.model_validate(tomllib.loads(table)["algorithm"])
    assert build_loss(section).needs == {"entropy", "ref_logprobs"}
    assert POINTS["advantage"].load(section.advantage) and POINTS["reduction"].load(section.reduction)


def test_what_is_built_in_is_in_the_readme():
    text = README.read_text()
    for kind in ("advantage", "loss", "correction", "kl", "reduction"):
        assert all(f"`{name}`" in text for name in POINTS[kind].built_in)
