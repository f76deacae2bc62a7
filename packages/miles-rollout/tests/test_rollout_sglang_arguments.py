import socket
import subprocess
import sys
from pathlib import Path

import pytest

from miles_core.errors import InputError
from miles_rollout.errors import EngineStartError
from miles_rollout.sglang import ServerSettings, SGLangServer, check_arguments, known_arguments
from miles_rollout.sglang.arguments import complete_arguments


def test_known_arguments_are_server_args_fields() -> None:
    known = known_arguments()
    assert {"mem_fraction_static", "tp_size", "attention_backend", "sampling_backend", "dtype", "device"} <= known
    assert len(known) > 400 and "post_init" not in known


def test_checking_imports_neither_sglang_nor_torch() -> None:
    code = (
        "import sys; from miles_rollout.sglang import check_arguments; check_arguments({'tp_size': 1});"
        "print([name for name in ('sglang', 'torch', 'transformers') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"rollout\.sglang\.mem_fraction = 0\.7: .*Did you mean 'mem_fraction_static'"):
        check_arguments({"mem_fraction": 0.7})
    with pytest.raises(InputError, match="launch_server --help"):
        check_arguments({"zzzzzzzz": 1})


@pytest.mark.parametrize("name", ["api_key", "weight_version", "skip_tokenizer_init", "model_path"])
def test_what_miles_decides_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} = 1: not a setting of a recipe"):
        check_arguments({name: 1})


def test_the_users_values_win() -> None:
    assert complete_arguments({"device": "cpu", "max_total_tokens": 7}, True)["max_total_tokens"] == 7
    assert complete_arguments({"device": "cpu"}, True)["enable_deterministic_inference"]
    assert "enable_deterministic_inference" not in complete_arguments({"device": "cpu"}, False)
    cuda = complete_arguments({"device": "cuda"}, True)
    assert cuda["enable_deterministic_inference"] and "attention_backend" not in cuda
    assert complete_arguments({}, False)["host"] == "127.0.0.1"


def test_a_taken_port_is_named_before_anything_starts(tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = ServerSettings(str(tiny_model), tmp_path / "engine.log", {"device": "cpu", "port": port})
        with pytest.raises(InputError, match=f"rollout.sglang.port = {port}: is taken on 127.0.0.1"):
            SGLangServer(settings)


def test_a_missing_model_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path = .*nowhere.*config\.json"):
        SGLangServer(ServerSettings(str(tmp_path / "nowhere"), tmp_path / "engine.log", {"device": "cpu"}))


def test_what_keeps_the_process_from_being_made_is_said_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """A value that cannot travel to the engine's process."""
    arguments = {"device": "cpu", "served_model_name": object()}
    server = SGLangServer(ServerSettings(str(tiny_model), tmp_path / "engine.log", arguments))
    with pytest.raises(EngineStartError, match=r"could not start: TypeError: .*not JSON serializable"):
        server.start()
    server.stop()
