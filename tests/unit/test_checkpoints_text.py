"""Text encoders of a Diffusers folder: what is loaded, and what is said when it cannot be."""

import json
import shutil

import pytest
import torch

from fluxlab.checkpoints import CheckpointError, load_text_encoders
from tests.tiny import diffusers_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def complaint(folder, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        load_text_encoders(folder, **kwargs)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_encoders_as_diffusers(saved, dtype):
    from diffusers import FluxPipeline

    expected = FluxPipeline.from_pretrained(saved, torch_dtype=dtype or torch.float32)
    clip_tokenizer, clip, t5_tokenizer, t5 = load_text_encoders(saved, dtype=dtype)
    for found, other in ((clip, expected.text_encoder), (t5, expected.text_encoder_2)):
        assert type(found) is type(other)
        assert not found.training
        for name, tensor in other.state_dict().items():
            assert found.state_dict()[name].dtype == tensor.dtype
            assert torch.equal(found.state_dict()[name], tensor)
    for found, other in ((clip_tokenizer, expected.tokenizer), (t5_tokenizer, expected.tokenizer_2)):
        assert found("a red fox").input_ids == other("a red fox").input_ids


def test_folders_that_are_not_there(folder):
    shutil.rmtree(folder / "tokenizer_2")
    message = complaint(folder)
    assert "holds no text encoders" in message
    assert "of which tokenizer_2 are missing" in message
    assert "no such path" in complaint(folder / "nowhere")


def test_damaged_and_missing_files(folder):
    weights = folder / "text_encoder_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = complaint(folder)
    assert str(weights) in message
    assert "truncated" in message
    weights.rename(weights.with_name("model.bin"))
    assert "model.bin: a pickle" in complaint(folder)
    (folder / "text_encoder_2" / "config.json").unlink()
    assert "text_encoder_2/config.json: no such file" in complaint(folder)


def test_missing_and_unexpected_tensors(folder):
    from safetensors.torch import load_file, save_file

    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    lost = next(name for name in state if "fc1.weight" in name)
    save_file(
        {name: t for name, t in state.items() if name != lost} | {"extra": torch.zeros(1)}, weights, {"format": "pt"}
    )
    message = complaint(folder)
    assert "1 missing (" in message
    assert "fc1.weight" in message
    assert "1 unexpected (extra)" in message
    save_file(state | {lost: torch.zeros(3, 3)}, weights, {"format": "pt"})
    assert str(folder / "text_encoder") in complaint(folder)


def test_other_models(folder):
    config = folder / "text_encoder_2" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "quantization_config": {"quant_method": "bitsandbytes"}}))
    assert "quantised" in complaint(folder)
    config.write_text(json.dumps({**values, "model_type": "qwen2"}))
    assert "model_type is 'qwen2', expected 't5'" in complaint(folder)


def test_tokenizers_that_cannot_be(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    assert str(folder / "tokenizer") in complaint(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", "pipeline"]}))
    assert "'pipeline', which is not a tokenizer" in complaint(folder)


def test_encoders_that_do_not_fit(folder, monkeypatch):
    monkeypatch.setattr("fluxlab.checkpoints.memory.free_memory", lambda device: 1000)
    assert "text encoders: does not fit cpu" in complaint(folder, dtype=torch.bfloat16)
    load_text_encoders(folder)
    load_text_encoders(folder, dtype=torch.bfloat16, check_memory=False)
