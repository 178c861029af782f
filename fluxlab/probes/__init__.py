"""What attention looks at: every block, step and head, exactly, while the fused kernel stays the compute path.

How it works, from a config to arrays:

1. A *capture* is a mapping of named requests (`requests`), in the language of programs:
   `{cats: {kind: words, words: [cat], blocks: double, steps: 0-3, average: [heads]}}`.
2. `Probe.begin` settles it against a run: tokens, steps, blocks and heads become numbers, every result's shape is known
   (`outputs`), and so is the memory; a budget that is too small is refused with the number, before anything runs.
3. The model is handed taps, one a block or none (`Flux.forward(taps=…)`). `attend`, the one entry to attention, takes
   the kernel that it would take anyway and asks that kernel for its log-sum-exp too; the tap is shown q, k, mask and
   lse as the kernel read them. No class is patched, nothing is switched on in the model, no state is left in it;
   without a tap nothing is computed, and with one the output is the same bits on the CPU.
4. From these, p = exp(q·kᵀ/√d + mask - lse): a row of p needs no other row and no second softmax, so only the rows and
   columns that were asked for are computed, a cache's worth at a time (`stream`), and reduced at once into the results
   (`measures`: words, regions, map, quadrants, logits; `queries`: entropy, distance, peak, similarity). Memory is
   tokens × what was asked, never tokens². Groups of queries with keys of their own are separate calls, which add up.
5. Results are arrays with named axes (`arrays`): written to safetensors and read back as xarray, a file or all cells of
   a run that was given `capture=` (`labelled`); drawn by `draw`.

p is exact to the rounding of the scores: 1e-6 in fp32 against a dense softmax. In bf16 and fp16 it is computed in fp32
from the q and k that the kernel read; PyTorch's CPU flash kernel takes exponentials of 16-bit models roughly, so that
its own sums, and with them p, are off by up to 1e-4 of themselves there (1e-6 where `dense_attention` runs).
"""

from fluxlab.probes.arrays import Captured, load, of_sample, whole, write
from fluxlab.probes.labelled import INDEX, index, label, read, similarity
from fluxlab.probes.probe import WORKING, Probe, memory, settle
from fluxlab.probes.requests import KINDS, Capture, Request

__all__ = [
    "INDEX",
    "KINDS",
    "WORKING",
    "Capture",
    "Captured",
    "Probe",
    "Request",
    "index",
    "label",
    "load",
    "memory",
    "of_sample",
    "read",
    "settle",
    "similarity",
    "whole",
    "write",
]
