"""A third family that is registered from outside goes through everything, and no general file names a family."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fluxlab
from fluxlab.checkpoints import CheckpointError, find, load_transformer, save_pipeline, save_transformer
from fluxlab.checkpoints.identity import fingerprint
from fluxlab.checkpoints.stored import stored
from fluxlab.config import ModelRow, find_row
from fluxlab.errors import UserError
from fluxlab.experiment.costs import decode_flops, forward_flops
from fluxlab.families import FAMILIES, family_of, register
from fluxlab.loading import load_row, pipeline_without_weights
from fluxlab.memory.costs import transformer_bytes
from fluxlab.positions import Program
from fluxlab.probes import Probe
from tests import third_family as third

ROOT = Path(fluxlab.__file__).parent
SIZE = {"height": 12, "width": 16}


@pytest.fixture(autouse=True)
def registered():
    register(third.FAMILY)
    yield
    del FAMILIES["third"]


@pytest.fixture
def folder(tmp_path):
    save_pipeline(tmp_path / "third", *third.parts())
    return tmp_path / "third"


@pytest.fixture
def pipe(folder):
    return fluxlab.load_pipeline(folder, cache="none")


def row_of(folder) -> ModelRow:
    return replace(find_row(folder), max_sequence_length=6, size=(12, 16))


def latents(pipe, program=None, **options) -> torch.Tensor:
    given = {"seeds": 0, "output": "latent", "max_sequence_length": 6, **SIZE, **options}
    return pipe.generate("a cat", programs=program, **given)


def equal(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_is_written_read_and_sampled(folder, pipe):
    transformer, autoencoder, text, _ = third.parts()
    assert find(folder).kind == "pipeline"
    assert equal(pipe.transformer, transformer)
    assert equal(pipe.autoencoder, autoencoder)
    assert torch.equal(pipe.text.table, text.table)
    assert pipe.family is third.FAMILY
    assert (pipe.steps, pipe.pixels_per_token, pipe.schedule.shift) == (3, 2, 2.0)
    assert latents(pipe).shape == (1, 6 * 8, 4)
    (image,) = latents(pipe, output="pil")
    assert image.size == (16, 12)
    again, *_ = pipe.encode(image)
    assert again.shape == (1, 6 * 8, 4)
    with pytest.raises(UserError, match="expected letters"):
        pipe.generate("a cat?", unknown_words="error")


def test_single_files_are_recognised(tmp_path, folder):
    transformer = third.parts()[0]
    save_transformer(transformer, tmp_path / "own.safetensors")
    assert equal(load_transformer(tmp_path / "own.safetensors"), transformer)
    theirs = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for file, state in (("own", transformer.state_dict()), ("theirs", theirs)):  # without sizes in the metadata
        save_file({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / f"{file}.safetensors")
        assert equal(load_transformer(tmp_path / f"{file}.safetensors"), transformer)
    fluxes = {name: load_transformer(ROOT / "assets" / name) for name in ("tiny", "tiny2")}
    for name, flux in fluxes.items():
        save_transformer(flux, tmp_path / f"{name}.safetensors")
        assert equal(load_transformer(tmp_path / f"{name}.safetensors"), flux)
    family = FAMILIES.pop("third")
    try:
        with pytest.raises(CheckpointError, match="of another model family"):
            load_transformer(tmp_path / "theirs.safetensors")
        with pytest.raises(CheckpointError, match="'ThirdTransformer2DModel', expected 'FluxTransformer2DModel'"):
            load_transformer(folder)
    finally:
        FAMILIES["third"] = family


def test_programs_know_its_axes_and_its_ids(pipe):
    context = pipe.context(["a cat"], 6, (3, 5), (1.0, 0.0))
    assert context.ids[0, :6].tolist() == [[2.0 + i] * 3 for i in range(6)]
    assert context.ids[0, 6].tolist() == [0, -1, -2]
    by_its_names = {"a": {"op": "offset", "by": {"y": 2}, "axes": "y", "tokens": {"words": ["cat"]}}}
    by_roles = {"a": {"op": "offset", "by": {"row": 2}, "axes": "row", "tokens": {"words": ["cat"]}}}
    assert Program.from_config(by_its_names).digest == Program.from_config(by_roles).digest
    moved, own = latents(pipe, by_its_names), latents(pipe)
    assert torch.equal(moved, latents(pipe, by_roles))
    assert not torch.equal(moved, own)
    with pytest.raises(UserError, match="no axis for the order of text"):
        latents(pipe, {"a": {"op": "offset", "by": 1, "axes": "order"}})
    with pytest.raises(UserError, match="axes: 'z', expected an axis: index, row, col, order, t, h, w, l, frame, y, x"):
        Program.from_config({"a": {"op": "zero", "axes": "z"}})


def test_attention_is_captured(pipe):
    probe = Probe("words")
    latents(pipe, probe=probe)
    assert probe.arrays["words"].values.shape[-2:] == (6, 8)


def test_memory_is_planned_and_streamed(folder, pipe):
    row, parts = row_of(folder), stored(row_of(folder))
    assert parts["letters"].parameters.total() == 27 * 8
    empty = pipeline_without_weights(row, parts, None, torch.device("cpu"))
    assert empty.steps == pipe.steps
    empty.check(["a cat"], [Program()], empty.defaults)
    p = pipe.transformer.params
    assert transformer_bytes(p, 4) == sum(weight.nbytes for weight in pipe.transformer.parameters())
    assert forward_flops(p, 6, 48) > 2 * 54 * sum(w.numel() for w in pipe.transformer.single_blocks[0].parameters())
    assert decode_flops(pipe.family, pipe.autoencoder.params, 12, 16) > 0
    streamed = load_row(row, memory="streamed")
    assert "streamed" in streamed.prepare(streamed.defaults, ["a cat"]).describe()
    assert torch.equal(latents(streamed), latents(pipe))


@pytest.mark.parametrize("module", ["transformer.layers.0.out", "single_blocks.0.linear2", "lora_unet_blocks_0_o"])
def test_loras_find_its_layers(folder, pipe, tmp_path, module):
    down, up = torch.randn(2, 96), torch.randn(32, 2)
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    changed = load_row(replace(row_of(folder), lora=fluxlab.config.read_loras(str(tmp_path / "lora.safetensors"))))
    before = pipe.transformer.single_blocks[0].linear2.weight
    torch.testing.assert_close(changed.transformer.single_blocks[0].linear2.weight, before + up @ down)


def test_a_fingerprint_sees_its_text(folder):
    row = replace(row_of(folder), tokenizers=str(folder / "text_encoder"))
    before = fingerprint(row)
    save_file({"table": torch.zeros(27, 8)}, folder / "text_encoder" / "letters.safetensors")
    assert fingerprint(row) != before


def test_what_cannot_be_registered():
    for changes, message in (
        ({}, "there is a family of this name"),
        ({"name": "x", "axes": ("t", "w", "h")}, "axis w is the row, but in another family the col"),
        ({"name": "x", "transformer": FAMILIES["flux1"].transformer}, "no names of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            register(replace(third.FAMILY, **changes))
    assert family_of(third.ThirdParams()) is third.FAMILY


# --- general code -----------------------------------------------------------------------------------

OWN = {
    "families/flux1.py", "families/flux2.py", "checkpoints/flux1.py", "checkpoints/flux2.py", "schedules/flux1.py",
    "schedules/flux2.py", "training/flux1.py", "training/flux2.py", "conditioning/encoders.py",
    "conditioning/language_model.py", "training/text.py", "training/text2.py", "checkpoints/text.py",
    "checkpoints/text2.py",
}  # fmt: skip
"""Files of a family, or of a kind of text encoder."""

ALLOWED = {
    "checkpoints/random.py": "a command that writes a random FLUX.1",
    "families/__init__.py": "FLUX.1 comes first",
    "positions/at_step.py": "the default sizes of a sequence without a model",
    "positions/ops.py": "layouts of published models, by name",
    "training/recipe.py": "the default of `family`",
    "training/autoencoder_stage.py": "trains FLUX.1's autoencoder, which a family may change into its own",
}
NAMES = {
    "Flux", "FluxParams", "Flux2", "Flux2Params", "AutoEncoderParams", "AutoEncoder2", "AutoEncoder2Params",
    "Schedule2", "TRANSFORMERS", "TRANSFORMERS2", "AUTOENCODERS", "LanguageModelText", "flux1", "flux2", "t5_tokenizer",
    "clip_tokenizer",
}  # fmt: skip


def named(file: Path) -> set[str]:
    """Return the names of a family that code uses: variables, attributes, imports and whole strings, no prose."""
    text, found = file.read_text(), set()
    if not any(name in text for name in NAMES):  # parsing takes time
        return found
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {*node.name.split(".")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found & NAMES


def test_general_code_names_no_family():
    files = {str(file.relative_to(ROOT)): file for file in sorted(ROOT.rglob("*.py"))}
    general = {name: file for name, file in files.items() if name not in OWN and not name.startswith("model/")}
    assert OWN | set(ALLOWED) <= set(files)
    naming = {name: sorted(names) for name, file in general.items() if (names := named(file))}
    assert set(naming) == set(ALLOWED), {name: names for name, names in naming.items() if name not in ALLOWED}
