"""Images that are decoded in stripes of rows are those of the whole decoder."""

import pytest
import torch

from fluxlab.errors import UserError
from fluxlab.model import AutoEncoder, AutoEncoderParams, autoencoder, stripes

SIZES = {
    "wide": AutoEncoderParams(64, 3, 32, 3, (1, 2, 4), 1, 4, 0.36, 0.11),
    "equal": AutoEncoderParams(64, 3, 32, 3, (2, 2), 2, 4, 0.36, 0.11),
}


def model(name: str, dtype: torch.dtype = torch.float64) -> AutoEncoder:
    torch.manual_seed(0)
    made = AutoEncoder(SIZES[name]).to(dtype).requires_grad_(False)
    for layer in made.modules():
        if isinstance(layer, torch.nn.GroupNorm):  # they start as 1 and 0
            layer.weight.normal_()
            layer.bias.normal_()
    return made


def latents(count: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    z = torch.randn(count, 4, 9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (z + torch.linspace(0, 3, 9)[:, None]).to(dtype)  # stripes have statistics of their own


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("stripe", [8, 9, 20, 64])
def test_stripes_compute_the_image_of_the_whole_decoder(name, stripe):
    decoder = model(name)
    whole = decoder.decode(latents(), stripe=None)
    assert (decoder.decode(latents(), stripe=stripe) - whole).abs().max() <= 2e-6 * whole.std()  # statistics are fp32
    decoder, z = decoder.float(), latents(dtype=torch.float32)
    assert (decoder.decode(z, stripe=stripe) - decoder.decode(z, stripe=None)).abs().max() <= 1e-5 * whole.std()


def test_statistics_are_those_of_all_rows():
    x = latents()[:, :, :, :, None].expand(-1, -1, -1, -1, 3).flatten(3).repeat(1, 8, 1, 1)
    norm = torch.nn.GroupNorm(4, 32, eps=1e-6).double()
    norm.weight.data.normal_()
    found = stripes._whole_norm(norm, x, 2)(x[..., 3:5, :])
    assert (found - norm(x)[..., 3:5, :]).abs().max() <= 1e-6
    assert (norm(x[..., 3:5, :]) - norm(x)[..., 3:5, :]).abs().max() > 0.1  # what a tile would have


def test_large_images_are_decoded_in_stripes_and_batches_in_parts(monkeypatch):
    decoder, z = model("wide", torch.float32), latents(3, torch.float32)
    one, whole = decoder._decode_bytes(z), decoder.decode(z[1:2], stripe=None)
    calls = []
    monkeypatch.setattr(autoencoder, "in_stripes", lambda *given: calls.append(given) or stripes.in_stripes(*given))
    monkeypatch.setattr(autoencoder, "WHOLE", 2 * one)
    assert (decoder.decode(z)[1:2] - whole).abs().max() <= 1e-5 * whole.std()
    assert not calls
    monkeypatch.setattr(autoencoder, "WHOLE", one - 1)
    monkeypatch.setattr(autoencoder, "STRIPE", 8)
    assert torch.equal(decoder.decode(z)[1:2], decoder.decode(z[1:2]))
    assert len(calls) == 4
    assert (decoder.decode(z[1:2]) - whole).abs().max() <= 1e-5 * whole.std()


def test_stripes_have_no_gradient(monkeypatch):
    decoder, z = model("wide"), latents().requires_grad_()
    with pytest.raises(UserError, match="stripe 8: stripes have no gradient"):
        decoder.decode(z, stripe=8)
    monkeypatch.setattr(autoencoder, "WHOLE", 1)
    decoder.decode(z).sum().backward()
    assert z.grad.abs().min() > 0


@pytest.mark.parametrize("stripe", [7, 0, -8, True])
def test_a_wrong_stripe_is_an_error(stripe):
    with pytest.raises(UserError, match=r"stripe .*: expected a whole number of rows from 8, auto or None"):
        model("wide").decode(latents(), stripe=stripe)
