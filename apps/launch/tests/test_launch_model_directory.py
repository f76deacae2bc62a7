import threading
from pathlib import Path

import pytest

from miles_core import InputError
from miles_launch.models._directory import make_directory


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_what_fails_leaves_nothing_behind(tmp_path: Path):
    def write(folder: Path) -> None:
        write_config(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left.*Free some space"):
        make_directory(tmp_path / "deep" / "model", write)
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_finished_directory_is_left_alone(tmp_path: Path):
    write_config(tmp_path)
    make_directory(tmp_path, lambda folder: pytest.fail("written again"))


def test_foreign_files_are_not_overwritten(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no config\.json"):
        make_directory(tmp_path, write_config)
    with pytest.raises(InputError, match=r"no config\.json"):
        make_directory(tmp_path / "thesis.txt", write_config)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_at_once_both_find_it_complete(tmp_path: Path):
    """Both write to the end before either renames."""
    both = threading.Barrier(2)
    seen: list[object] = []

    def write(folder: Path) -> None:
        write_config(folder)
        both.wait(10)

    def work() -> None:
        try:
            make_directory(tmp_path / "model", write)
            seen.append((tmp_path / "model" / "config.json").read_text())
        except InputError as error:
            seen.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["{}", "{}"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
