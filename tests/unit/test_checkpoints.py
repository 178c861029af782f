"""What can be wrong with a checkpoint, and what is said about it; and files that stay whole."""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxlab import checkpoints
from fluxlab.checkpoints import (
    CheckpointError,
    find,
    load_autoencoder,
    load_transformer,
    save_autoencoder,
    save_transformer,
)
from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams

PARAMS = FluxParams(
    in_channels=8,
    out_channels=8,
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=64,
    mlp_ratio=4.0,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(4, 14, 14),
    theta=10000,
    qkv_bias=True,
    guidance_embed=False,
)
SIZES = AutoEncoderParams(32, 3, 32, 3, (1, 2), 1, 4, 0.3611, 0.1159)


@pytest.fixture
def flux():
    torch.manual_seed(0)
    return Flux(PARAMS)


@pytest.fixture
def folder(tmp_path, flux):
    """A Diffusers folder of both networks, the transformer in several shards."""
    save_transformer(flux, tmp_path / "model" / "transformer", layout="diffusers", max_shard_size=200_000)
    save_autoencoder(AutoEncoder(SIZES), tmp_path / "model" / "vae", layout="diffusers")
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return tmp_path / "model"


@pytest.fixture
def file(tmp_path, flux):
    save_transformer(flux, tmp_path / "flux1-small.safetensors")
    return tmp_path / "flux1-small.safetensors"


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert 1 <= len(message.splitlines()) <= 3
    assert all(line.strip() for line in message.splitlines())
    assert len(message) < 1200
    return message


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


# --- what is where --------------------------------------------------------------------------------


def test_find_says_what_is_there(folder, file, tmp_path):
    assert find(folder) == checkpoints.Found("pipeline", folder)
    assert find(str(folder / "transformer")).kind == "transformer"
    assert find(folder / "vae").kind == "autoencoder"
    assert find(file).kind == "transformer"
    assert find(tmp_path) == checkpoints.Found("originals", tmp_path)


