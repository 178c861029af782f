"""Exact attention of every block, step and head, without replacing the fused kernel.

How a config becomes arrays:

1. A *capture* is a mapping of named requests in the form of programs (`requests`):
   `{cats: {kind: words, words: [cat], blocks: double, steps: 0-3, average: [heads]}}`. The kinds are functions that
   `@probe` registers (`registry`; `measures` and `per_query` have those of fluxlab).
2. `Probe.begin` resolves it against a run (`resolve`): tokens, steps, blocks and heads become numbers, and the shapes
   of all results and the memory are known. If they need more than `max_mb`, it raises an error before the run.
3. The model is given taps, one per block or None (`Flux.forward(taps=…)`). `attend`, the only entry to attention,
   calls the kernel that it would call anyway, asks it for its log-sum-exp, and passes q, k, mask and log-sum-exp to
   the tap. No class is patched and the model keeps no state. Without a tap nothing is computed, and with one the
   output is equal bit for bit on the CPU.
4. The attention weights are p = exp(q·kᵀ/√d + mask - lse). A row needs no other row and no second softmax, so that
   only the requested rows and columns are computed, in chunks that fit a cache (`stream`), and reduced at once.
   Memory is proportional to tokens × requested keys, never tokens². Groups of queries with keys of their own are
   separate kernel calls, whose results add up.
5. Results are arrays with named axes (`arrays`), written to safetensors. `read` returns those of a file, or of all
   cells of a run with `capture=`, as xarray `DataArray`s (`labelled`).

In fp32, p agrees with a dense softmax to 1e-6, the rounding of the scores. In bf16 and fp16 it is computed in fp32
from the q and k that the kernel read. PyTorch's flash kernel for CPUs approximates exponentials of 16-bit models, so
that its log-sum-exp, and with it p, has a relative error of up to 1e-4 there (1e-6 where `dense_attention` runs).
"""

from fluxlab.probes.arrays import Captured, is_complete, load, of_sample, write
from fluxlab.probes.labelled import INDEX, index, label, read, similarity
from fluxlab.probes.outputs import Measure, ProbeContext
from fluxlab.probes.recorder import Probe
from fluxlab.probes.registry import PROBES, ProbeKind, probe
from fluxlab.probes.requests import Capture, Request, concept_words
from fluxlab.probes.resolve import WORKING, memory, resolve

__all__ = [
    "INDEX",
    "PROBES",
    "WORKING",
    "Capture",
    "Captured",
    "Measure",
    "Probe",
    "ProbeContext",
    "ProbeKind",
    "Request",
    "concept_words",
    "index",
    "is_complete",
    "label",
    "load",
    "memory",
    "of_sample",
    "probe",
    "read",
    "resolve",
    "similarity",
    "write",
]
