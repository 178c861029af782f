"""FLUX.2's networks and Diffusers' on the same random weights, fp32, CPU. Each case also goes through files."""

import pytest
import torch

from fluxlab import checkpoints
from fluxlab.model import AUTOENCODERS, TRANSFORMERS2, AutoEncoder2, Flux2
from tests import tiny2
from tests.unit.test_flux import unchecked  # noqa: F401 (a fixture)

PUBLISHED = {"klein4b": 3_875_544_576, "klein9b": 9_078_581_248, "flux2dev": 32_223_281_152}


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "plain"])
def guidance(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def theirs(guidance):
    return tiny2.diffusers_transformer(guidance=guidance, seed=guidance)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    where = tmp_path_factory.mktemp("transformer")
    theirs.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def ours(folder) -> Flux2:
    return checkpoints.load_transformer(folder)


def grid_ids(t: float, rows: int, cols: int) -> torch.Tensor:
    """Return the ids (t, r, c, 0) of a grid, written out."""
    return torch.tensor([[(t, r, c, 0) for r in range(rows) for c in range(cols)]], dtype=torch.float32)


def inputs(model, batch: int = 2, grids: tuple = ((0, 4, 6),), text: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    img_ids = torch.cat([grid_ids(*grid) for grid in grids], 1)
    p = model.params
    return {
        "img": torch.randn(batch, img_ids.shape[1], p.in_channels, generator=generator),
        "img_ids": img_ids,
        "txt": torch.randn(batch, text, p.context_in_dim, generator=generator),
        "txt_ids": torch.tensor([[(0, 0, 0, i) for i in range(text)]], dtype=torch.float32),
        "timesteps": torch.tensor([0.9, 0.35])[:batch],
        "guidance": torch.tensor([4.0, 2.5])[:batch],
    }


def reference(theirs, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return Diffusers' velocity, sample by sample: it takes the ids of the first sample for all."""
    parts = []
    for i in range(len(x["img"])):
        ids = {key: x[key][i if len(x[key]) > 1 else 0] for key in ("img_ids", "txt_ids")}
        one = {key: x[key][i : i + 1] for key in ("img", "txt", "timesteps", "guidance")}
        parts.append(
            theirs(
                hidden_states=one["img"],
                encoder_hidden_states=one["txt"],
                timestep=one["timesteps"],
                guidance=one["guidance"] if theirs.config.guidance_embeds else None,
                return_dict=False,
                **ids,
            )[0]
        )
    return torch.cat(parts)


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference as a share of the spread."""
    return float((ours - theirs).abs().max() / theirs.std())


CASES = {
    "an image": {},
    "one reference": {"grids": ((0, 4, 6), (10, 3, 5))},
    "three references": {"grids": ((0, 4, 4), (10, 2, 3), (20, 4, 2), (30, 1, 5))},
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_transformer(ours, theirs, case):
    x = inputs(ours, **CASES[case])
    expected = reference(theirs, x)
    assert expected.std() > 0.1
    assert gap(ours(**x), expected) <= 1e-5


@torch.inference_mode()
def test_fractional_ids_of_each_sample(ours, theirs):
    x = inputs(ours)
    generator = torch.Generator().manual_seed(1)
    x["img_ids"] = 40 * torch.rand(2, *x["img_ids"].shape[1:], generator=generator) - 10
    x["txt_ids"] = 40 * torch.rand(2, *x["txt_ids"].shape[1:], generator=generator) - 10
    expected = reference(theirs, x)
    assert gap(ours(**x), expected) <= 1e-5
    swapped = ours(**{**x, "img_ids": x["img_ids"].flip(0)})
    assert gap(swapped, expected) > 1e-3


def test_gradients_take_the_same_values(ours, theirs):
    """With gradients other operators compute, for which the bound holds too."""
    x = inputs(ours)
    x["img_ids"].requires_grad_()
    velocity = ours(**x)
    assert velocity.requires_grad
    with torch.no_grad():
        assert gap(velocity.detach(), reference(theirs, x)) <= 1e-5
    velocity.square().sum().backward()
    assert x["img_ids"].grad[..., 1:3].abs().max() > 0


@torch.inference_mode()
def test_a_sample_does_not_depend_on_its_batch(ours, one_thread):
    x = inputs(ours)
    alone = {key: value[1:] if len(value) > 1 else value for key, value in x.items()}
    assert torch.equal(ours(**x)[1:], ours(**alone))


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_written_and_read_again(ours, theirs, tmp_path, layout):
    from diffusers import Flux2Transformer2DModel

    path = tmp_path / ("model.safetensors" if layout == "bfl" else "transformer")
    checkpoints.save_transformer(ours, path, layout)
    again = checkpoints.load_transformer(path)
    assert again.params == ours.params
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))
    if layout == "diffusers":
        loaded = Flux2Transformer2DModel.from_pretrained(path).state_dict()
        assert loaded.keys() == theirs.state_dict().keys()
        assert all(torch.equal(weight, loaded[name]) for name, weight in theirs.state_dict().items())


def test_diffusers_reads_the_original_names(ours, tmp_path):
    """Diffusers has a converter of its own from the original names to its names."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as convert

    theirs = tiny2.diffusers_transformer(guidance=ours.params.guidance_embed, seed=ours.params.guidance_embed)
    converted = convert(dict(ours.state_dict()))
    assert converted.keys() == theirs.state_dict().keys()
    assert all(torch.equal(converted[name], weight) for name, weight in theirs.state_dict().items())


def test_sizes_from_shapes(ours, folder, tmp_path):
    """Without config and metadata, from the names of both layouts."""
    from safetensors.torch import load_file, save_file

    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), tmp_path / "theirs.safetensors")
    save_file({name: weight.contiguous() for name, weight in ours.state_dict().items()}, tmp_path / "ours.safetensors")
    for name in ("theirs", "ours"):
        assert checkpoints.load_transformer(tmp_path / f"{name}.safetensors").params == ours.params


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Every name and shape of Diffusers' class, and the number of parameters."""
    from diffusers import Flux2Transformer2DModel

    from fluxlab.checkpoints.flux2 import transformer_config, transformer_pieces
    from fluxlab.checkpoints.keys import their_shapes

    p = TRANSFORMERS2[name]
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Flux2(p).state_dict().items()}
        theirs = Flux2Transformer2DModel.from_config(transformer_config(p)).state_dict()
    assert their_shapes(transformer_pieces(p), shapes) == {name: tuple(weight.shape) for name, weight in theirs.items()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == PUBLISHED[name]


@pytest.fixture(scope="module")
def their_autoencoder():
    return tiny2.diffusers_autoencoder()


@pytest.fixture(scope="module")
def autoencoder(their_autoencoder, tmp_path_factory) -> AutoEncoder2:
    where = tmp_path_factory.mktemp("vae")
    their_autoencoder.save_pretrained(where)
    return checkpoints.load_autoencoder(where)


def statistics(vae) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the 16 patch channels, as Diffusers' pipelines compute them."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    return mean, torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)


@torch.inference_mode()
def test_encoding(autoencoder, their_autoencoder):
    from diffusers import Flux2Pipeline

    x = torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, deviation = statistics(their_autoencoder)
    patches = Flux2Pipeline._patchify_latents(their_autoencoder.encode(x).latent_dist.mode())
    expected = (patches - mean) / deviation
    assert expected.shape == (2, 16, 6, 4)
    assert gap(autoencoder.encode(x), expected) <= 1e-5


@torch.inference_mode()
def test_decoding(autoencoder, their_autoencoder):
    from diffusers import Flux2Pipeline

    z = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(0))
    mean, deviation = statistics(their_autoencoder)
    expected = their_autoencoder.decode(Flux2Pipeline._unpatchify_latents(z * deviation + mean)).sample
    assert expected.std() > 0.1
    assert gap(autoencoder.decode(z), expected) <= 1e-5
    assert gap(autoencoder.decode(z, stripe=8), expected) <= 1e-5


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_an_autoencoder_written_and_read_again(autoencoder, their_autoencoder, tmp_path, layout):
    from diffusers import AutoencoderKLFlux2

    path = tmp_path / ("ae.safetensors" if layout == "bfl" else "vae")
    checkpoints.save_autoencoder(autoencoder, path, layout)
    again = checkpoints.load_autoencoder(path, dtype=torch.bfloat16)
    assert again.params == autoencoder.params
    assert again.bn.num_batches_tracked.dtype == torch.int64
    assert checkpoints.load_autoencoder(path).state_dict().keys() == autoencoder.state_dict().keys()
    if layout == "diffusers":
        loaded = AutoencoderKLFlux2.from_pretrained(path).state_dict()
        assert loaded.keys() == their_autoencoder.state_dict().keys()
        assert all(torch.equal(weight, loaded[name]) for name, weight in their_autoencoder.state_dict().items())


