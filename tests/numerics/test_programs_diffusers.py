"""Programs against Diffusers' `FluxPipeline` with the same changes of ids made by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab.config import PACKAGE
from tests import tiny

EMBEDDED = PACKAGE / "assets" / "tiny"
PROMPT = "A cat holding a sign that says hello world"
TEXT_AT = torch.tensor([0.0, 4.0, 4.0])


def index_one(ids):
    ids[:, 0] = 1
    return ids


# name: (edit, the same change of img_ids (N, 3), of txt_ids (L, 3))
EDITS = {
    "unchanged": (None, lambda ids: ids, lambda ids: ids),
    "zero": ({"op": "zero"}, lambda ids: ids * 0, lambda ids: ids),
    "half": ({"op": "scale", "factor": 0.5}, lambda ids: ids * 0.5, lambda ids: ids),
    "1.2": ({"op": "scale", "factor": 1.2}, lambda ids: ids * 1.2, lambda ids: ids),
    "double": ({"op": "scale", "factor": 2}, lambda ids: ids * 2, lambda ids: ids),
    "index": ({"op": "set", "value": 1, "axes": "index"}, index_one, lambda ids: ids),
    "offset": ({"op": "offset", "by": [3, -2.5, 7]}, lambda ids: ids + torch.tensor([3, -2.5, 7]), lambda ids: ids),
    "text": ({"op": "relocate", "tokens": "text", "to": [4, 4]}, lambda ids: ids, lambda ids: ids + TEXT_AT),
}


def save_sharp(where: Path) -> Path:
    """Make attention sharper and stronger, since random weights hardly depend on positions."""
    pipe = tiny.diffusers_pipeline(seed=3)
    for name, weight in pipe.transformer.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            weight.mul_(2)
        elif name.startswith("proj_out"):
            weight.mul_(4)
        elif ".to_out" in name or ".to_add_out" in name or ".proj_out" in name:
            weight.mul_(8)
    pipe.save_pretrained(where)
    return where


@pytest.fixture(scope="module", params=["random", "embedded"])
def folder(request, tmp_path_factory) -> Path:
    return EMBEDDED if request.param == "embedded" else save_sharp(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def ours(folder):
    return fluxlab.load_pipeline("tiny" if folder == EMBEDDED else folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(folder):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def settings(folder, ours):
    """Size, steps and text length. The embedded model uses its own."""
    if folder == EMBEDDED:
        return {"height": ours.size[0], "width": ours.size[1], "steps": 8, "length": ours.max_sequence_length}
    return {"height": 32, "width": 48, "steps": 4, "length": 24}


def with_ids(pipe, edit_image, edit_text, **options):
    """Return Diffusers' image with the ids changed on their way into the transformer."""
    forward = pipe.transformer.forward

    def patched(*args, img_ids, txt_ids, **kwargs):
        img_ids, txt_ids = img_ids.float().clone(), txt_ids.float().clone()
        return forward(*args, img_ids=edit_image(img_ids), txt_ids=edit_text(txt_ids), **kwargs)

    pipe.transformer.forward = patched
    try:
        return pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(1), **options).images[0]
    finally:
        del pipe.transformer.forward


def in_pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def by_diffusers(theirs, settings):
    options = {key: settings[key] for key in ("height", "width")}
    options |= {"num_inference_steps": settings["steps"], "max_sequence_length": settings["length"]}
    if not theirs.transformer.config.guidance_embeds:
        options["guidance_scale"] = 0.0
    return {name: in_pixels(with_ids(theirs, image, text, **options)) for name, (_, image, text) in EDITS.items()}


@pytest.fixture(scope="module")
def one_batch(ours, settings):
    """All edits in one batch."""
    programs = [edit and {"a": edit} for edit, _, _ in EDITS.values()]
    images = ours.generate(
        [PROMPT],
        [1],
        height=settings["height"],
        width=settings["width"],
        steps=settings["steps"],
        max_sequence_length=settings["length"],
        programs=programs,
    )
    return dict(zip(EDITS, map(in_pixels, images), strict=True))


@pytest.mark.parametrize("name", EDITS)
def test_same_pixels(name, ours, settings, by_diffusers, one_batch):
    edit = EDITS[name][0]
    (alone,) = ours.generate(
        PROMPT,
        1,
        height=settings["height"],
        width=settings["width"],
        steps=settings["steps"],
        max_sequence_length=settings["length"],
        programs=edit and {"a": edit},
    )
    expected = by_diffusers[name]
    assert np.abs(in_pixels(alone) - expected).max() <= 1
    assert np.abs(one_batch[name] - expected).max() <= 1


def test_each_edit_changes_the_image(by_diffusers):
    """The change exceeds the tolerance of `test_same_pixels`, so that test can fail."""
    for name in EDITS:
        if name != "unchanged":
            assert np.abs(by_diffusers[name] - by_diffusers["unchanged"]).max() >= 5, name