def test_a_folder_of_original_files_serves_both_loaders(tmp_path, file):
    save_autoencoder(AutoEncoder(SIZES), tmp_path / "ae.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"x")
    assert load_transformer(tmp_path).params == PARAMS
    assert load_autoencoder(tmp_path).params == SIZES
    shutil.copy(file, tmp_path / "flux1-other.safetensors")
    message = complaint(load_transformer, tmp_path)
    assert "2 transformer files: flux1-other.safetensors, flux1-small.safetensors" in message


def test_no_such_path(tmp_path):
    message = complaint(load_transformer, tmp_path / "nothing" / "here")
    assert f"{tmp_path}/nothing/here: no such path ({tmp_path} exists)" in message
    assert "hub id" in message
    assert "no such path" in complaint(load_transformer, "nowhere.safetensors")
    assert "no such path" in complaint(find, "./some/folder")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    message = complaint(load_transformer, tmp_path)
    assert str(tmp_path) in message
    assert "empty" in message
    assert "Looked for model_index.json, transformer/config.json, config.json" in message
    (tmp_path / "notes.txt").touch()
    assert "notes.txt" in complaint(find, tmp_path)
    assert "vae/config.json" in complaint(load_autoencoder, tmp_path)


def test_a_pipeline_of_another_kind(folder):
    shutil.rmtree(folder / "transformer")
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    for call in (load_transformer, find):
        assert "StableDiffusionPipeline folder without transformer/config.json" in complaint(call, folder)


def test_a_network_of_another_class(folder):
    edit_json(folder / "transformer" / "config.json", _class_name="SD3Transformer2DModel")
    message = complaint(load_transformer, folder)
    assert "transformer/config.json: _class_name is 'SD3Transformer2DModel'" in message
    assert "FluxTransformer2DModel" in message
    assert "load_autoencoder reads this one" in complaint(load_transformer, folder / "vae")
    assert "SD3Transformer2DModel" in complaint(find, folder / "transformer")


def test_the_other_network_or_none(file, tmp_path):
    assert "load_transformer reads this one" in complaint(load_autoencoder, file)
    save_file({"lora_down.weight": torch.zeros(3)}, tmp_path / "lora.safetensors")
    for call in (find, load_transformer, load_autoencoder):
        message = complaint(call, tmp_path / "lora.safetensors")
        assert "a LoRA, not a whole model" in message


def test_one_file_of_a_diffusers_folder(folder):
    shard = next((folder / "transformer").glob("*.safetensors"))
    for call in (find, load_transformer):
        assert f"Pass the folder: {folder / 'transformer'}" in complaint(call, shard)
    assert "pass the folder it lies in" in complaint(load_transformer, folder / "transformer" / "config.json")


def test_no_config_beside_the_weights(folder):
    (folder / "transformer" / "config.json").unlink()
    assert "no config.json next to its weights" in complaint(load_transformer, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_damaged_config(folder, text):
    (folder / "transformer" / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "transformer/config.json" in complaint(load_transformer, folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 2}, "patch_size is 2"),
        ({"num_layers": "2"}, "num_layers is '2'"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_layers": 1_000_000}, "blocks by its sizes, but only"),
        ({"axes_dims_rope": [4, 4, 4]}, "axes_dim (4, 4, 4)"),
        ({"axes_dims_rope": 4}, "axes_dims_rope is 4"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"joint_attention_dim": 10**18, "in_channels": 10**18}, "no transformer can have these sizes"),
        ({"attention_type": "linear"}, "'attention_type' 'linear' is not a setting of FLUX.1"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights"),
    ],
)
def test_a_transformer_config_that_flux_does_not_have(folder, changes, words):
    edit_json(folder / "transformer" / "config.json", **changes)
    message = complaint(load_transformer, folder)
    assert words in message
    assert str(folder / "transformer") in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_quant_conv", True),
        ("use_post_quant_conv", True),
        ("latents_mean", [0.0]),
        ("latents_std", [1.0]),
        ("mid_block_add_attention", False),
        ("act_fn", "gelu"),
        ("norm_num_groups", 16),
        ("down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("block_out_channels", [64, 96]),
        ("block_out_channels", []),
        ("block_out_channels", [0, 0]),
    ],
)
def test_an_autoencoder_config_that_flux_does_not_have(folder, key, value):
    edit_json(folder / "vae" / "config.json", **{key: value})
    message = complaint(load_autoencoder, folder)
    assert "vae/config.json" in message
    assert key in message


def test_an_autoencoder_config_without_the_key_means_quantisation_layers(folder):
    values = json.loads((folder / "vae" / "config.json").read_text())
    del values["use_quant_conv"]
    (folder / "vae" / "config.json").write_text(json.dumps(values))
    assert "use_quant_conv is True" in complaint(load_autoencoder, folder)


# --- tensors --------------------------------------------------------------------------------------


def rewrite(file, change):
    state = load_file(file)
    change(state)
    save_file(state, file)


def test_missing_unexpected_and_misshaped_tensors_are_counted(file):
    def change(state):
        for name in list(state):
            if name.startswith("single_blocks.1."):
                del state[name]
        state["single_blocks.1.extra"] = torch.zeros(1)
        state["lora.up"] = torch.zeros(1)
        state["txt_in.bias"] = torch.zeros(65)

    rewrite(file, change)
    message = complaint(load_transformer, file)
    assert str(file) in message
    assert "8 missing (single_blocks.1." in message
    assert "2 unexpected (" in message
    assert "lora.up" in message
    assert "1 of another shape (txt_in.bias (65,) instead of (64,))" in message


def test_many_missing_tensors_make_a_short_message(file):
    rewrite(file, lambda state: [state.pop(name) for name in list(state) if "single_blocks.0" in name])
    message = complaint(load_transformer, file)
    assert "8 missing" in message
    assert message.count("single_blocks") == 3


