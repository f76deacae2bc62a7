"""Versions in a folder: full and delta, whole or not there, read by who joins late."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from miles_sync import (
    CommitError,
    CorruptError,
    ModuleReceiver,
    ReceiverTarget,
    SyncError,
    VersionError,
    WeightSync,
    serve,
    tensorfile,
)
from miles_sync.disk import FolderTarget, WeightFolder
from miles_sync.disk.codec import apply, packed
from miles_sync.manifest import DTYPES

TOKEN = "the token of these tests"


def _weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b": torch.randn(300, 400, generator=generator).bfloat16(),
        "a": torch.randn(7, generator=generator),
        "same": torch.ones(5, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(float(seed)),
    }


def _stepped(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As after a training step at a small learning rate: of bfloat16, few elements move, by their last bit."""
    generator = torch.Generator().manual_seed(1)
    moved = torch.rand(weights["b"].shape, generator=generator) < 0.01
    changed = weights["b"].clone().view(torch.int16)
    changed[moved] += 1
    return weights | {"b": changed.view(torch.bfloat16), "scalar": weights["scalar"] + 1}


def _equal(found: object, expected: dict[str, torch.Tensor]) -> bool:
    got = dict(found)  # type: ignore[call-overload]
    return list(got) == list(expected) and all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_change_is_made_again(dtype: torch.dtype) -> None:
    old, new = (torch.randint(0, 2, (9, 5)).to(dtype) for _ in range(2))
    delta, patched = packed(old, new), old.clone()
    apply(patched, delta, "w")
    assert torch.equal(patched.view(torch.uint8), new.view(torch.uint8))
    assert packed(new, new).numel() == 0


def test_a_sparse_change_is_small() -> None:
    before = _weights()
    delta = packed(before["b"], _stepped(before)["b"])
    assert delta.nbytes < 0.02 * before["b"].nbytes


