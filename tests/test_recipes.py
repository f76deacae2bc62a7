"""Every recipe in the tree is one that `miles run` would take."""

from pathlib import Path

import pytest

from miles_core import load_recipe
from miles_core.hooks import load_object

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_parses_and_names_code_that_exists(path: Path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    hooks = {
        "model.source": recipe.model.source,
        "data.source": recipe.data.source,
        "hooks.reward": recipe.hooks.reward,
    }
    for setting, hook in hooks.items():
        if hook is not None and ":" in hook.name:
            assert callable(load_object(hook.name, setting))


def test_the_two_of_the_readme_are_there():
    assert {"quickstart.toml", "smollm2-135m.toml"} <= {path.name for path in RECIPES}
