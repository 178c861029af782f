"""`make fullsize`: a model at its real size on this machine, within a limit of memory.

    python -m benchmarks.fullsize                          # 34 GB of disk, about 10 minutes on 2 CPU cores
    python -m benchmarks.fullsize --model klein4b          # 16 GB of disk, about 5 minutes: make fullsize MODEL=klein4b

Writes files with random weights. `dev` is FLUX.1-dev: the transformer (23.8 GB, bf16), T5-XXL (9.5 GB), CLIP and the
autoencoder. `klein4b` is FLUX.2 [klein] 4B: the transformer (7.8 GB), Qwen3-4B (8.0 GB) and the autoencoder. Then the
command line draws an image of 256² and two controls in one step with 32 text tokens: with `memory=resident`, and with
`memory.limit_gb`. Prints the peaks of the processes and whether their images are equal, and exits with 1 if the peak
with the limit is above it or the images differ. Where the disk has not enough room, it says so and does nothing.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from benchmarks.gpu_parts import machine
from fluxlab.checkpoints.memory import total_memory
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, TRANSFORMERS2, AutoEncoder, AutoEncoder2, Flux, Flux2
from fluxlab.training.text2 import tokenizer

SPARE = 4 * 10**9
"""Bytes of the disk that stay free."""

POOL = 1 << 24
"""Random values that all weights are cut from: drawing 17 billion of them would take longer than the image."""

TRANSFORMER = "transformer.safetensors"
LIMIT_GB = 6.0
"""The limit of memory: less than FLUX.1's text encoders, and than FLUX.2's language model or transformer."""

TINY = Path(__file__).resolve().parent.parent / "fluxlab" / "assets" / "tiny"


def write_random(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of bf16 weights: norms are 1, everything else is small and random. Streams to disk.

    A tensor without axes, which comes first, is the counter of a batch norm.
    """
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel() if shape else 8
        header[name] = {"dtype": "BF16" if shape else "I64", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(POOL, generator=generator) * 0.02).bfloat16()
    with open(file, "wb") as out:
        out.write(len(content).to_bytes(8, "little") + content)
        for number, (name, shape) in enumerate(shapes.items()):
            if not shape:
                out.write(bytes(8))
                continue
            left = torch.Size(shape).numel()
            if len(shape) == 1 and ("norm" in name or name.endswith(("scale", "running_var"))):
                out.write(torch.ones(left, dtype=torch.bfloat16).view(torch.uint8).numpy())
                continue
            start = 7919 * number % POOL
            while left:
                part = pool[start : start + left]
                out.write(part.view(torch.uint8).numpy())
                left, start = left - len(part), 0


