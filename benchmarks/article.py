"""Compare the article's experiment in fluxlab and in Diffusers: pixels, and the time of each whole process.

    python benchmarks/article.py                  # about 10 min on 2 CPU cores: pixels, then 3 rounds of both
    python benchmarks/article.py --dtypes default # about 4 min: both with the dtype that they have by default
    python benchmarks/article.py --scaling        # about 10 min: memory and time for 12 to 1,200 cells

The Diffusers side is what a user would write: one call per image, with img_ids replaced by a patched method. Both read
the embedded model's folder and draw the same noise. A process is everything from the start of Python to the last file.
fluxlab's process also computes metrics and draws the grid.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "fluxlab" / "assets" / "tiny"
PROMPTS = ("A cat holding a sign that says hello world", "a red fox on the left holding a sign that says open cafe")
SEEDS = 4
DTYPES = ("float32", "bfloat16", "default")

DIFFUSERS = """
import sys, torch
from diffusers import FluxPipeline

folder, out, dtype, steps, length, seeds, *prompts = sys.argv[1:]
pipe = FluxPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
pipe.set_progress_bar_config(disable=True)
original = FluxPipeline._prepare_latent_image_ids

def axis0(ids):
    ids = ids.clone()
    ids[:, 0] = 1
    return ids

edits = {"baseline": lambda ids: ids, "zero": lambda ids: ids * 0, "half": lambda ids: ids * 0.5,
         "double": lambda ids: ids * 2, "stretch": lambda ids: ids * 1.2, "axis0": axis0}
for name, edit in edits.items():
    pipe._prepare_latent_image_ids = lambda *a, edit=edit: edit(original(*a))
    for i, prompt in enumerate(prompts):
        for seed in range(int(seeds)):
            image = pipe(prompt, height=64, width=64, num_inference_steps=int(steps), max_sequence_length=int(length),
                         generator=torch.Generator().manual_seed(seed)).images[0]
            image.save(f"{out}/{name}-{i}-{seed}.png")
"""


def diffusers_run(out: Path, dtype: str, steps: int, length: int) -> None:
    """Run the Diffusers script. dtype "default" is float32, the default of its transformer and autoencoder.

    Without a dtype Diffusers fails on this folder: transformers loads the text encoders in bfloat16, as stored.
    """
    out.mkdir(parents=True)
    dtype = "float32" if dtype == "default" else dtype
    _run([sys.executable, "-c", DIFFUSERS, FOLDER, out, dtype, steps, length, SEEDS, *PROMPTS])


def fluxlab_run(out: Path, dtype: str, steps: int, *more: str) -> int:
    """Run fluxlab's experiment. Return the peak resident memory in bytes."""
    of_dtype = [] if dtype == "default" else [f"dtype={dtype}"]
    command = [sys.executable, "-m", "fluxlab.run", "+exp=article", "model=tiny", f"steps={steps}", f"out={out}"]
    return _run([*command, "tracking=none", *of_dtype, *more])


def _run(command: list) -> int:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=env, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read())
    return usage.ru_maxrss * 1024


def pixels(folder: Path, steps: int, length: int) -> None:
    """Print the largest pixel difference between the fp32 images of both."""
    import numpy as np
    from PIL import Image

    from fluxlab.experiment.reading import read_store

    fluxlab_run(folder / "ours", "float32", steps)
    diffusers_run(folder / "theirs", "float32", steps, length)
    run = read_store(folder / "ours")
    worst, equal = 0, 0
    for variant in run.variants:
        for prompt, seed in run.places:
            theirs = folder / "theirs" / f"{variant}-{PROMPTS.index(prompt)}-{seed}.png"
            a, b = (np.asarray(Image.open(file)).astype(int) for file in (run.image(variant, prompt, seed), theirs))
            worst, equal = max(worst, abs(a - b).max()), equal + int((a == b).all())
    count = len(run.metrics)
    print(f"pixels, fp32: {count} images, {equal} equal, largest difference {worst}/255 (bound 1)", flush=True)


def timings(folder: Path, steps: int, length: int, rounds: int, dtypes: Sequence[str]) -> dict:
    """Time whole processes in alternating order. Return the times and the median ratio for each dtype."""
    results = {}
    for dtype in dtypes:
        ours, theirs = [], []
        for i in range(rounds):
            for side, times in ((fluxlab_run, ours), (diffusers_run, theirs))[:: 1 if i % 2 else -1]:
                out = folder / f"{dtype}-{i}-{side.__name__}"
                start = time.perf_counter()
                side(out, dtype, steps, *([length] if side is diffusers_run else []))
                times.append(time.perf_counter() - start)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        results[dtype] = {"fluxlab": ours, "diffusers": theirs, "ratio": ratio}
        aim = 0.45 if dtype == "default" else 0.7
        print(
            f"{dtype:>9}: fluxlab {statistics.median(ours):6.1f} s   Diffusers {statistics.median(theirs):6.1f} s   "
            f"ratio {ratio:.2f} (aim {aim})",
            flush=True,
        )
    return results


def scaling(folder: Path, steps: int) -> dict:
    """Measure peak memory and time of the same experiment with more seeds."""
    results = {}
    for seeds in (1, 10, 100):
        start = time.perf_counter()
        peak = fluxlab_run(folder / f"scaling-{seeds}", "default", steps, f"seeds={seeds}")
        seconds, cells = time.perf_counter() - start, 12 * seeds
        results[cells] = {"seconds": seconds, "peak_bytes": peak}
        print(f"{cells:>5} cells: peak {peak / 2**20:6.0f} MiB   {seconds:6.1f} s", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the timings; default: all")
    parser.add_argument("--length", type=int, default=24, help="text tokens: what model=tiny has")
    parser.add_argument("--scaling", action="store_true", help="memory and time against the number of cells instead")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.scaling:
            results = scaling(folder, min(arguments.steps, 4))
        else:
            pixels(folder, arguments.steps, arguments.length)
            results = timings(folder, arguments.steps, arguments.length, arguments.rounds, arguments.dtypes)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
