"""Small random FLUX.2 networks and folders written by Diffusers and transformers: the oracle of every parity test."""

import torch


def randomise(*modules) -> None:
    """Give norms and biases, which start as ones and zeros, random values: a swapped pair would go unseen."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter.data, 1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
        module.eval().requires_grad_(False)


def diffusers_transformer(*, guidance: bool = True, seed: int = 0, text_width: int = 48):
    """A random `Flux2Transformer2DModel` with two heads of four axes."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(seed)
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance,
    )
    randomise(model)
    return model


def diffusers_autoencoder(seed: int = 0):
    """A random `AutoencoderKLFlux2` of 4 latent channels and 2 pixels per latent pixel."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(seed)
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
    )
    randomise(model)
    model.bn.running_mean.normal_(0, 0.5)
    model.bn.running_var.uniform_(0.2, 3)
    return model
