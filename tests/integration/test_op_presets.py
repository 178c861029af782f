"""Every file of `configs/op` runs on both families, in one batch, and changes the image if it should."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

import fluxlab
from fluxlab.config import config_folder
from fluxlab.positions import Program, region_prompts, split_resample
from tests import families

PROMPT = "a cat holding a sign that says hello world"
OPEN = {"to": [4, 4]}
"""Values for arguments that a preset leaves open."""
SAME = {"place", "quantize"}
"""References have these ids already, and whole numbers are exact."""

OF_FLUX2 = {"layout", "theta"}
"""Presets that give a model FLUX.2's positions."""


def presets(blocks: int = 6) -> dict[str, Program]:
    """Return all presets. blocks: of the model. They name blocks of FLUX.1, of which it has the first ones."""
    found = {}
    for file in sorted((config_folder() / "op").glob("*.yaml")):
        edit = OmegaConf.to_container(OmegaConf.load(file))
        edit = {key: OPEN[key] if value == "???" else value for key, value in edit.items()}
        if isinstance(edit.get("blocks"), list):
            edit["blocks"] = [block for block in edit["blocks"] if block < blocks]
        if "source" in edit:
            edit["source"] = {"sample": 1}  # the name of a variant means something in an experiment only
        found[file.stem] = Program.from_config({file.stem: edit})
    return found


@pytest.fixture(params=["tiny", "flux2"])
def pipe(request):
    if request.param == "tiny":
        return fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    return replace(families.load("flux2"), size=(32, 32), max_sequence_length=16)


def test_every_op_preset_runs_and_changes_the_image(pipe):
    """At 1.5 times the model's size and with two reference images, so that every method acts."""
    p = pipe.transformer.params
    every = presets(p.depth + p.depth_single_blocks)
    chosen = {name: program for name, program in every.items() if split_resample(program)[1] is None}
    noise = torch.Generator().manual_seed(0)
    half, side = pipe.size[0] // 2, pipe.size[0] * 3 // 2
    references = [[torch.rand(1, 3, *size, generator=noise) for size in ((half, half), (half, side // 2))]]
    more = {"references": references, "height": side, "width": side, "steps": 2, "output": "latent"}
    same = set()
    for regions in (0, 2):  # numbers of texts: what takes from another sample needs one layout
        some = {name: program for name, program in chosen.items() if len(region_prompts(program)) == regions}
        programs = [Program(), Program(), *some.values()]
        seeds = [0, 1] + [0] * len(some)  # the second sample is the source of those that inject
        latents = pipe.generate([PROMPT] * len(programs), seeds, programs, **more)
        assert latents.isfinite().all()
        change = (latents - latents[0]).abs().amax((1, 2)) / latents[0].std()
        same |= {name for name, c in zip(some, change[2:].tolist(), strict=True) if c < 1e-3}
    assert same == SAME | (OF_FLUX2 if pipe.family.name == "flux2" else set())


@pytest.mark.parametrize("name", ["resample"])
def test_presets_of_another_size(name, pipe):
    small, large = pipe.generate(PROMPT, 0, [presets()[name], None], height=96, width=96, steps=1)
    own = pipe.generate(PROMPT, 0, steps=1)[0]
    assert small.size == large.size == (96, 96)
    assert small.tobytes() == own.resize((96, 96), 3).tobytes()  # 3: bicubic
    assert small.tobytes() != large.tobytes()
