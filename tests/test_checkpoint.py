"""Files are whole or not there; loading is strict and says what does not fit; a full model survives the round trip."""

import json
import os
import shutil

import pytest
import torch
from torch import nn

from ldm_minimal import LatentDiffusion, checkpoint
from ldm_minimal.checkpoint import CheckpointError, atomic, load_into, load_json, load_tensors, save_json, save_tensors
from ldm_minimal.run import load_vae


def test_tensors_and_their_meta_survive_the_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4).half(), "t": torch.randn(2, 3).T}
    digest = save_tensors(tmp_path / "x.safetensors", tensors, {"step": 3, "scale": 0.1})
    loaded, meta = load_tensors(tmp_path / "x.safetensors")
    assert meta == {"step": 3, "scale": 0.1} and digest == checkpoint.sha256(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    save_json(path, {"a": 1})
    with pytest.raises(RuntimeError):
        with atomic(path) as part:
            part.write_text("half of")
            raise RuntimeError("killed")
    assert load_json(path) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(TypeError):
        save_json(path, {"a": object()})
    assert load_json(path) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_is_an_error_that_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)})

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(2)) and os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_tensor_file_cut_off_anywhere_is_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(20)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="x.safetensors.*cut off"):
        load_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.json is not there"):
        load_json(tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match="nowhere.safetensors is not there"):
        load_tensors(tmp_path / "nowhere.safetensors")


def test_strict_loading_names_missing_unexpected_and_misshapen_keys():
    net, other = nn.Linear(3, 2), {"weight": torch.ones(2, 4), "extra": torch.ones(1)}
    with pytest.raises(CheckpointError) as error:
        load_into(net, other, "file F")
    for part in ("file F", "missing: bias", "unexpected: extra", "weight: (2, 4) in the file, (2, 3) in the network"):
        assert part in str(error.value)


def test_weights_that_hold_nan_are_refused():
    with pytest.raises(CheckpointError, match="NaN or infinity: bias"):
        load_into(nn.Linear(1, 1), {"weight": torch.ones(1, 1), "bias": torch.tensor([float("nan")])}, "F")


@pytest.fixture
def copied(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_model_survives_save_and_load_and_samples_the_same(copied, tmp_path):
    model = LatentDiffusion.load(copied)
    model.save(tmp_path / "again")
    again = LatentDiffusion.load(tmp_path / "again")
    assert again.scale == model.scale and again.meta == model.meta and again.config == model.config
    assert torch.equal(model.sample(["Bag", 3], steps=3), again.sample(["Bag", 3], steps=3))


def test_half_precision_weights_load_into_float32(copied, tmp_path):
    model = LatentDiffusion.load(copied)
    model.save(tmp_path / "half", half=True)
    half = LatentDiffusion.load(tmp_path / "half")
    assert next(half.vae.parameters()).dtype == torch.float32
    assert (tmp_path / "half" / "vae.safetensors").stat().st_size < 0.6 * (copied / "vae.safetensors").stat().st_size
    assert (model.sample([1], steps=2) - half.sample([1], steps=2)).abs().max() < 0.05


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes, message", [
    ({"latent_scale": -1.0}, "scale"), ({"latent_scale": "big"}, "scale"), ({"latent_scale": None}, "scale"), ({"net": "gan"}, "gan"),
    ({"dataset": "cifar"}, "cifar"), ({"vae": {"beta": 1.0}}, "VAEConfig"), ({"vae": None}, "VAEConfig"),
    ({"denoiser": {"schedule": "quadratic", "target": "v", "times": "uniform", "drop": 0.1}}, "quadratic.*cosine, linear"),
    ({"files": {}}, "vae"), ({"latent_shape": 7}, "latent_shape|built|int"),
])
def test_a_description_edited_by_hand_is_refused_with_a_reason(copied, changes, message):
    edit(copied / "model.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        LatentDiffusion.load(copied)


def test_a_description_that_is_no_json_is_refused(copied):
    (copied / "model.json").write_text((copied / "model.json").read_text()[:-30])
    with pytest.raises(CheckpointError, match="no valid JSON"):
        LatentDiffusion.load(copied)
    (copied / "model.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="JSON object"):
        LatentDiffusion.load(copied)


def test_weights_swapped_for_others_of_the_same_shape_are_noticed(copied):
    tensors, _ = load_tensors(copied / "vae.safetensors")
    save_tensors(copied / "vae.safetensors", {k: v + 1 for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match="checksum"):
        LatentDiffusion.load(copied)


def test_weights_of_another_architecture_name_the_keys(copied):
    description = json.loads((copied / "model.json").read_text())
    edit(copied / "model.json", unet=description["unet"] | {"channels": [32, 64]})
    with pytest.raises(CheckpointError, match="another architecture; of another shape: down.0.0.conv1.bias"):
        LatentDiffusion.load(copied)


def test_the_autoencoder_loads_from_a_run_folder_and_from_a_model_description(copied):
    a, b = load_vae(copied), load_vae(copied / "model.json")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
