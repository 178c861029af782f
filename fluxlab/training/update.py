"""One optimisation step: gradients, optimizers, moving average. On CUDA it is replayed from a graph.

The networks are so small that launching kernels takes longer than running them: a step of 256 scenes takes 48 ms when
each kernel is launched by Python. A CUDA graph launches all of them at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fluxlab.model.torch_ops import copy_, lerp_, zero_

Batch = dict[str, Tensor]
Loss = Callable[[Batch, tuple[int, int]], tuple[Tensor, Tensor]]
"""From a batch and the size of its images: the loss to minimise, and a second loss to report."""


class Update:
    """Updates `parameters` and their moving `averages` in place.

    loss: see `Loss`. optimizers: their parameter groups hold the full learning rate as `base_lr`. clip: the largest
    norm of the gradient of all parameters; a larger gradient is scaled down to it.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: list[Tensor],
        averages: list[Tensor],
        optimizers: list[torch.optim.Optimizer],
        clip: float,
    ):
        self.loss, self.parameters, self.averages = loss, parameters, averages
        self.optimizers, self.clip = optimizers, clip

    def __call__(self, size: tuple[int, int], batch: Batch, share: float, decay: float) -> tuple[Tensor, ...]:
        """Take one step with a share of the full learning rates. `decay` is that of the moving average.

        Returns the loss, the second loss and the norm of the gradient before it is clipped.
        """
        values = self._gradients(size, batch)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * share
            optimizer.step()
        with torch.no_grad():
            lerp_(self.averages, self.parameters, 1 - decay)
        return values

    def _gradients(self, size: tuple[int, int], batch: Batch, autocast_cache: bool = True) -> tuple[Tensor, ...]:
        """Set and clip the gradients. Parameters without a gradient keep none, so that optimizers skip them."""
        with torch.no_grad():
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            if gradients:
                zero_(gradients)
        with torch.autocast(self.parameters[0].device.type, torch.bfloat16, cache_enabled=autocast_cache):
            loss, reported = self.loss(batch, size)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        return loss.detach(), reported, norm


class GraphedUpdate(Update):
    """`Update` on CUDA. The first step of each shape of batch runs eagerly, later ones are replayed from a graph.

    Kernels in a graph read the values that numbers had at capture. The learning rate changes from step to step, so the
    captured optimizers take a step at the full rate, of which the captured code then keeps a share. This is the same
    step: the updates of AdamW and Muon, weight decay included, are proportional to the learning rate.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: list[Tensor],
        averages: list[Tensor],
        optimizers: list[torch.optim.Optimizer],
        clip: float,
    ):
        super().__init__(loss, parameters, averages, optimizers, clip)
        device = parameters[0].device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.rates = torch.zeros(2, device=device)  # share of the learning rates, weight of the average's newest part
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, tuple[Tensor, ...]] | None] = {}

    def __call__(self, size: tuple[int, int], batch: Batch, share: float, decay: float) -> tuple[Tensor, ...]:
        self.rates.copy_(torch.tensor([share, 1 - decay]).pin_memory(), non_blocking=True)
        key = (size, *(tuple(part.shape) for part in batch.values()))
        with self._on_stream():
            if key not in self.graphs:
                self.graphs[key] = None
                return tuple(value.clone() for value in self._step(size, batch, autocast_cache=True))
            if self.graphs[key] is None:
                self.graphs[key] = self._capture(size, batch)
            graph, inputs, values = self.graphs[key]
            for name, part in batch.items():
                inputs[name].copy_(part, non_blocking=True)
            graph.replay()
            return tuple(value.clone() for value in values)  # the next graph reuses their memory

    def _capture(self, size: tuple[int, int], batch: Batch):
        inputs = {name: part.clone() for name, part in batch.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            values = self._step(size, inputs, autocast_cache=False)
        return graph, inputs, values

    def _step(self, size: tuple[int, int], batch: Batch, autocast_cache: bool) -> tuple[Tensor, ...]:
        values = self._gradients(size, batch, autocast_cache)
        with torch.no_grad():
            share, newest = self.rates.unbind()
            before = [p.detach().clone() for p in self.parameters]
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"]
                optimizer.step()
            lerp_(before, self.parameters, share)
            copy_(self.parameters, before)
            lerp_(self.averages, self.parameters, newest)
        return values

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Run on the stream of the captures, in order with the stream of the caller."""
        caller = torch.cuda.current_stream()
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)


def update_for(device: str) -> type[Update]:
    """Return the class of updates for a device: `GraphedUpdate` on CUDA, else `Update`."""
    return GraphedUpdate if torch.device(device).type == "cuda" else Update
