import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from polyvit_fast.model import pretrained
from polyvit_fast.model.pretrained.files import read_files

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


class Payload:
    """What a pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def same(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_safetensors_in_one_file_in_parts_and_with_its_config(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 3}))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        tensors, config = read_files(str(source))
        same(tensors)
        assert config == {"model_type": "vit", "preprocessor": {"size": 3}}
    (tmp_path / "model.safetensors").unlink()
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        save_file({name: tensor}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    same(read_files(str(tmp_path))[0])


@pytest.mark.parametrize("wrapped", [None, "model", "state_dict"])
def test_torchs_own_files(tmp_path, wrapped):
    torch.save({wrapped: TENSORS, "epoch": 3} if wrapped else TENSORS, tmp_path / "weights.pth")
    same(read_files(str(tmp_path / "weights.pth"))[0])


def test_numpys_and_flaxs_bfloat16(tmp_path):
    import msgpack

    exact = torch.tensor([1.5, -2.0, 0.25]).to(torch.bfloat16)
    raw = exact.view(torch.int16).numpy()
    np.savez(tmp_path / "a.npz", x=raw.view("V2"))
    same(read_files(str(tmp_path / "a.npz"))[0], {"x": exact.float()})
    packed = msgpack.packb(((3,), "bfloat16", raw.tobytes()), use_bin_type=True)
    (tmp_path / "b.msgpack").write_bytes(msgpack.packb({"p": {"x": msgpack.ExtType(1, packed), "step": 4}}, use_bin_type=True))
    same(read_files(str(tmp_path / "b.msgpack"))[0], {"p/x": exact.float()})


def test_flaxs_arrays_in_chunks(tmp_path):
    import msgpack

    def array(values):
        return msgpack.ExtType(1, msgpack.packb((values.shape, values.dtype.name, values.tobytes()), use_bin_type=True))

    values = np.arange(6, dtype=np.float32)
    chunks = {"0": array(values[:4]), "1": array(values[4:])}
    content = {"x": {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": chunks}}
    (tmp_path / "checkpoint_5").write_bytes(msgpack.packb(content, use_bin_type=True))
    same(read_files(str(tmp_path / "checkpoint_5"))[0], {"x": torch.arange(6.0).view(2, 3)})


def test_of_flaxs_checkpoints_the_last_is_read(tmp_path):
    import msgpack

    for step in (9, 10):
        packed = msgpack.packb(((), "int64", np.int64(step).tobytes()), use_bin_type=True)
        (tmp_path / f"checkpoint_{step}").write_bytes(msgpack.packb({"x": msgpack.ExtType(1, packed)}, use_bin_type=True))
    same(read_files(str(tmp_path))[0], {"x": torch.tensor(10)})


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, name, legacy):
    canary = tmp_path / "canary"
    content = {"a": torch.zeros(2), "b": Payload(str(canary))}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=f"{name} is broken, or holds more than tensors, and is not loaded"):
        read_files(str(tmp_path / name))
    assert not canary.exists()


def test_arrays_of_objects_are_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    np.savez(tmp_path / "a.npz", x=np.array([Payload(str(canary))], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz is no file of weights that can be read: Object arrays cannot be loaded"):
        read_files(str(tmp_path / "a.npz"))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Payload(str(canary))))
    with pytest.raises(ValueError, match=r"b\.npz"):
        read_files(str(tmp_path / "b.npz"))
    assert not canary.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.pth", "a.msgpack", "checkpoint_1"])
@pytest.mark.parametrize("content", [b"", b"no weights at all, only words", bytes(range(256)) * 4], ids=["empty", "words", "bytes"])
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        pretrained.read(str(tmp_path / name))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.npz: there is no such file or folder"):
        read_files(str(tmp_path / "nowhere.npz"))
    with pytest.raises(ValueError, match=rf"{tmp_path} holds no weights: no \.safetensors"):
        read_files(str(tmp_path))
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 files of weights; name one of them: a\.safetensors, b\.safetensors"):
        read_files(str(tmp_path))


def test_a_broken_config_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json is broken"):
            read_files(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"2 tensors of an unknown format \(.*\); known are timm's ViT"):
        pretrained.read(str(tmp_path))


def test_a_model_of_the_hub_that_cannot_be_fetched_is_named(monkeypatch):
    import huggingface_hub

    def refuse(name, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"there is no such folder \(/.*/someone/some-vit\), and the hub gave none: no route to host"):
        read_files("someone/some-vit")


def test_a_model_of_the_hub_is_read_from_where_the_library_puts_it(monkeypatch, tmp_path):
    import huggingface_hub

    save_file(TENSORS, tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    same(read_files("someone/some-vit")[0])
