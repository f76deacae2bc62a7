#!/usr/bin/env python3
"""Make a new room: packages/miles-NOUN with everything that every room has.

    python3 tools/new_package.py eval "Scoring checkpoints on held-out tasks"

Also enters it in the root's uv sources, the contracts on engines and CODEOWNERS. Who may know the new room, and whom it
may know, is yours to say: the script prints where.
"""

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PYPROJECT = """\
[project]
name = "miles-{noun}"
version = "0.1.0"
description = "{description}"
readme = "README.md"
license = "Apache-2.0"
requires-python = ">=3.12"
dependencies = []

[build-system]
requires = ["uv_build>=0.12,<1"]
build-backend = "uv_build"
"""

README = """\
# miles-{noun}

{description}.

```python
import miles_{noun}

print(miles_{noun}.__doc__)
```
"""

CHANGELOG = """\
# Changelog

## 0.1.0 (unreleased)
"""

DOOR = '''\
"""{description}."""

__all__: list[str] = []
'''

TEST = """\
import miles_{noun}


def test_the_door_opens_on_what_it_names():
    assert all(hasattr(miles_{noun}, name) for name in miles_{noun}.__all__)
"""

NEXT = """\
packages/miles-{noun} is there. What is left to do:

  pyproject.toml   [tool.importlinter]: say in a contract who may know miles_{noun} and whom it may know
  CODEOWNERS       check the owner
  uv.lock          python3 tools/lock.py update
"""


def make(noun: str, description: str) -> Path:
    """Write the room's files and enter it in the root.

    Args:
        noun: what the room is, e.g. "eval": lower case, one word.
        description: one sentence without its full stop.

    Raises:
        ValueError: the noun is not one word, or the room is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*", noun):
        raise ValueError(f"noun {noun!r} must be one lower-case word, such as eval")
    if re.search(r'["\\\n]', description):
        raise ValueError("the description must be one line without quotes and backslashes")
    room = ROOT / "packages" / f"miles-{noun}"
    if room.exists():
        raise ValueError(f"{room} is there already: take another noun")
    files = {
        "pyproject.toml": PYPROJECT,
        "README.md": README,
        "CHANGELOG.md": CHANGELOG,
        f"src/miles_{noun}/__init__.py": DOOR,
        f"src/miles_{noun}/py.typed": "",
        f"tests/test_{noun}_door.py": TEST,
    }
    for name, text in files.items():
        file = room / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(noun=noun, description=description.rstrip(".")))
    enter(noun)
    return room


def enter(noun: str) -> None:
    """Name the room wherever the root lists all of them: after the last of its kind."""
    add_line(ROOT / "pyproject.toml", r"miles-\w+ = \{ workspace = true \}", f"miles-{noun} = {{ workspace = true }}")
    owner = f"{f'/packages/miles-{noun}/':<28}@miles/{noun}"
    add_line(ROOT / "CODEOWNERS", r"/packages/miles-\S+ .*", owner)
    pyproject = ROOT / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace(' "miles_launch",\n]', f' "miles_{noun}", "miles_launch",\n]'))


def add_line(file: Path, like: str, line: str) -> None:
    """Insert `line` after the last whole line that matches `like`."""
    lines = file.read_text().splitlines()
    last = max(index for index, text in enumerate(lines) if re.fullmatch(like, text))
    file.write_text("\n".join([*lines[: last + 1], line, *lines[last + 1 :]]) + "\n")


def main() -> None:
    """Parse the command line and make the room."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("noun")
    parser.add_argument("description")
    arguments = parser.parse_args()
    try:
        make(arguments.noun, arguments.description)
    except ValueError as error:
        parser.error(str(error))
    print(NEXT.format(noun=arguments.noun))


if __name__ == "__main__":
    main()
