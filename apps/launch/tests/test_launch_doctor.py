import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_core import InputError
from miles_core.cluster.runtime import LOCAL_OBJECT_STORE_BYTES
from miles_launch import doctor


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def named(name: str, checks: list[doctor.Check]) -> doctor.Check:
    return next(check for check in checks if check.name == name)


def test_a_machine_that_runs_the_tests_is_fit(tmp_path: Path):
    assert all(not check.required for check in doctor.refuse_unfit_machine(tmp_path / "runs", {}))
    assert not (tmp_path / "runs").exists()


def test_a_taken_port_is_refused_by_its_recipe_key(tmp_path: Path, taken_port: int):
    ports = {"cluster.dashboard_port": taken_port}
    with pytest.raises(InputError, match=rf"cluster\.dashboard_port = '{taken_port}'.*--set cluster\.dashboard_port="):
        doctor.refuse_unfit_machine(tmp_path, ports)


def test_ports_that_are_free_or_zero_pass(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = doctor.checks(tmp_path, {"one": port, "none": 0})
    assert named("one", found).ok
    assert "none" not in [check.name for check in found]


def test_runs_that_cannot_be_written_are_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"disk of runs = '.*/file cannot be written'.*--runs"):
        doctor.refuse_unfit_machine(tmp_path / "file" / "runs", {})


def test_a_temporary_directory_too_deep_for_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(InputError, match="TMPDIR"):
        doctor.refuse_unfit_machine(tmp_path, {})


def test_the_bound_on_socket_paths_is_the_kernels():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        longest = folder + "/" + "s" * (doctor.MAX_SOCKET_PATH_BYTES - len(folder) - 1)
        with socket.socket(socket.AF_UNIX) as fits:
            fits.bind(longest)
        with socket.socket(socket.AF_UNIX) as too_long, pytest.raises(OSError, match="too long"):
            too_long.bind(longest + "s")


def test_other_platforms_are_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert len(doctor.checks(tmp_path, {})) == 1
    with pytest.raises(InputError, match=r"linux arm64.*Miles runs on Linux x86-64"):
        doctor.refuse_unfit_machine(tmp_path, {})


@pytest.mark.parametrize("engine", doctor.ENGINES)
def test_an_untested_engine_is_refused_by_version(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another version of the engine lies ahead on the path."""
    info = tmp_path / f"{engine.replace('-', '_')}-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {engine}\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"{engine} = '0\.0\.1'.*pip install"):
        doctor.refuse_unfit_machine(tmp_path, {})


def test_shared_memory_has_room_for_rays_object_store_and_more():
    assert doctor.MIN_SHM_BYTES >= 2 * LOCAL_OBJECT_STORE_BYTES


def test_the_report_lists_all_and_its_code_says_whether_to_go_on(
    tmp_path: Path, taken_port: int, capsys: pytest.CaptureFixture[str]
):
    assert doctor.print_report(tmp_path, {}) == 0
    shown = capsys.readouterr().out
    assert all(check.name in shown for check in doctor.checks(tmp_path, {}))
    assert doctor.print_report(tmp_path, {"cluster.dashboard_port": taken_port}) == InputError.exit_code


def test_nothing_heavy_is_imported(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from miles_launch.doctor import checks; checks(Path(sys.argv[1]), {});"
        "assert not {'torch', 'transformers', 'ray', 'sglang', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
