"""A teacher: a trained model of the same latents, whose velocity a new one learns (arXiv 1503.02531).

The velocity of a teacher has no noise, unlike the target of flow matching. Hidden states of the teacher's blocks are
targets too while training starts (hints, arXiv 1412.6550).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.loading import load_pipeline
from fluxlab.model import Rotary
from fluxlab.model.protocols import Text
from fluxlab.model.sites import Site
from fluxlab.training.nets import Nets, tokenizers_of, tokens_of

PREFIX = "teacher_"


@dataclass
class Reader:
    """The tokenizers of a teacher, and the length of its text."""

    text: Text
    length: int

    def tokens(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return what the teacher reads of some prompts, as entries of a batch."""
        return {PREFIX + key: value for key, value in tokens_of(self.text, prompts, self.length).items()}


class Teacher:
    """A trained model that is asked for velocities. name: under `configs/model`, or a folder."""

    def __init__(self, name: str, device: str):
        # bf16, without autocast: its products are computed by oneDNN on a CPU
        pipe = load_pipeline(name, torch.bfloat16, device, cache="none")
        self.nets = Nets(pipe.transformer, pipe.text).eval().requires_grad_(False)
        self.params = pipe.transformer.params
        self.reader = Reader(tokenizers_of(pipe.text), pipe.max_sequence_length)

    @torch.no_grad()
    def __call__(self, x: Tensor, batch: Mapping[str, Tensor], table: Rotary) -> tuple[Tensor, list[Tensor]]:
        """Return its velocity of x `(B, N, C)`, and the hidden states of the image after each block, `(B, N, D)`."""
        tokens = {key.removeprefix(PREFIX): value for key, value in batch.items() if key.startswith(PREFIX)}
        with torch.autocast(x.device.type, enabled=False):
            return with_states(self.nets, x.bfloat16(), batch["t"], tokens, table)


class Recorded(Site):
    """Keeps the hidden states of the image, the last `tokens`, after a block."""

    def __init__(self, states: list[Tensor], tokens: int):
        self.states, self.tokens = states, tokens

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name == "residual":
            self.states.append(x[:, -self.tokens :])
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Any, mask: Tensor | None, tap: Any) -> Tensor:
        """Return the block's attention. With gradients on a CPU in bf16, two products take a third of flash's time."""
        if not (torch.is_grad_enabled() and v.device.type == "cpu" and v.dtype == torch.bfloat16):
            return super().attend(q, k, v, keys, mask, tap)
        q, k = q.to(v.dtype) * q.shape[-1] ** -0.5, k.to(v.dtype)
        return (q @ k.transpose(-1, -2)).softmax(dim=-1).to(v.dtype) @ v


def with_states(
    nets: Nets, x: Tensor, t: Tensor, tokens: Mapping[str, Tensor], table: Rotary
) -> tuple[Tensor, list[Tensor]]:
    """Return the velocity `(B, N, C)`, fp32, and the hidden states of the image after each block, `(B, N, D)`."""
    states: list[Tensor] = []
    p = nets.transformer.params
    sites = [Recorded(states, x.shape[1])] * (p.depth + p.depth_single_blocks)
    return nets(x, t, tokens, table, sites).float(), states


def check_hints(nets: Nets, teacher: Teacher, name: str) -> None:
    """Raise UserError if the hidden states of the teacher cannot be targets: blocks or widths differ."""
    own, other = ((p.hidden_size, p.depth, p.depth_single_blocks) for p in (nets.transformer.params, teacher.params))
    if own != other:
        raise UserError(
            f"hints: teacher={name} has hidden_size, depth, depth_single_blocks {other}, the recipe {own}; set hints=0"
        )


def taught_loss(
    nets: Nets, teacher: Teacher, batch: dict[str, Tensor], table: Rotary, teachers_table: Rotary
) -> tuple[Tensor, Tensor]:
    """Return the weighted mean squared error against the teacher's velocity plus that of hidden states, and the plain
    error of the velocity.

    batch: as `flow_loss` takes it, with the teacher's tokens and `hint`, the weight of the hidden states; without it
    these are no targets. Each channel of them is measured in standard deviations of the teacher's.
    """
    t = batch["t"][:, None, None]
    x = (1 - t) * batch["x0"] + t * batch["noise"]
    wanted, theirs = teacher(x, batch, teachers_table)
    weights = batch["weights"]

    def mean(error: Tensor) -> Tensor:
        return (weights * error.mean(dim=-1)).sum() / weights.sum()

    velocity, ours = with_states(nets, x, batch["t"], batch, table)
    error = (velocity - wanted).square()
    loss = mean(error)
    for own, target in zip(ours, theirs, strict=True) if "hint" in batch else ():
        target = target.float()
        spread = target.square().mean(dim=(0, 1)) - target.mean(dim=(0, 1)).square()
        distance = (own.float() - target).square() / (spread + 0.01 * spread.mean())
        loss = loss + batch["hint"] / len(ours) * mean(distance)
    return loss, error.detach().mean()
