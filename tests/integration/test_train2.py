"""A training run of the FLUX.2 family, whole: stopped and resumed, exported, loaded by two libraries, measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fluxlab
from benchmarks import embedded
from fluxlab import run, train
from fluxlab.checkpoints.manifest import verify_manifest
from fluxlab.measure import oracle_columns
from fluxlab.training import stages
from fluxlab.training.card import card

MICRO = [
    "+train=tiny2", "tracker=none", "device=cpu", "pool=6", "pool_early=6", "pool_other=2", "batch=2", "early_batch=2",
    "workers=0", "warmup=2", "sample_steps=1", "save_every=2", "sample_every=100", "steps=4", "hint_steps=3",
]  # fmt: skip
LENGTH = 24
SHIPPED = Path(fluxlab.__file__).parent / "assets" / "tiny2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert train.main([*MICRO, f"out={out}"]) == 0
    return out


def test_a_stopped_run_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch):
    real = stages.average_decay

    def stops(decay, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(decay, step)

    monkeypatch.setattr(stages, "average_decay", stops)
    assert train.main([*MICRO, f"out={tmp_path}"]) == 130
    assert not (tmp_path / "pipeline").exists()
    monkeypatch.undo()
    assert train.main([*MICRO, f"out={tmp_path}"]) == 0
    one, two = (load_file(out / "state.safetensors") for out in (trained, tmp_path))
    assert one.keys() == two.keys()
    assert any("lm." in key for key in one)
    assert not any("teacher" in key for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_export_says_who_taught_it_and_has_the_average_in_bf16(trained):
    folder = trained / "pipeline"
    verify_manifest(folder)
    facts = json.loads((folder / "training.json").read_text())
    shipped = json.loads((Path(fluxlab.__file__).parent / "assets/tiny/manifest.json").read_text())
    assert facts["teacher"]["weights"] in json.dumps(shipped)
    pipe = fluxlab.load_pipeline(folder)
    average = load_file(trained / "state.safetensors")
    assert torch.equal(pipe.transformer.img_in.weight, average["ema.transformer.img_in.weight"].bfloat16())
    word = average["ema.lm.model.embed_tokens.weight"]
    assert torch.equal(pipe.text.encoder.get_input_embeddings().weight, word.bfloat16())
    assert pipe.distilled


def test_diffusers_makes_the_same_images(trained):
    import diffusers

    ours = fluxlab.load_pipeline(trained / "pipeline", dtype=torch.float32, device="cpu")
    theirs = diffusers.Flux2KleinPipeline.from_pretrained(trained / "pipeline", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    for seed, prompt in enumerate(["A cat holding a sign that says hello world", ""]):
        size = {"height": 64 - 16 * seed, "width": 64 + 16 * seed}
        (image,) = ours.generate(prompt, seed, steps=2, max_sequence_length=LENGTH, **size)
        other = theirs(
            prompt=prompt,
            num_inference_steps=2,
            max_sequence_length=LENGTH,
            text_encoder_out_layers=(1, 2, 3),
            generator=torch.Generator("cpu").manual_seed(seed),
            **size,
        ).images[0]
        assert image.size == other.size
        assert np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_a_run_draws_with_it(trained, tmp_path):
    given = ["model=local", f"model.path={trained / 'pipeline'}", f"model.max_sequence_length={LENGTH}"]
    given += ["model.size=[64,64]", "model.steps=1", "tracking=none", "cache=none", f"out={tmp_path}"]
    assert run.main(["+exp=hello", *given, "seeds=1"]) == 0
    assert (tmp_path / "grid.png").is_file()


def test_it_can_be_measured(trained, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--model", str(trained / "pipeline"), "--cells", "2", "--steps", "1"])
    assert embedded.main() == 0
    card = (trained / "pipeline" / "README.md").read_text()
    assert card.startswith("# tiny2: the FLUX.2 that ships with fluxlab")
    assert "16 + 16 + 16 + 16 over (t, h, w, l)" in card
    assert "| teacher |" in card


def test_the_shipped_folder_is_what_its_manifest_says_and_small():
    verify_manifest(SHIPPED)
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 24e6
    for file in SHIPPED.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} <= {torch.bfloat16, torch.int64}


def test_the_shipped_model_draws_what_its_card_says():
    """Two cells of the card: the right colour at the right place."""
    pipe = fluxlab.load_pipeline("tiny2", dtype=torch.float32, device="cpu")
    prompts = ["a red fox on the left", "a blue heart at the top"]
    images = pipe.generate(prompts, 0, steps=8)
    for prompt, image in zip(prompts, images, strict=True):
        found = oracle_columns(np.asarray(image), prompt)
        assert (found["object"], found["colour"], found["place"]) == (1, 1, 1), prompt
    results = json.loads((SHIPPED / "embedded.json").read_text())
    ability = results["edits"]["as trained"]
    assert results["cells"] == 192
    assert all(ability[name][0] >= 0.95 for name in ("object", "colour", "place"))
    assert (
        card(results, json.loads((SHIPPED / "training.json").read_text()), SHIPPED)
        == (SHIPPED / "README.md").read_text()
    )


def test_what_does_not_fit_is_an_error_of_use(tmp_path, capsys):
    assert train.main([*MICRO, f"out={tmp_path}", "hidden_size=64"]) == 2
    assert "hints: teacher=tiny has hidden_size" in capsys.readouterr().err
    assert train.main([*MICRO, f"out={tmp_path}", "autoencoder.z_channels=4"]) == 2
    assert "autoencoder.z_channels=4: the given one has 8" in capsys.readouterr().err