def shapes_of(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights, the counters of batch norms first."""
    state = module.state_dict()
    return {prefix + name: tuple(state[name].shape) for name in sorted(state, key=lambda name: state[name].ndim > 0)}


Encoders = dict[str, tuple[object, dict[str, tuple[int, ...]]]]
"""Config and shapes by folder."""


def encoders(model: str) -> Encoders:
    """Return CLIP-L and T5 v1.1 XXL of `dev`, Qwen3-4B of `klein4b`."""
    return qwen() if model == "klein4b" else clip_and_t5()


def qwen() -> Encoders:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = shapes_of(Qwen3ForCausalLM(config))
    shapes.pop("lm_head.weight", None)  # the same tensor as the embedding
    return {"text_encoder": (config, shapes)}


def clip_and_t5() -> Encoders:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, projection_dim=768, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        modules = CLIPTextModel(clip), T5EncoderModel(t5)
    t5_shapes = shapes_of(modules[1])
    t5_shapes.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    return {"text_encoder": (clip, shapes_of(modules[0])), "text_encoder_2": (t5, t5_shapes)}


def files(model: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of every weight file."""
    with torch.device("meta"):
        if model == "klein4b":
            transformer, autoencoder = Flux2(TRANSFORMERS2[model]), AutoEncoder2(AUTOENCODERS["flux2"])
        else:
            transformer, autoencoder = Flux(TRANSFORMERS[model]), AutoEncoder(AUTOENCODERS["flux1"])
    text = {f"{folder}/model.safetensors": shapes for folder, (_, shapes) in encoders(model).items()}
    return {TRANSFORMER: shapes_of(transformer), "ae.safetensors": shapes_of(autoencoder), **text}


def write_model(model: str, folder: Path) -> None:
    """Write all files of the model. The tokenizers are those of embedded models."""
    for name, (config, _) in encoders(model).items():
        (folder / name).mkdir(parents=True)
        config.save_pretrained(folder / name)
    if model == "klein4b":
        tokenizer(length=512).save_pretrained(folder / "tokenizer")
    else:
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(TINY / name, folder / name)
    for name, shapes in files(model).items():
        write_random(folder / name, shapes)


def run(folder: Path, out: Path, *more: str) -> dict[str, float | str]:
    """Run the command line once. Return seconds, peaks in GB and a hash of the images."""
    tokenizers = [f"model.tokenizers={folder}"] if (folder / "tokenizer_2").is_dir() else []
    command = [
        sys.executable, "-m", "fluxlab.run", "+exp=hello", "model=local", f"model.path={folder}/{TRANSFORMER}",
        f"model.autoencoder={folder}/ae.safetensors", f"model.text={folder}",
        "prompts=[a cat]", "seeds=1", "steps=1", "height=256", "width=256", "max_sequence_length=32", "device=cpu",
        "dtype=bfloat16", "unknown_words=allow", "tracking=none", "cache=none", f"out={out}", *tokenizers, *more,
    ]  # fmt: skip
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks = {"rss": 0, "anonymous": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = {
            line.split()[0]: line.split()[1] for line in status.splitlines() if line.startswith(("VmRSS", "RssAnon"))
        }
        peaks["rss"] = max(peaks["rss"], 1024 * int(found.get("VmRSS:", 0)))
        peaks["anonymous"] = max(peaks["anonymous"], 1024 * int(found.get("RssAnon:", 0)))
        time.sleep(0.02)
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    print("\n".join(line for line in said.splitlines() if line.startswith("memory:")), flush=True)
    images = sorted(out.glob("cells/*.png")) + sorted(out.glob("references/*.png"))
    digest = hashlib.sha256(b"".join(image.read_bytes() for image in images)).hexdigest()[:12]
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "rss_gb": round(peaks["rss"] / 1e9, 2),
        "anonymous_gb": round(peaks["anonymous"] / 1e9, 2),
        "images": digest,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["dev", "klein4b"], default="dev")
    parser.add_argument("--limit-gb", type=float, default=LIMIT_GB, help=f"default: {LIMIT_GB:g}")
    parser.add_argument("--folder", type=Path, help="where to write the files (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    model, limit = options.model, options.limit_gb
    needed = sum(2 * torch.Size(shape).numel() for shapes in files(model).values() for shape in shapes.values())
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        free = shutil.disk_usage(scratch).free
        if free < needed + SPARE:
            print(f"skipped: the disk has {free / 1e9:.1f} GB free, {(needed + SPARE) / 1e9:.1f} GB are needed")
            return 0
        start = time.perf_counter()
        write_model(model, Path(scratch) / "model")
        print(f"wrote {needed / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        rows: dict[str, dict[str, float | str]] = {}
        for name, more in (("resident", "memory=resident"), ("limit", f"memory.limit_gb={limit:g}")):
            rows[name] = run(Path(scratch) / "model", Path(scratch) / name, more)
            print(f"{name}: {rows[name]}", flush=True)
    resident, limited = rows["resident"], rows["limit"]
    equal = limited["images"] == resident["images"]
    ratio = limited["seconds"] / resident["seconds"]
    print(f"images equal: {equal}; limit ÷ resident: {ratio:.2f} in time")
    print(f"peak of {limited['rss_gb']} GB, limit {limit:g} GB")
    if options.json:
        record = {"limit_gb": limit, "runs": rows, "ratio": round(ratio, 3), "memory": total_memory()}
        options.json.write_text(json.dumps({"machine": machine("cpu"), "model": model, **record}, indent=1) + "\n")
    return 0 if equal and limited["rss_gb"] <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