@pytest.mark.parametrize("bare", [False, True])
def test_what_is_missing_is_counted_where_it_told_the_sizes_too(file, flux, bare):
    state = flux.state_dict()
    lost = [n for n in state if n.endswith("_in.weight") or n.startswith(("final_layer.linear", "vector_in.in_layer"))]
    lost += ["single_blocks.1.norm.query_norm.scale", "double_blocks.0.img_mlp.0.weight"]
    kept = {name: tensor for name, tensor in state.items() if name not in lost}
    save_file(kept, file, None if bare else {"fluxlab_params": json.dumps(PARAMS.__dict__)})
    message = complaint(load_transformer, file)
    assert f"of {len(state)} tensors {len(lost)} missing (" in message
    assert "unexpected" not in message
    assert "another shape" not in message


def test_what_an_autoencoder_lacks_is_counted(tmp_path):
    state = AutoEncoder(SIZES).state_dict()
    lost = [name for name in state if "conv_in.weight" in name or "conv_out.weight" in name or "conv1.bias" in name]
    save_file({name: tensor for name, tensor in state.items() if name not in lost}, tmp_path / "ae.safetensors")
    message = complaint(load_autoencoder, tmp_path / "ae.safetensors")
    assert f"of {len(state)} tensors {len(lost)} missing (" in message
    assert "another shape" not in message


def test_tensors_of_a_folder(folder):
    edit_json(folder / "transformer" / "config.json", num_layers=2, guidance_embeds=True, in_channels=9)
    message = complaint(load_transformer, folder)
    assert "36 missing (time_text_embed.guidance_embedder.linear_1.weight" in message
    assert "x_embedder.weight (64, 8) instead of (64, 9)" in message


def test_metadata_that_does_not_fit(file, flux):
    save_file(flux.state_dict(), file, {"fluxlab_params": "{}"})
    assert "metadata fluxlab_params is not a FluxParams" in complaint(load_transformer, file)
    save_file(flux.state_dict(), file, {"fluxlab_params": "nonsense"})
    assert "fluxlab_params" in complaint(load_transformer, file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda data: b"", "empty (0 bytes)"),
        (lambda data: data[:4], "truncated or corrupt: 4 bytes"),
        (lambda data: data[:2000], "truncated or corrupt: 2,000 bytes"),
        (lambda data: data[:-1], "truncated or corrupt"),
        (lambda data: data + b"1", "truncated or corrupt"),
        (lambda data: data[:8] + b"\xff" * 40 + data[48:], "truncated or corrupt"),
        (lambda data: b"\0" * 4096, "truncated or corrupt"),
        (lambda data: b"<html>Sign in to continue</html>", "truncated or corrupt"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (lambda data: b"GGUF" + data, "quantised"),
    ],
)
def test_damaged_files(file, content, words):
    file.write_bytes(content(file.read_bytes()))
    for call in (load_transformer, load_autoencoder, find):
        message = complaint(call, file)
        assert words in message
        assert str(file) in message