def test_sizes_of_an_autoencoder_from_shapes(autoencoder, tmp_path):
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in autoencoder.state_dict().items()}, tmp_path / "ae.safetensors")
    read = checkpoints.load_autoencoder(tmp_path / "ae.safetensors").params
    assert read.ch_mult == autoencoder.params.ch_mult
    assert read.z_channels == autoencoder.params.z_channels


def test_the_published_autoencoder():
    import diffusers

    from fluxlab.checkpoints.flux2 import autoencoder_config, autoencoder_pieces
    from fluxlab.checkpoints.keys import their_shapes

    p = AUTOENCODERS["flux2"]
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in AutoEncoder2(p).state_dict().items()}
        theirs = diffusers.AutoencoderKLFlux2.from_config(autoencoder_config(p)).state_dict()
        default = diffusers.AutoencoderKLFlux2().state_dict()
    expected = {name: tuple(weight.shape) for name, weight in theirs.items()}
    assert their_shapes(autoencoder_pieces(p), shapes) == expected
    assert expected == {name: tuple(weight.shape) for name, weight in default.items()}


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_file_without_one_tensor_is_refused(ours, autoencoder, tmp_path, part):
    from safetensors.torch import save_file

    model, name = (ours, "single_blocks.1.linear2.weight") if part == "transformer" else (autoencoder, "bn.running_var")
    state = {key: weight.contiguous() for key, weight in model.state_dict().items() if key != name}
    save_file(state, tmp_path / "a.safetensors")
    load = checkpoints.load_transformer if part == "transformer" else checkpoints.load_autoencoder
    with pytest.raises(checkpoints.CheckpointError, match=f"1 missing \\({name}\\)"):
        load(tmp_path / "a.safetensors")


@torch.inference_mode()
def test_compiles_as_one_graph(ours, unchecked):  # noqa: F811
    """Without breaks, and with the same values. The kernels of inductor are tried in `benchmarks/forward.py`."""
    x = inputs(ours)
    torch.compiler.reset()
    assert gap(torch.compile(ours, fullgraph=True, backend="aot_eager")(**x), ours(**x)) <= 1e-5
    torch.compiler.reset()