@pytest.mark.parametrize("fault", ["flipped", "cut", "longer", "of another tensor"])
def test_a_broken_change_is_named_and_changes_nothing(fault: str) -> None:
    before = _weights()
    delta = packed(before["b"], _stepped(before)["b"])
    if fault == "flipped":
        delta[len(delta) // 2] ^= 4
    elif fault == "cut":
        delta = delta[: len(delta) // 2]
    elif fault == "longer":
        delta = torch.cat([delta, delta])
    target = before["a"].clone() if fault == "of another tensor" else before["b"].clone()
    kept = target.clone()
    if fault == "longer":
        apply(target, delta, "w")  # a second frame behind the first is not read
        return
    with pytest.raises(CorruptError, match="w: its change"):
        apply(target, delta, "w")
    assert torch.equal(target, kept)


def test_versions_are_published_and_read_by_who_joins_late(tmp_path: Path) -> None:
    folder = WeightFolder(tmp_path, keep=3, full_every=4)
    weights, pushed = _weights(), {}
    with WeightSync([FolderTarget(folder)], token=TOKEN) as sync:
        follower = None
        for version in range(9):
            pushed[version] = weights
            report = sync.push(weights, version)
            sync.check(version, report.digest)
            follower = folder.read(after=follower)
            assert follower.version == version and follower.digest == report.digest and _equal(follower, weights)
            weights = _stepped(weights)
    files = {int(path.parent.name[1:]): path.stem for path in tmp_path.glob("v*/*")}
    assert files == {4: "full", 5: "delta", 6: "delta", 7: "delta", 8: "full"}  # 6 and 7 need 4 and 5
    late = WeightFolder(tmp_path)
    for version in files:
        assert _equal(late.read(version), pushed[version])
    assert _equal(late.read(), pushed[8])
    with pytest.raises(VersionError, match=r"version 2 is not in .* it has \[4, 5, 6, 7, 8\]"):
        late.read(2)
    whole = tensorfile.header_of(tmp_path / "v0000000008" / "full.safetensors")[2]
    assert tensorfile.header_of(tmp_path / "v0000000007" / "delta.safetensors")[2] < 0.05 * whole


def test_what_was_read_is_pushed_on(tmp_path: Path) -> None:
    trained, engine = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    with WeightSync([FolderTarget(tmp_path)], token=TOKEN, mode="in_place") as sync:
        digest = sync.push(trained, 5).digest
    published = WeightFolder(tmp_path).read()
    with (
        serve(ModuleReceiver(engine), token=TOKEN) as server,
        WeightSync([ReceiverTarget(server.host, server.port)], token=TOKEN) as sync,
    ):
        assert sync.push(published, published.version).digest == digest == published.digest
        sync.check(5, digest)
    assert torch.equal(engine.weight, trained.weight)


def test_a_trainer_that_comes_back_goes_on_where_the_folder_is(tmp_path: Path) -> None:
    for start in (0, 2):
        with WeightSync([FolderTarget(tmp_path)], token=TOKEN) as sync:
            if start:
                assert sync.status()[0].version == 1
                assert sync.push(_weights(1), 1).routes[0].transport == "none"  # it is there
                with pytest.raises(VersionError):
                    sync.push(_weights(5), 1)
                with pytest.raises(VersionError, match="versions only grow"):
                    sync.push(_weights(0), 0)
            for version in (start, start + 1):
                sync.push(_weights(version), version)
    assert [WeightFolder(tmp_path).read(v).version for v in range(4)] == [0, 1, 2, 3]


def test_other_shapes_are_a_full_version(tmp_path: Path) -> None:
    with WeightSync([FolderTarget(tmp_path)], token=TOKEN) as sync:
        sync.push({"w": torch.zeros(4)}, 0)
        sync.push({"w": torch.zeros(5)}, 1)
    assert (tmp_path / "v0000000001" / "full.safetensors").exists()


def _two(path: Path) -> WeightFolder:
    with WeightSync([FolderTarget(path)], token=TOKEN) as sync:
        weights = _weights()
        sync.push(weights, 0)
        sync.push(_stepped(weights), 1)
    return WeightFolder(path)


@pytest.mark.parametrize("fault", ["flipped", "cut", "no base", "no file", "bytes of the base", "lies", "no number"])
def test_a_broken_folder_is_named(fault: str, tmp_path: Path) -> None:
    folder = _two(tmp_path)
    full, delta = tmp_path / "v0000000000" / "full.safetensors", tmp_path / "v0000000001" / "delta.safetensors"
    if fault == "flipped":
        data = bytearray(delta.read_bytes())
        data[-20] ^= 1
        delta.write_bytes(data)
    elif fault == "cut":
        delta.write_bytes(delta.read_bytes()[:-1])
    elif fault == "no base":
        shutil.rmtree(full.parent)
    elif fault == "no file":
        delta.unlink()
    elif fault == "bytes of the base":
        data = bytearray(full.read_bytes())
        data[-100] ^= 1
        full.write_bytes(data)
    elif fault == "lies":
        delta.write_bytes(delta.read_bytes().replace(b'\\"base\\":0', b'\\"base\\":1'))
    else:
        (tmp_path / "latest").write_text("x\n")
    with pytest.raises((CorruptError, VersionError), match=r"v000000000|latest|version 0 is not in"):
        folder.read()


def test_the_next_full_version_heals_a_broken_chain(tmp_path: Path) -> None:
    folder = _two(tmp_path)
    shutil.rmtree(tmp_path / "v0000000000")
    with WeightSync([FolderTarget(folder)], token=TOKEN) as sync:
        sync.push(_weights(2), 2)
    assert _equal(folder.read(), _weights(2))


def test_a_writer_that_dies_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _two(tmp_path)

    def die(self: WeightFolder, version: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(WeightFolder, "_say_latest", die)
        with WeightSync([FolderTarget(folder)], token=TOKEN) as sync:
            with pytest.raises(CommitError, match="no space left"):
                sync.push(_weights(2), 2)
            assert folder.read().version == 1 and folder.latest() == 1
    with WeightSync([FolderTarget(folder)], token=TOKEN) as sync:
        sync.push(_weights(3), 2)
    assert _equal(folder.read(), _weights(3)) and not list(tmp_path.glob(".writing*"))


def test_a_folder_beside_an_engine(tmp_path: Path) -> None:
    engine = torch.nn.Linear(4, 3)
    with serve(ModuleReceiver(engine), token=TOKEN) as server:
        targets = [ReceiverTarget(server.host, server.port), FolderTarget(tmp_path)]
        with WeightSync(targets, token=TOKEN) as sync:
            report = sync.push(torch.nn.Linear(4, 3), 0)
            sync.check(0, report.digest)
    assert WeightFolder(tmp_path).read().digest == report.digest
    notes = tensorfile.header_of(tmp_path / "v0000000000" / "full.safetensors")[1]
    assert json.loads(notes["miles-sync"])["digest"] == report.digest


def test_an_empty_folder_and_wrong_bounds(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match="no version yet"):
        WeightFolder(tmp_path).read()
    with pytest.raises(ValueError, match="keep=0"):
        WeightFolder(tmp_path, keep=0)
