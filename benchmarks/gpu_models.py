"""FLUX.1 dev with random weights, made on the device: our transformer, and Diffusers' on the same weights in place."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fluxlab.checkpoints.flux1 import transformer_config, transformer_pieces
from fluxlab.checkpoints.keys import to_theirs
from fluxlab.model import TRANSFORMERS, Flux, FluxParams
from fluxlab.positions import Context, Layout, Prompt
from fluxlab.sampling import image_ids, text_ids
from fluxlab.select.words import split_words

PROMPT = "A cat holding a sign that says hello world"


class Case(NamedTuple):
    """Sizes of a measurement. text: number of text tokens. side: of the image, in tokens."""

    params: FluxParams
    text: int
    side: int
    dtype: torch.dtype

    @property
    def pixels(self) -> int:
        return 16 * self.side

    @property
    def context(self) -> Context:
        """The context of one step, with a prompt of one token per word."""
        p, spans = self.params, split_words(PROMPT)
        spans = (*spans, *[(0, 0)] * (self.text - len(spans)))
        ids = torch.cat((text_ids(1, self.text), image_ids(1, self.side, self.side)), 1)
        sizes = (p.axes_dim, p.theta, p.depth, p.depth_single_blocks, p.num_heads)
        return Context(ids, Layout(self.text, (self.side, self.side)), *sizes, (1.0, 0.0), [Prompt(PROMPT, spans)])


DEV = Case(TRANSFORMERS["dev"], 512, 64, torch.bfloat16)
"""An image of 1024 × 1024 pixels."""

TINY = Case(FluxParams(64, 64, 24, 32, 64, 4.0, 2, 2, 2, (8, 12, 12), 10000, True, True), 16, 4, torch.float32)


def random_flux(case: Case, device: str) -> Flux:
    """Return a transformer whose weights were drawn on `device`: 12 billion take less than a second on a GPU."""
    with torch.device("meta"):
        flux = Flux(case.params)
    flux = flux.to(case.dtype).to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in flux.named_parameters():
        weight.normal_(0, 0.02)
        if name.endswith("norm.scale"):
            weight.add_(1)
    return flux


def diffusers_twin(flux: Flux) -> nn.Module:
    """Return Diffusers' transformer with the same weights. Its q, k and v are views of ours, so it takes no memory."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        theirs = FluxTransformer2DModel.from_config(transformer_config(flux.params))
    ours = flux.state_dict()
    state = {}
    for name, sources in to_theirs(transformer_pieces(flux.params)).items():
        parts = [ours[source] if rows is None else ours[source][slice(*rows)] for source, rows in sources]
        state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    theirs.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False)


def arguments(case: Case, batch: int, device: str) -> tuple:
    """Return the arguments of `Flux.forward`. Time and guidance are exact in bf16, to which Diffusers rounds them."""
    p, g = case.params, torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(batch, *shape, generator=g).to(device, case.dtype)  # noqa: E731
    img, txt, y = draw(case.side**2, p.in_channels), draw(case.text, p.context_in_dim), draw(p.vec_in_dim)
    ids = image_ids(1, case.side, case.side).to(device), text_ids(1, case.text).to(device)
    t, guidance = torch.full((batch,), 0.5, device=device), torch.full((batch,), 4.0, device=device)
    return img, ids[0], txt, ids[1], t, y, guidance


def their_call(theirs: nn.Module, given: tuple) -> Callable[[], Tensor]:
    """Return a function that calls Diffusers' transformer with the arguments of ours."""
    img, img_ids, txt, txt_ids, t, y, guidance = given
    return lambda: theirs(img, txt, y, t, img_ids[0], txt_ids[0], guidance, return_dict=False)[0]


def compile_blocks(ours: Flux, theirs: nn.Module, backend: str) -> None:
    """Compile each kind of block once, not the model as a whole, which would take minutes."""
    for block in [*ours.double_blocks, *ours.single_blocks]:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    theirs.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
