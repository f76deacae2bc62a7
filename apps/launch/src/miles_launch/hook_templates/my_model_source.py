"""Where the model comes from when it is not there.

Save as my_model_source.py, and say in the recipe

    [model]
    path = "models/mine"
    source = { name = "my_model_source:copy_from", folder = "/shared/models/mine" }
"""

import shutil
from pathlib import Path


def copy_from(path: Path, *, folder: str) -> None:
    """Copy the Hugging Face directory `folder` to `path`."""
    shutil.copytree(folder, path)
