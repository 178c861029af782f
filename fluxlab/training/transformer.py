"""Second training stage: the transformer and its text encoders, by flow matching on latents."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fluxlab.model import Rotary
from fluxlab.model.protocols import Text
from fluxlab.training.nets import Nets, tokenizers_of, tokens_of
from fluxlab.training.pool import Pool, captions
from fluxlab.training.program import Convention
from fluxlab.training.seeds import numpy_rng, torch_rng
from fluxlab.training.teacher import Reader


def optimizers(nets: Nets, *, muon_lr: float, adam_lr: float, text_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the rest. With AdamW alone, lettering stayed illegible.

    The text encoders have a lower rate: at the rate of the transformer, the pooled output of CLIP collapses early, and
    colours are learned much later.
    """
    in_blocks = [p for n, p in nets.transformer.named_parameters() if "_blocks." in n and p.ndim == 2]
    chosen = {id(p) for p in in_blocks}
    rest = [p for p in nets.transformer.parameters() if id(p) not in chosen]
    text = [p for name, net in nets.named_children() if name != "transformer" for p in net.parameters()]
    muon = torch.optim.Muon(in_blocks, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(
        [{"params": rest}, {"params": text, "lr": text_lr}],
        lr=adam_lr,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
        capturable=rest[0].device.type == "cuda",
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


def learning_rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Return the share of the full rate at a step: linear warm-up, constant, then linear to 2 % over the last share
    `decay` of the steps.

    Before the decay nothing depends on `steps`, so that a run can be made longer while it is going.
    """
    left = (steps - step) / max(1.0, decay * steps)
    return min(1.0, (step + 1) / warmup) * max(0.02, min(1.0, left))


@dataclass(frozen=True)
class Phase:
    """From step `start` on, a share `share` of the batches has `count` scenes of `size`, the others another size."""

    start: int
    size: tuple[int, int]
    share: float
    count: int


class Batches(Dataset):
    """The batch of each step, a pure function of (seed, step)."""

    def __init__(
        self,
        pools: list[Pool],
        phases: list[Phase],
        text: Text,
        *,
        seed: int,
        length: int,
        unknown: float,
        t_mean: dict[int, float],
        full_share: float,
        t_std: float,
        teacher: Reader | None = None,
        hints: Callable[[int], float] | None = None,
    ):
        self.teacher, self.hints = teacher, hints
        self.pools, self.phases, self.text = {pool.size: pool for pool in pools}, phases, tokenizers_of(text)
        self.seed, self.length, self.unknown, self.t_mean = seed, length, unknown, t_mean
        self.full_share, self.t_std = full_share, t_std

    def __getitem__(self, step: int) -> tuple[tuple[int, int], dict[str, Tensor]]:
        """Return the image size of a step and its batch, on the CPU.

        The batch has x0 and noise `(B, N, C)`, t `(B,)`, weights `(B, N)`, and what the text encoders read. With a
        teacher, also what its text encoders read, and `hint`, the weight of its hidden states, unless it is 0.
        """
        rng = numpy_rng(self.seed, "batch", step)
        phase = [phase for phase in self.phases if phase.start <= step][-1]
        others = [size for size in self.pools if size != phase.size]
        size = phase.size if rng.random() < phase.share else others[int(rng.integers(len(others)))]
        pool, count = self.pools[size], phase.count
        chosen = rng.integers(len(pool.scenes), size=count)
        texts = captions([pool.scenes[i] for i in chosen], rng, self.unknown, self.full_share)
        generator = torch_rng(self.seed, "noise", step)
        x0 = pool.latents[torch.from_numpy(chosen)].float()
        # stratified: each batch covers all times, which lowers the variance of the loss
        u = (torch.rand(count, generator=generator) + torch.arange(count)) / count
        mean = [mean for start, mean in sorted(self.t_mean.items()) if start <= step][-1]
        t = torch.sigmoid(mean + self.t_std * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
        parts = {
            "x0": x0,
            "noise": torch.randn(x0.shape, generator=generator),
            "t": t,
            "weights": pool.weights[torch.from_numpy(chosen)],
            **tokens_of(self.text, texts, self.length),
        }
        if self.teacher:
            parts |= self.teacher.tokens(texts)
            if self.hints and (hint := self.hints(step)):
                parts["hint"] = torch.tensor(hint)
        return size, parts

    def stream(self, steps: range, device: str, workers: int = 0) -> Iterator[tuple[Pool, dict[str, Tensor]]]:
        """Yield the pool and the batch of each step on `device`. `workers` processes draw batches ahead of time."""
        loader = DataLoader(
            self,
            sampler=steps,
            batch_size=None,
            num_workers=workers,
            pin_memory=torch.device(device).type == "cuda",
            prefetch_factor=4 if workers else None,
            worker_init_fn=_one_thread,
        )
        for size, parts in loader:
            yield self.pools[tuple(size)], {key: part.to(device, non_blocking=True) for key, part in parts.items()}


def _one_thread(worker: int) -> None:
    """The processes are the parallelism: the tokenizers' own threads do not survive a fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def flow_loss(nets: nn.Module, batch: dict[str, Tensor], table: Rotary | Convention) -> tuple[Tensor, Tensor]:
    """Return the weighted and the plain mean squared error of the velocity noise - x0 at x_t = (1 - t)·x0 + t·noise."""
    t = batch["t"][:, None, None]
    x = (1 - t) * batch["x0"] + t * batch["noise"]
    velocity = nets(x, batch["t"], batch, table)
    error = (velocity.float() - (batch["noise"] - batch["x0"])).square().mean(dim=-1)
    weights = batch["weights"]
    return (weights * error).sum() / weights.sum(), error.detach().mean()


def average_decay(decay: float, step: int) -> float:
    """Return the decay of the moving average at a step. The memory is shorter during the first steps."""
    return min(decay, (1 + step) / (10 + step))