def test_a_file_that_cannot_be_mapped(file, monkeypatch):
    """Linux refuses to map a file that is larger than the memory, for instance FLUX.2 [dev] as one file."""

    def refuse(*_, **__):
        raise RuntimeError("unable to mmap 64446598712 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr("fluxlab.checkpoints.files.safe_open", refuse)
    message = complaint(load_transformer, file)
    assert "cannot be mapped into memory (unable to mmap 64446598712 bytes" in message
    assert "Diffusers folder" in message


def test_a_damaged_shard_is_named(folder):
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    assert str(shard) in complaint(load_transformer, folder)


def test_a_folder_instead_of_a_file(folder):
    shard = sorted((folder / "transformer").glob("*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()
    assert "shards missing" in complaint(load_transformer, folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_quantised_weights(file, dtype):
    def change(state):
        state["single_blocks.0.linear1.weight"] = torch.zeros(448, 64).to(dtype)

    rewrite(file, change)
    message = complaint(load_transformer, file)
    assert "quantised weights" in message
    assert "single_blocks.0.linear1.weight" in message
    assert "bfloat16" in message


def test_gguf_is_quantised(tmp_path):
    (tmp_path / "flux1-dev-Q4.gguf").write_bytes(b"GGUF")
    assert "quantised" in complaint(load_transformer, tmp_path / "flux1-dev-Q4.gguf")


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt", "pth", "pkl", "CKPT"])
def test_pickles_are_refused(tmp_path, folder, suffix):
    path = tmp_path / f"flux.{suffix}"
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    message = complaint(load_transformer, path)
    assert str(path) in message
    assert "refused" in message
    assert "safetensors" in message


def test_folders_of_pickles_are_refused(folder, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "flux.ckpt").touch()
    assert "refused" in complaint(load_transformer, tmp_path / "old")
    for file in (folder / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    message = complaint(load_autoencoder, folder)
    assert "diffusion_pytorch_model.bin: a pickle" in message


def test_an_index_of_pickles_is_refused(folder):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    (folder / "transformer" / "a.bin").touch()
    edit_json(index, weight_map={"x_embedder.weight": "a.bin"})
    assert "a.bin: a pickle" in complaint(load_transformer, folder)


def test_missing_variants_name_those_there(folder):
    message = complaint(load_transformer, folder, variant="fp16")
    assert "weights for no variant only" in message
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in message
    vae = folder / "vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bf16.safetensors")
    for variant in (None, "fp16"):
        assert "weights for variant='bf16' only" in complaint(load_autoencoder, folder, variant=variant)
    assert load_autoencoder(folder, variant="bf16").params == SIZES


def test_no_weights(folder):
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    assert "no weights; looked for diffusion_pytorch_model.safetensors" in complaint(load_autoencoder, folder)


# --- the shard index ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/x.safetensors", "..", ""])
def test_an_index_that_points_outside_its_folder(folder, file, place):
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    shutil.copy(file, folder / "outside.safetensors")
    weights = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weights, "x_embedder.weight": place})
    message = complaint(load_transformer, folder)
    assert str(index) in message
    assert f"points outside its folder: {place}" in message


@pytest.mark.parametrize("value", [None, {}, [], {"a": 1}])
def test_an_index_without_a_map(folder, value):
    edit_json(folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json", weight_map=value)
    assert "no weight_map" in complaint(load_transformer, folder)


def test_missing_shards(folder):
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    shards[0].unlink()
    message = complaint(load_transformer, folder)
    assert f"1 of its {len(shards)} shards missing: {shards[0].name}" in message


def test_shards_may_be_links_as_in_the_hubs_cache(folder, tmp_path, flux):
    (tmp_path / "blobs").mkdir()
    for i, shard in enumerate((folder / "transformer").iterdir()):
        shard.rename(tmp_path / "blobs" / str(i))
        shard.symlink_to(f"../../blobs/{i}")
    assert all(map(torch.equal, load_transformer(folder).state_dict().values(), flux.state_dict().values()))


def test_a_tensor_in_two_shards(folder):
    first, second = sorted((folder / "transformer").glob("*.safetensors"))[:2]
    state = load_file(second)
    save_file(state | {next(iter(load_file(first))): torch.zeros(1)}, second)
    assert "is in another shard too" in complaint(load_transformer, folder)


# --- device and dtype -----------------------------------------------------------------------------


def test_a_model_that_does_not_fit(file, folder, monkeypatch):
    monkeypatch.setattr("fluxlab.checkpoints.memory.free_memory", lambda device: 100_000)
    message = complaint(load_transformer, file, dtype=torch.float64)
    assert str(file) in message
    assert "does not fit cpu" in message
    size = sum(p.numel() for p in Flux(PARAMS).parameters()) * 8
    assert f"{size / 1e6:.1f} MB needed, 0.1 MB free, {(size - 100_000) / 1e6:.1f} MB short" in message
    assert f"dtype=torch.bfloat16 needs {size / 4e6:.1f} MB" in message
    assert "does not fit" in complaint(load_autoencoder, folder, dtype=torch.bfloat16)
    load_transformer(file)  # mapped: takes none of the free memory
    load_transformer(file, dtype=torch.float64, check_memory=False)


def test_mapped_weights_need_only_fit_the_machine(file, folder, monkeypatch):
    monkeypatch.setattr("fluxlab.checkpoints.memory.total_memory", lambda: 100_000)
    for path in (file, folder):
        message = complaint(load_transformer, path)
        assert "0.1 MB in all" in message
        assert "check_memory=False" in message
        load_transformer(path, check_memory=False)


def test_nothing_is_read_before_the_check(file, monkeypatch):
    monkeypatch.setattr("fluxlab.checkpoints.memory.free_memory", lambda device: 0)
    monkeypatch.setattr("fluxlab.checkpoints.files.Entry.read", lambda entry: pytest.fail("a tensor was read"))
    complaint(load_transformer, file, dtype=torch.bfloat16)


def test_another_device_would_help(monkeypatch):
    from fluxlab.checkpoints import check_fits

    monkeypatch.setattr("fluxlab.checkpoints.memory.free_memory", lambda device: 20 * 10**9)
    message = complaint(check_fits, {torch.bfloat16: 24 * 10**9}, torch.device("cuda"), "flux1-dev.safetensors")
    assert "does not fit cuda: 24.0 GB needed, 20.0 GB free, 4.0 GB short" in message
    assert "pass another device" in message
    check_fits({torch.bfloat16: 19 * 10**9}, torch.device("cuda"), "flux1-dev.safetensors")
    monkeypatch.setattr("fluxlab.checkpoints.memory.free_memory", lambda device: None)
    check_fits({torch.bfloat16: 10**15}, torch.device("cuda"), "where the system does not say")


def test_this_machine_has_memory():
    from fluxlab.checkpoints.memory import free_memory, total_memory

    assert 0 < free_memory(torch.device("cpu")) <= total_memory()


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_devices_that_are_not_there(file, device):
    assert device in complaint(load_transformer, file, device=device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "bfloat16"])
def test_dtypes_that_weights_cannot_have(file, dtype):
    assert "torch.bfloat16" in complaint(load_transformer, file, dtype=dtype)


def test_parts_of_different_dtypes(folder):
    for shard in (folder / "transformer").glob("*.safetensors"):
        rewrite(shard, lambda state: state.update({k: v.bfloat16() for k, v in state.items() if "to_k" in k}))
    dtypes = {weight.dtype for weight in load_transformer(folder).state_dict().values()}
    assert dtypes == {torch.float32}  # of most parameters
    assert load_transformer(folder, dtype=torch.bfloat16).img_in.weight.dtype == torch.bfloat16


# --- scratch --------------------------------------------------------------------------------------


def test_a_full_scratch_disk(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("fluxlab.checkpoints.read.JOIN_IN_MEMORY", 0)
    monkeypatch.setenv("FLUXLAB_SCRATCH", str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    message = complaint(load_transformer, folder)
    assert str(tmp_path) in message
    assert "FLUXLAB_SCRATCH" in message
    monkeypatch.undo()
    monkeypatch.setattr("fluxlab.checkpoints.read.JOIN_IN_MEMORY", 0)
    monkeypatch.setenv("FLUXLAB_SCRATCH", str(tmp_path / "missing"))
    assert "FLUXLAB_SCRATCH" in complaint(load_transformer, folder)


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("scratch", [False, True])
def test_training_never_writes_into_the_files(folder, file, tmp_path, monkeypatch, scratch):
    if scratch:
        monkeypatch.setattr("fluxlab.checkpoints.read.JOIN_IN_MEMORY", 0)
    before = digest(tmp_path)
    for path in (folder, file):
        model = load_transformer(path)
        assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        again = load_transformer(path)
        for new, old in zip(model.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(new, -old)
    assert digest(tmp_path) == before


# --- writing --------------------------------------------------------------------------------------


def test_a_model_can_be_saved_over_the_files_that_it_is_mapped_from(folder, file):
    for path, layout in ((file, "bfl"), (folder / "transformer", "diffusers")):
        model = load_transformer(path)
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            model.img_in.weight.mul_(2)
        save_transformer(model, path, layout=layout)
        again = load_transformer(path).state_dict()
        assert torch.equal(again.pop("img_in.weight"), 2 * expected.pop("img_in.weight"))
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_the_same_model_gives_the_same_bytes(flux, tmp_path):
    for name in "ab":
        save_transformer(flux, tmp_path / name / "x.safetensors")
        save_transformer(flux, tmp_path / name / "y", layout="diffusers", max_shard_size=100_000)
    assert list(digest(tmp_path / "a").values()) == list(digest(tmp_path / "b").values())


def test_files_are_aligned_and_read_by_the_library(file, flux):
    state = load_file(file)
    assert state.keys() == flux.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in flux.state_dict().items())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in load_transformer(file).state_dict().values())


def test_shards_are_no_larger_than_asked(folder):
    shards = list((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    limit = 200_000 + 20_000  # headers; single tensors are smaller here
    assert all(shard.stat().st_size <= limit for shard in shards)
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in Flux(PARAMS).parameters())


def test_old_shards_do_not_outlive_a_new_model(folder, flux):
    target = folder / "transformer"
    (target / "diffusion_pytorch_model.fp16.safetensors").touch()
    (target / "notes.txt").touch()
    save_transformer(flux.bfloat16(), target, layout="diffusers")
    assert sorted(p.name for p in target.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "notes.txt",
    ]
    assert load_transformer(folder).img_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_an_interrupted_write_leaves_what_was_there(folder, file, flux, tmp_path, monkeypatch, layout, failing):
    before = digest(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr("fluxlab.checkpoints.write.as_bytes", full)
    path = file if layout == "bfl" else folder / "transformer"
    message = complaint(save_transformer, flux, path, layout=layout)
    assert "No space left on device" in message
    assert str(path) in message
    assert digest(tmp_path) == before


def test_paths_and_layouts_that_do_not_go_together(flux, tmp_path, file):
    assert "ends in .safetensors" in complaint(save_transformer, flux, tmp_path)
    assert "is a folder" in complaint(save_transformer, flux, file, layout="diffusers")
    assert "layout 'gguf'" in complaint(save_transformer, flux, file, layout="gguf")
    assert "max_shard_size 0" in complaint(save_transformer, flux, tmp_path, layout="diffusers", max_shard_size=0)


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"theta": 500}, {"mlp_ratio": 2.0}])
def test_sizes_that_diffusers_does_not_have(tmp_path, changes):
    model = Flux(replace(PARAMS, **changes))
    message = complaint(save_transformer, model, tmp_path / "a", layout="diffusers")
    assert next(iter(changes)) in message
    assert "layout='bfl'" in message
    save_transformer(model, tmp_path / "a.safetensors")
    assert load_transformer(tmp_path / "a.safetensors").params == model.params


def test_autoencoder_sizes_that_diffusers_does_not_have(tmp_path):
    model = AutoEncoder(replace(SIZES, ch_mult=(2, 2)))
    assert "ch_mult" in complaint(save_autoencoder, model, tmp_path / "a", layout="diffusers")


def test_networks_without_weights_are_not_written(tmp_path):
    with torch.device("meta"):
        model = Flux(PARAMS)
    assert "meta" in complaint(save_transformer, model, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_new_files_have_the_usual_rights(file):
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_no_module_can_unpickle():
    from pathlib import Path

    for source in Path(checkpoints.__file__).parent.glob("*.py"):
        text = source.read_text()
        assert "torch.load(" not in text
        assert "import pickle" not in text
