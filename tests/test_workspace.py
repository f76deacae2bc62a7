"""What uv does not check by itself: the lock's form, the ranges between siblings, the root's own lists."""

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
WORKSPACE = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
MEMBERS = [file.parent for file in ROOT.glob("*/*/pyproject.toml")]
PROJECTS = {
    project["name"]: project
    for member in MEMBERS
    for project in [tomllib.loads((member / "pyproject.toml").read_text())["project"]]
}


def requirements(project: dict) -> list[Requirement]:
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]


def test_sibling_ranges_admit_the_versions_here():
    wrong = []
    for name, project in PROJECTS.items():
        for requirement in requirements(project):
            sibling, specifier = PROJECTS.get(requirement.name), requirement.specifier
            if sibling and not (specifier and specifier.contains(sibling["version"], prereleases=True)):
                wrong.append(f"{name} needs {requirement}, here is {sibling['version']}")
    assert not wrong, wrong


def test_lock_has_no_address():
    text = subprocess.run(["git", "show", "HEAD:uv.lock"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not re.findall(r"[\w+]+://\S*", text)


def test_a_member_is_named_as_its_folder_and_its_import():
    for member in MEMBERS:
        name = tomllib.loads((member / "pyproject.toml").read_text())["project"]["name"]
        assert name in {member.name, f"miles-{member.name}"}
        assert (member / "src" / name.replace("-", "_") / "py.typed").is_file()


def test_every_member_has_what_a_room_has():
    missing = [
        str(member / part) for member in MEMBERS for part in ("README.md", "CHANGELOG.md", "tests")
        if not (member / part).exists()
    ]  # fmt: skip
    assert not missing, missing


def test_the_root_lists_every_member():
    assert set(WORKSPACE["uv"]["sources"]) == PROJECTS.keys()
    assert set(WORKSPACE["importlinter"]["root_packages"]) == {name.replace("-", "_") for name in PROJECTS}
    owners = (ROOT / "CODEOWNERS").read_text()
    assert all(f"\n/{member.relative_to(ROOT)}/" in owners for member in MEMBERS)


def test_every_contract_on_an_engine_covers_every_package():
    """A package that a list leaves out could import the engine unseen."""
    everybody = set(WORKSPACE["importlinter"]["root_packages"])
    engines = {"sglang", "megatron", "transformer_engine", "ray"}
    covered = set()
    for contract in WORKSPACE["importlinter"]["contracts"]:
        if engines & set(contract.get("forbidden_modules", ())):
            assert set(contract["source_modules"]) == everybody, contract["name"]
            covered |= set(contract["forbidden_modules"])
    assert covered == engines


def test_test_files_have_names_of_their_own():
    """pytest-xdist runs all packages in one session, and reports name files alone."""
    files = [*ROOT.glob("*/*/tests/**/test_*.py"), *ROOT.glob("tests/test_*.py")]
    names = [file.name for file in files]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
