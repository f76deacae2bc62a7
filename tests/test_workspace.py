"""What uv does not check by itself: the committed lock's form, and the ranges between siblings."""

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = {
    project["name"]: project
    for file in ROOT.glob("*/*/pyproject.toml")
    for project in [tomllib.loads(file.read_text())["project"]]
}


def test_sibling_ranges_admit_the_versions_here():
    wrong = []
    for name, project in PROJECTS.items():
        extras = project.get("optional-dependencies", {})
        for requirement in map(Requirement, [*project["dependencies"], *(line for lines in extras.values() for line in lines)]):
            sibling = PROJECTS.get(requirement.name)
            if sibling and not (requirement.specifier and requirement.specifier.contains(sibling["version"], prereleases=True)):
                wrong.append(f"{name} needs {requirement}, here is {sibling['version']}")
    assert not wrong, wrong


def test_lock_has_no_address():
    text = subprocess.run(["git", "show", "HEAD:uv.lock"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not re.findall(r"[\w+]+://\S*", text)
