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
    state = {name: t.clone() for name, t in load_file(weights).items()}  # the file is written again below
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


# --- single files ---------------------------------------------------------------------------------


@pytest.fixture
def single(folder, tmp_path):
    """A folder with clip_l and t5xxl files and both tokenizers, as other tools keep them."""
    target = tmp_path / "te"
    target.mkdir()
    shutil.copy(folder / "text_encoder" / "model.safetensors", target / "clip_l.safetensors")
    shutil.copy(folder / "text_encoder_2" / "model.safetensors", target / "t5xxl_fp16.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, target / name)
    return target


def states(encoders, prompt="a red fox"):
    clip_tokenizer, clip, t5_tokenizer, t5 = encoders
    with torch.inference_mode():
        ids = [tokenizer([prompt], return_tensors="pt").input_ids for tokenizer in (clip_tokenizer, t5_tokenizer)]
        return clip(ids[0]).pooler_output, t5(ids[1])[0]


def test_single_files_compute_what_the_folder_does(folder, single):
    expected = states(load_text_encoders(folder))
    for path in (single, single / "clip_l.safetensors", single / "t5xxl_fp16.safetensors"):
        assert all(map(torch.equal, states(load_text_encoders(path)), expected))


def test_tokenizers_of_another_folder(folder, single):
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(single / name)
    expected = states(load_text_encoders(folder))
    assert all(map(torch.equal, states(load_text_encoders(single, tokenizers=folder)), expected))
    assert "tokenizers" in complaint(single, tokenizers=single)


def test_missing_tokenizers_are_an_error_where_they_are_used(single):
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(single / name)
    clip_tokenizer, clip, t5_tokenizer, _ = load_text_encoders(single)  # offline: FLUX.1's cannot be fetched
    assert clip.config.num_hidden_layers == 2
    for tokenizer in (clip_tokenizer, t5_tokenizer):
        for use in (lambda t: t("a red fox"), lambda t: t.model_max_length):
            with pytest.raises(CheckpointError, match="Pass tokenizers="):
                use(tokenizer)


def test_tokenizers_with_more_tokens_than_the_encoder(folder, single):
    from safetensors.torch import load_file, save_file

    file = single / "clip_l.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    save_file({**state, name: state[name][:5].clone()}, file)
    assert "knows 5 only" in complaint(single)


def test_several_files_of_one_encoder(single):
    shutil.copy(single / "t5xxl_fp16.safetensors", single / "t5xxl_fp8.safetensors")
    message = complaint(single)
    assert "2 T5 encoder files: t5xxl_fp16.safetensors, t5xxl_fp8.safetensors" in message
    load_text_encoders(single / "t5xxl_fp8.safetensors")


def test_an_encoder_that_is_missing(single):
    (single / "t5xxl_fp16.safetensors").unlink()
    assert "the T5 encoder is missing" in complaint(single)
    assert "the T5 encoder is missing" in complaint(single / "clip_l.safetensors")


def test_float8_encoders(single):
    from safetensors.torch import load_file, save_file

    for file in single.glob("*.safetensors"):
        save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)
    for dtype in (None, torch.float16):
        _, clip, _, t5 = load_text_encoders(single, dtype=dtype)
        assert clip.dtype == t5.dtype == (dtype or torch.bfloat16)
    stored = load_file(single / "t5xxl_fp16.safetensors")["shared.weight"]
    assert torch.equal(t5.shared.weight.float(), stored.float())


def test_a_whole_clip_model(folder):
    """With its image encoder, projections and logit scale, as many tools ship it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config=config.to_dict(), vision_config=vision, projection_dim=16))
    shutil.rmtree(folder / "text_encoder")
    whole.save_pretrained(folder / "text_encoder")
    clip = load_text_encoders(folder)[1]
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(clip(ids).last_hidden_state, whole.text_model.eval()(ids).last_hidden_state)


def test_a_whole_t5_model(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config.from_pretrained(folder / "text_encoder_2")
    config.is_encoder_decoder, config.use_cache, config.num_decoder_layers = True, True, 1
    torch.manual_seed(0)
    whole = T5ForConditionalGeneration(config).eval()
    shutil.rmtree(folder / "text_encoder_2")
    whole.save_pretrained(folder / "text_encoder_2")
    t5 = load_text_encoders(folder)[3]
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(t5(ids)[0], whole.encoder(ids)[0])


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_the_names_of_clip_before_and_after_transformers_5_6(folder, prefix):
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder" / "model.safetensors"
    expected = load_text_encoders(folder)[1]
    state = {prefix + name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    save_file(state, file.with_suffix(".renamed"))  # not in place: `expected` may be mapped from the file
    file.with_suffix(".renamed").replace(file)
    loaded = load_text_encoders(folder)[1].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.state_dict().items())


def test_the_files_decide_the_dtype_not_the_config(folder):
    from safetensors.torch import load_file, save_file

    for name in ("text_encoder", "text_encoder_2"):
        file = folder / name / "model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
        config = folder / name / "config.json"
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "dtype": "float32", "torch_dtype": "float32"}))
    _, clip, _, t5 = load_text_encoders(folder)
    assert {weight.dtype for model in (clip, t5) for weight in model.parameters()} == {torch.bfloat16}
