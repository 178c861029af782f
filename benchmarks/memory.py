"""`python -m benchmarks.memory`: what the planner does with FLUX.1 on cards of 80, 24, 12 and 8 GB. Takes seconds.

Computed from sizes alone: nothing is loaded or measured. Prints the table of docs/memory.md.
"""

import argparse

import torch

from fluxlab.errors import UserError
from fluxlab.memory import Memory, ModelSizes, Room, Workload, make_plan
from fluxlab.memory.costs import gb
from fluxlab.model import AUTOENCODERS, TRANSFORMERS

CARDS = (80, 24, 12, 8)
T5, CLIP, T5_LAYER = 4_762_310_656, 123_060_480, 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096  # parameters
WORD_MAPS = 450 * 10**6
"""More than the word maps of a prompt of 20 words take at 1024² with their scratch: all blocks, 28 steps."""


def sizes(name: str, stored: torch.dtype) -> ModelSizes:
    """Return the sizes of a published model in bf16, with blocks stored in a dtype."""
    bf16 = torch.bfloat16
    return ModelSizes(
        TRANSFORMERS[name],
        AUTOENCODERS["flux1"],
        dtype=bf16,
        stored=stored,
        autoencoder_dtype=bf16,
        text_bytes=2 * (T5 + CLIP),
        text_layer_bytes=2 * T5_LAYER,
    )


def row(name: str, stored: torch.dtype, card: int, work: Workload) -> str:
    """Return one row of the table."""
    kind = str(stored)[6:]
    try:
        plan = make_plan(sizes(name, stored), work, Memory(limit_gb=card), Room("cuda", None), stored.itemsize == 1)
    except UserError as error:
        return f"| {card} GB | {kind} | does not fit: {str(error).splitlines()[0]} | | | |"
    blocks = f"{len(plan.resident)} of {plan.blocks}" if plan.streamed else f"all {plan.blocks}"
    streamed = gb(plan.step_bytes) if plan.streamed else "–"
    known = "released" if plan.streams else "kept"
    return f"| {card} GB | {kind} | {blocks} | {streamed} | {known} | {gb(plan.peak_bytes)} |"


def table(name: str, side: int, steps: int) -> list[str]:
    """Return the lines of the table."""
    work = Workload(batch=1, height=side, width=side, text=512, steps=steps, probe_bytes=WORD_MAPS)
    kinds = (torch.bfloat16, torch.float8_e4m3fn)
    head = "| card | file | resident blocks | streamed a step | weights of modulations | peak |"
    return [head, "|---|---|---|---|---|---|", *(row(name, kind, card, work) for kind in kinds for card in CARDS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dev", choices=sorted(TRANSFORMERS))
    parser.add_argument("--side", type=int, default=1024, help="of the image in pixels")
    parser.add_argument("--steps", type=int, default=28)
    options = parser.parse_args()
    print("\n".join(table(options.model, options.side, options.steps)))


if __name__ == "__main__":
    main()
