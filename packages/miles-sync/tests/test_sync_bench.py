"""The commands bench and verify, and what they measure with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from miles_sync import CorruptError, ManifestError, MismatchError, ModuleReceiver, TensorMeta, serve, tensorfile
from miles_sync.bench.command import main
from miles_sync.bench.engine import FusedReceiver, fused_name
from miles_sync.bench.shapes import NAMED, change, random_tensors, tensors_of
from miles_sync.buckets import Piece, Pieces
from miles_sync.manifest import DTYPES, lay_out
from miles_sync.receivers import fingerprint

TOKEN = "the token of these tests"
HOST = torch.device("cpu")


@pytest.mark.parametrize(("name", "count", "gigabytes"), [("8b", 399, 16.38), ("30b-a3b", 18867, 61.06)])
def test_named_models_have_the_tensors_of_their_checkpoints(name: str, count: int, gigabytes: float) -> None:
    metas = tensors_of(name)
    assert len(metas) == len({meta.name for meta in metas}) == count
    assert round(sum(meta.nbytes for meta in metas) / 1e9, 2) == gigabytes


def test_a_config_gives_the_same_as_its_name(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tensors_of(str(tmp_path)) == NAMED["30b-a3b"].tensors()
    assert tensors_of(str(tmp_path / "config.json"), layers=2) == tensors_of("30b-a3b", layers=2)
    (tmp_path / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 512}))
    with pytest.raises(ValueError, match="kv_lora_rank"):
        tensors_of(str(tmp_path))
    with pytest.raises(ValueError, match="must be one of"):
        tensors_of("9b")


def _checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {f"t.{name}": torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    tensors["empty"] = torch.empty(0, 4)
    names = sorted(tensors)
    tensorfile.write(folder / "a.safetensors", {name: tensors[name] for name in names[::2]}, {"format": "pt"})
    tensorfile.write(folder / "b.safetensors", {name: tensors[name] for name in names[1::2]}, {})
    return tensors


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensors = _checkpoint(tmp_path)
    found = dict(tensorfile.Checkpoint(tmp_path))
    assert found.keys() == tensors.keys() and list(found) == sorted(found)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float())
    assert [meta.name for meta in tensors_of(str(tmp_path))] == list(found)
    with pytest.raises(ManifestError, match="holds no"):
        tensorfile.Checkpoint(tmp_path / "nowhere")


def test_files_are_those_of_the_safetensors_package(tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors.torch", reason="safetensors is not a dependency of this package")
    tensors = _checkpoint(tmp_path)
    loaded = {**theirs.load_file(tmp_path / "a.safetensors"), **theirs.load_file(tmp_path / "b.safetensors")}
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in tensors.items())
    theirs.save_file({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "c.safetensors", {"by": "them"})
    found, notes = tensorfile.read(tmp_path / "c.safetensors")
    assert torch.equal(found["w"], torch.arange(6.0).view(2, 3)) and notes == {"by": "them"}


@pytest.mark.parametrize("fault", ["cut", "long", "header", "dtype", "gap", "no file"])
def test_a_broken_file_is_named(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensorfile.write(path, {"w": torch.zeros(8)}, {})
    data = bytearray(path.read_bytes())
    if fault == "cut":
        data = data[:-1]
    elif fault == "long":
        data[7] = 1
    elif fault == "header":
        data[8] = 0
    elif fault == "dtype":
        data = data.replace(b"F32", b"F33")
    elif fault == "gap":
        data = data.replace(b"[0,32]", b"[1,32]")
    path.write_bytes(data)
    if fault == "no file":
        path.unlink()
    with pytest.raises(CorruptError, match=r"w\.safetensors"):
        tensorfile.read(path)


def test_the_engine_holds_fused_what_was_sent_and_reads_it_back() -> None:
    odd = TensorMeta("model.layers.0.odd", "uint8", (3,))
    metas = [*tensors_of("tiny-moe"), odd, TensorMeta("model.layers.1.odd", "float32", (5,))]
    assert fused_name("model.layers.0.mlp.experts.11.up_proj.weight") == "model.layers.0.mlp.experts.w13.weight"
    assert fused_name("model.layers.0.self_attn.k_proj.bias") == "model.layers.0.self_attn.qkv_proj.bias"
    tensors = random_tensors(metas, HOST, seed=0)
    engine, manifest = FusedReceiver(metas, HOST), lay_out(metas, 0)
    engine.check(manifest)
    engine.begin(manifest, "staged")
    before = engine.fingerprint()()
    pieces = Pieces(Piece(index, 0, tensors[meta.name]) for index, meta in enumerate(metas))
    engine.install(pieces)
    assert engine.fingerprint()() == fingerprint(tensors)() != before
    change(tensors, 1)
    assert engine.fingerprint()() != fingerprint(tensors)()
    with pytest.raises(MismatchError, match=r"1 tensors differ from this model's: model\.layers\.0\.odd"):
        engine.check(lay_out([meta for meta in metas if meta is not odd], 0))


def test_bench_measures_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "tiny",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--mode",
        "in_place",
        "--transport",
        "arena",
        "gloo",
    ]
    assert main([*command, "--no-digest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(meta.nbytes for meta in tensors_of("tiny"))
    assert found["link"]["memcpy_gb_per_s"] > 0 < found["link"]["read_gb_per_s"]
    assert {name: case["live_weights_equal"] for name, case in found["cases"].items()} == {
        "arena in_place": True,
        "arena in_place no digest": None,
        "gloo in_place": True,
        "gloo in_place no digest": None,
    }
    assert all(len(case["pushes"]) == 2 and case["share_of_link"] > 0 for case in found["cases"].values())


def test_verify_with_an_engine_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "tiny-moe", "--device", "cpu", "--transport", "shm", "--mode", "staged"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("equal")


class Forgetful(ModuleReceiver):
    """Loses a weight after it has committed."""

    def commit(self, version: int) -> None:
        super().commit(version)
        with torch.no_grad():
            next(iter(self._module.parameters())).view(-1)[0] += 1


@pytest.mark.parametrize(("kind", "code"), [(ModuleReceiver, 0), (Forgetful, 1)])
def test_verify_against_what_runs(
    kind: type[ModuleReceiver],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("MILES_SYNC_TOKEN", TOKEN)
    module = torch.nn.Linear(4, 4)
    tensorfile.write(tmp_path / "w.safetensors", {"weight": torch.ones(4, 4), "bias": torch.ones(4)}, {})
    with serve(kind(module), token=TOKEN) as server:
        command = ["verify", str(tmp_path), "--target", f"127.0.0.1:{server.port}", "--json"]
        assert main(command) == code
        found = json.loads(capsys.readouterr().out)
        if code:
            assert found["error"] == "DriftError" and "intact" in found["text"]
        else:
            assert main(command) == 0  # the next version
            assert [row["version"] for row in found] == [0, 1]
            assert server.version == 3 and bool(module.weight.eq(1).all())


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["bench", "9b"], "must be one of"),
        (["bench", "235b-a22b", "--device", "cpu"], "use --layers"),
        (["bench", "tiny", "--device", "cpu", "--transport", "nccl"], "use --device"),
        (["verify", "tiny", "--target", "127.0.0.1:1"], "random weights"),
    ],
)
def test_arguments_that_make_no_sense(
    command: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILES_SYNC_TOKEN", TOKEN)
    assert main(command) == 2
    assert text in capsys.readouterr().err
