"""Folders are complete or not there, whenever the writer dies."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from miles_train import folders


def write(target, text="content"):
    partial = folders.begin(target)
    (partial / "marker").write_text(text)
    folders.publish(target)
    folders.point_to(target)


def test_a_folder_appears_whole_and_latest_names_it(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert folders.resolve(tmp_path) == tmp_path / "b"
    assert folders.resolve(tmp_path / "a") == tmp_path / "a"
    assert folders.resolve(tmp_path / "c") is None
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "latest"]


def test_what_exists_is_never_overwritten(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(FileExistsError, match="choose another name"):
        folders.begin(tmp_path / "a")


def test_what_may_go_is_replaced_when_the_new_one_is_whole(tmp_path):
    write(tmp_path / "a", "old")
    partial = folders.begin(tmp_path / "a", replaces=lambda target: True)
    assert (tmp_path / "a" / "marker").read_text() == "old"
    (partial / "marker").write_text("new")
    folders.publish(tmp_path / "a")
    assert (tmp_path / "a" / "marker").read_text() == "new"
    assert folders.is_latest(tmp_path / "a") and not folders.is_latest(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "latest"]


def test_only_the_newest_are_kept_and_others_files_are_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    for name in "abcd":
        write(tmp_path / name)
    folders.keep_newest(tmp_path / "d", 2, "marker")
    assert sorted(os.listdir(tmp_path)) == ["c", "d", "latest", "notes"]


def test_killed_in_the_middle_the_older_one_stays_and_the_next_attempt_works(tmp_path):
    write(tmp_path / "a")
    code = """
        import os, signal, sys
        from pathlib import Path
        from miles_train import folders
        partial = folders.begin(Path(sys.argv[1]) / "b")
        (partial / "marker").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert folders.resolve(tmp_path) == tmp_path / "a"
    assert not (tmp_path / "b").exists()
    write(tmp_path / "b", "whole")
    assert (folders.resolve(tmp_path) / "marker").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "latest"]
