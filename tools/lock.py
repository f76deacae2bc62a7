#!/usr/bin/env python3
"""Keep uv.lock free of addresses, and install from it.

uv writes the addresses of the package index and of every file into uv.lock. The committed lock has none: a registry
package reads `source = { registry = "wheelhouse" }` and a file `path = "NAME"` with its hash, the form uv itself uses
for a local folder. Versions and hashes stay exact, and each machine uses the index of its own settings.

    lock.py update [ARGS]   `uv lock ARGS` (say --upgrade), then clean
    lock.py clean [-]       rewrite uv.lock without addresses; with `-`, from standard input to standard output
    lock.py check           fail if uv.lock has an address or does not match the pyproject files and the index
    lock.py sync [ARGS]     install what uv.lock says into .venv, hashes verified, uv.lock untouched
                            (ARGS as for `uv export`, say --package miles-rollout --extra sglang)
    lock.py fetch [ARGS]    download the same files into wheelhouse/, hashes verified; `uv sync --frozen` then needs
                            no index
    lock.py git-filter      make git clean uv.lock at every add and commit in this clone
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "uv.lock"
HOUSE = "wheelhouse"
REGISTRY = re.compile(r'(?<={ registry = )"\w+://[^"]*"')
FILE = re.compile(r'(?<![\w-])url = "\w+://[^"]*/([^"/#?]+)"(?=, (?:hash|size|upload-time) = )')
ADDRESS = re.compile(r"[\w+]+://\S*")


def clean(text: str) -> str:
    """The same lock without addresses."""
    return FILE.sub(lambda match: f'path = "{unquote(match[1])}"', REGISTRY.sub(f'"{HOUSE}"', text))


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command; uv also where it is a module of this Python and not on the path."""
    if command[0] == "uv" and importlib.util.find_spec("uv"):
        command = (sys.executable, "-m", *command)
    subprocess.run(command, cwd=cwd, check=True)


def relock(*args: str) -> None:
    """Resolve until the cleaned lock is a fixed point: uv may reorder markers once when it starts from a clean one."""
    before = None
    while (text := clean(LOCK.read_text()) if LOCK.exists() else "") != before or args:
        before = text
        run("uv", "lock", "--quiet", *args)
        LOCK.write_text(clean(LOCK.read_text()))
        args = ()


def contents(text: str) -> tuple[dict, dict]:
    """The lock without its files, and its files: {(package, version, file name): hash}."""
    lock = tomllib.loads(text)
    lock.pop("revision", None)
    files = {}
    for package in lock["package"]:
        entries = [*package.pop("wheels", []), *([package.pop("sdist")] if "sdist" in package else [])]
        for entry in entries:
            files[package["name"], package.get("version"), entry.get("path")] = entry.get("hash")
    return lock, files


def check() -> list[str]:
    """What is wrong with uv.lock, resolved anew in a copy of the workspace's pyproject files."""
    text = LOCK.read_text()
    if found := ADDRESS.findall(text):
        return [f"uv.lock has {len(found)} addresses: run `python3 tools/lock.py clean`"]
    with tempfile.TemporaryDirectory() as folder:
        for file in [LOCK, ROOT / ".python-version", ROOT / "pyproject.toml", *ROOT.glob("*/*/pyproject.toml")]:
            copy = Path(folder) / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        run("uv", "lock", "--quiet", cwd=Path(folder))
        (lock, files), (new, offered) = contents(text), contents(clean((Path(folder) / "uv.lock").read_text()))
    gone = [name for *package, name in files if offered.get((*package, name)) != files[*package, name]]
    wrong = [f"{name}: the index no longer offers this file with this hash" for name in gone]
    return wrong if lock == new else [*wrong, "uv.lock is out of date: run `python3 tools/lock.py update`"]


def git_filter() -> None:
    """Let git take the addresses out of uv.lock whenever it is added; a fresh clone does not know how to."""
    for key, value in {"clean": "python3 tools/lock.py clean -", "smudge": "cat", "required": "true"}.items():
        run("git", "config", f"filter.uvlock.{key}", value)


def install(command: str, *args: str) -> None:
    """`sync` or `fetch`: what uv.lock says, exported with hashes and handed to uv or pip."""
    pins = ROOT / ".venv" / "uv.lock.txt"
    if (ROOT / ".git").exists():
        git_filter()
    if not pins.parent.exists():
        run("uv", "venv", "--quiet")
    where = ["--no-emit-workspace"] if command == "fetch" else []
    run("uv", "export", "--frozen", "--quiet", "--output-file", pins, *where, *(args or ["--all-packages"]))
    if command == "sync":
        run("uv", "pip", "sync", "--python", pins.parent, pins)
    else:
        pip = ["uv", "run", "--no-project", "--with", "pip", "--", "python", "-m", "pip"]
        options = ["--quiet", "--require-hashes", "--no-deps", "--requirement", pins, "--dest", ROOT / HOUSE]
        run(*pip, "download", *options)


def main(command: str = "help", *args: str) -> int:
    """Do what the command line says; the exit code."""
    if command == "clean" and args == ("-",):
        sys.stdout.write(clean(sys.stdin.read()))
    elif command == "clean":
        LOCK.write_text(clean(LOCK.read_text()))
    elif command == "check":
        problems = check()
        print("\n".join(problems) or "uv.lock: no address, up to date, hashes as on the index")
        return bool(problems)
    elif command == "update":
        relock(*args)
    elif command == "git-filter":
        git_filter()
    elif command in ("sync", "fetch"):
        install(command, *args)
    else:
        print(__doc__)
        return command != "help"
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
