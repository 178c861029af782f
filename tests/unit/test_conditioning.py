"""Text first: prompts come from the cache or are encoded before the transformer is loaded, with equal bits."""

import shutil
from dataclasses import replace

import pytest
import torch

import fluxlab
from fluxlab import cache as caching
from fluxlab import loading
from fluxlab.checkpoints.random import write_random
from fluxlab.conditioning import Texts
from fluxlab.conditioning import encoders as conditioning
from fluxlab.config import ModelRow
from fluxlab.errors import UserError
from fluxlab.model.t5_blocks import blockwise_states
from fluxlab.model.text import TextEncoders
from tests import families

PROMPTS = ("a cat", "holding a sign", "")
LENGTH = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_SETTLED", -1)
    return str(tmp_path / "cache")


@pytest.fixture
def opened(monkeypatch):
    """The encoders that were loaded, by part."""
    loaded = []
    load = conditioning.load_encoders

    def counted(encoders, *args, **kwargs):
        loaded.extend(encoder.part for encoder in encoders)
        return load(encoders, *args, **kwargs)

    monkeypatch.setattr(conditioning, "load_encoders", counted)
    return loaded


def load(folder, cache, texts=None, **changes):
    return loading.load_row(
        ModelRow("local", str(folder), max_sequence_length=LENGTH), cache=cache, texts=texts, device="cpu", **changes
    )


def encoded(pipe, prompts=PROMPTS, length=LENGTH):
    return [tensor for prompt in prompts for tensor in pipe.text.encode(prompt, length)]


def same(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_transformers(folder, dtype=None):
    """The states without anything of `conditioning`: both encoders, loaded at once."""
    text = TextEncoders(*fluxlab.checkpoints.load_text_encoders(folder, dtype=dtype))
    return [tensor for prompt in PROMPTS for tensor in text.encode(prompt, LENGTH)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_equal_bits_with_and_without_the_cache(folder, cache, opened, dtype):
    expected = by_transformers(folder, dtype)
    assert same(encoded(load(folder, "none", dtype=dtype)), expected)
    assert same(encoded(load(folder, cache, dtype=dtype)), expected)
    opened.clear()
    assert same(encoded(load(folder, cache, dtype=dtype)), expected)
    assert same(encoded(load(folder, cache, Texts(PROMPTS), dtype=dtype)), expected)
    assert opened == []
    assert same(encoded(load(folder, "none", Texts(PROMPTS), dtype=dtype)), expected)
    assert opened == ["clip", "t5"]


def test_text_comes_before_the_transformer(folder, opened, monkeypatch):
    seen = []
    load_transformer = fluxlab.checkpoints.load_transformer

    def loaded(*args, **kwargs):
        seen.append(list(opened))
        return load_transformer(*args, **kwargs)

    monkeypatch.setattr(fluxlab.checkpoints, "load_transformer", loaded)
    pipe = load(folder, "none", Texts(PROMPTS))
    assert seen == [["clip", "t5"]]
    assert pipe.text._modules is None
    pipe.generate(list(PROMPTS), 0, height=16, width=16, steps=1)
    assert opened == ["clip", "t5"]
    pipe.generate("a fox", 0, height=16, width=16, steps=1)
    assert opened == ["clip", "t5"] * 2


def test_the_encoders_free_their_memory(folder):
    import gc
    import weakref

    pipe = load(folder, "none")
    pipe.encode_prompt("a cat")
    held = [weakref.ref(module) for module in pipe.text._modules]
    pipe.text.release()
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_what_the_cache_key_holds(folder, cache, opened, tmp_path):
    """Anything that changes the states, and nothing else."""

    def count(**changes):
        opened.clear()
        encoded(load(changes.pop("folder", folder), cache, **changes), ["a cat"], changes.pop("length", LENGTH))
        return len(opened) > 0

    assert count()
    assert not count()
    pipe = load(folder, cache)
    opened.clear()
    pipe.text.encode("a cat", LENGTH + 1)
    assert opened
    assert count(dtype=torch.bfloat16)
    assert not count(dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert count()
    finally:
        torch.set_num_threads(threads)
    assert not count()
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert not count(folder=moved)  # where the files are does not matter
    shutil.copytree(write_random(tmp_path / "other", seed=1) / "transformer", moved / "transformer", dirs_exist_ok=True)
    assert not count(folder=moved)  # nor does the transformer
    shutil.copytree(tmp_path / "other" / "text_encoder", moved / "text_encoder", dirs_exist_ok=True)
    assert count(folder=moved)
    tokenizer = moved / "tokenizer_2" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("-6.0", "-5.0"))
    assert count(folder=moved)


def test_another_version_of_the_encoding_is_another_key(folder, cache, opened, monkeypatch):
    encoded(load(folder, cache))
    monkeypatch.setattr(conditioning, "ENCODING", conditioning.ENCODING + 1)
    opened.clear()
    encoded(load(folder, cache))
    assert opened


def test_a_damaged_entry_is_made_anew(folder, cache, opened, tmp_path):
    expected = encoded(load(folder, cache))
    for file in (tmp_path / "cache" / "text").iterdir():
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    opened.clear()
    assert same(encoded(load(folder, cache)), expected)
    assert opened
    opened.clear()
    assert same(encoded(load(folder, cache)), expected)
    assert not opened


def test_weights_that_may_have_been_changed_are_used_and_not_stored(folder, cache, opened, tmp_path):
    before = encoded(load(folder, cache))
    stored = sorted((tmp_path / "cache" / "text").iterdir())
    pipe = load(folder, cache, Texts(PROMPTS))
    with torch.no_grad():
        pipe.text.t5.shared.weight.mul_(2)
    changed = encoded(pipe)
    assert not same(changed, before)
    pipe.text.release()
    assert same(encoded(pipe), changed)
    assert sorted((tmp_path / "cache" / "text").iterdir()) == stored
    assert same(encoded(load(folder, cache)), before)


def test_prompts_are_checked_before_anything_is_loaded(folder, cache, opened):
    with pytest.raises(UserError, match=r"prompt 'a 7': .* no token for '7'"):
        load(folder, cache, Texts(("a cat", "a 7")))
    with pytest.raises(UserError, match="max_sequence_length=16"):
        load(folder, cache, Texts(("cat " * 20,)))
    assert opened == []
    load(folder, cache, Texts(("a 7", "cat " * 20), truncate=True, unknown_words="allow"))
    assert opened == ["clip", "t5"]


def test_many_prompts_go_in_groups(folder, cache, monkeypatch, capsys):
    monkeypatch.setattr(conditioning, "GROUP", 2)
    prompts = tuple(f"a cat {letter}" for letter in "bcdef")
    pipe = load(folder, cache, Texts((*prompts, *prompts)))
    assert same(encoded(pipe, prompts), encoded(load(folder, "none"), prompts))
    assert "prompts 5/5" in capsys.readouterr().out


def test_a_prompt_that_was_evicted_is_still_there(folder, cache, opened, monkeypatch, tmp_path):
    monkeypatch.setenv("FLUXLAB_CACHE_GB", "1e-9")
    pipe = load(folder, cache, Texts(PROMPTS))
    assert list((tmp_path / "cache" / "text").iterdir()) == []
    opened.clear()
    assert same(encoded(pipe), by_transformers(folder))
    assert opened == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_t5_block_by_block_has_equal_bits(folder, dtype):
    text = TextEncoders(*fluxlab.checkpoints.load_text_encoders(folder, dtype=dtype))
    ids = [text.t5_ids(prompt, LENGTH) for prompt in PROMPTS]
    uses = []
    states = blockwise_states(
        text.t5, ids, torch.device("cpu"), lambda m: uses.append(("before", m)), lambda m: uses.append(("after", m))
    )
    with torch.inference_mode():
        assert same(states, [text.t5(tokens)[0] for tokens in ids])
    parts = [*text.t5.encoder.block, text.t5.encoder.final_layer_norm]
    assert uses == [(when, part) for part in parts for when in ("before", "after")]


def test_t5_goes_block_by_block_where_it_does_not_fit(folder, cache, opened, monkeypatch):
    expected = by_transformers(folder)
    calls = []
    monkeypatch.setattr(conditioning, "blockwise_states", lambda *given: calls.append(1) or blockwise_states(*given))
    pipe = load(folder, cache)
    size = pipe.text.size()
    assert size["t5"] == sum(p.numel() * 4 for p in fluxlab.load_pipeline(folder, device="cpu").text.t5.parameters())
    pipe.text.room = sum(size.values())
    assert same(encoded(load(folder, "none")), expected)
    assert calls == []
    pipe.text.room -= 1
    assert same(encoded(pipe), expected)
    assert len(calls) == len(PROMPTS)
    assert pipe.text.t5.device.type == "cpu"
    assert same(encoded(pipe), expected)
    assert len(calls) == len(PROMPTS)


def test_weights_that_are_not_finite_are_found_block_by_block(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder_2" / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = next(name for name in weights if "block.1.layer.1" in name)
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, tmp_path / "changed", {"format": "pt"})
    shutil.move(tmp_path / "changed", file)
    for room in (None, 1):
        pipe = load(folder, "none")
        pipe.text.room = room
        with pytest.raises(UserError, match="1 values that are not finite"):
            encoded(pipe)


def test_sizes_and_dtypes_are_those_of_the_loaded_encoders(folder, cache):
    for dtype in (None, torch.bfloat16):
        pipe = load(folder, cache, dtype=dtype)
        known = pipe.text.widths, pipe.text.dtypes
        loaded = TextEncoders(*fluxlab.checkpoints.load_text_encoders(folder, dtype=dtype))
        assert known == (loaded.widths, loaded.dtypes)


def test_printing_and_moving_a_pipeline_loads_nothing(folder, cache, opened):
    pipe = load(folder, cache)
    assert str(folder) in repr(pipe)
    pipe.to("cpu")
    assert replace(pipe).text is pipe.text
    assert opened == []
    with torch.no_grad():
        pipe.text.clip.to(torch.bfloat16)
    assert opened == ["clip", "t5"]


def test_single_files_and_their_other_encoder(folder, tmp_path, cache, opened):
    """A folder of single files, as ComfyUI has it: which file is which is known only from its header."""
    place = tmp_path / "encoders"
    place.mkdir()
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "t5xxl")):
        shutil.copy(folder / part / "model.safetensors", place / f"{name}.safetensors")
    for path in (place, place / "clip_l.safetensors"):
        row = ModelRow("x", str(folder), text=str(path), tokenizers=str(folder), max_sequence_length=LENGTH)
        first = loading.load_row(row, cache=cache, device="cpu", texts=Texts(PROMPTS))
        opened.clear()
        second = loading.load_row(row, cache=cache, device="cpu", texts=Texts(PROMPTS))
        assert opened == []
        assert same(encoded(first), encoded(second))


def test_a_language_model_goes_layer_by_layer_where_it_does_not_fit(monkeypatch):
    """FLUX.2's. Equal bits; each layer is checked and let go by itself; who asks for the model gets all of it."""
    from fluxlab.conditioning import language_model
    from fluxlab.model.layerwise import layer_by_layer

    pipe, layered = families.load("flux2"), families.load("flux2")
    calls, used = [], []
    monkeypatch.setattr(language_model, "layer_by_layer", lambda *given: calls.append(1) or layer_by_layer(*given))
    (size,) = layered.text.size().values()
    layered.text.after_block = used.append
    layered.text.room = size
    assert same(encoded(layered), encoded(pipe))
    assert calls == []
    layered.text.release()
    layered.text.room = size - 1
    assert same(encoded(layered), encoded(pipe))
    layers = len(pipe.text.encoder.get_decoder().layers)
    assert (len(calls), len(used)) == (len(PROMPTS), len(PROMPTS) * (layers + 1))
    assert same([layered.text.encoder.get_input_embeddings().weight], [pipe.text.encoder.get_input_embeddings().weight])
    assert same(encoded(layered), encoded(pipe))
    assert len(calls) == len(PROMPTS)


def test_a_layer_that_is_not_finite_is_found_when_it_is_used(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(families.folder("flux2"), tmp_path / "model")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights["model.layers.3.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(weights, file, {"format": "pt"})
    for room in (None, 1):
        pipe = fluxlab.load_pipeline(folder, cache="none")
        pipe.text.room = room
        with pytest.raises(UserError, match=r"mlp\.up_proj\.weight holds 1 values"):
            encoded(pipe)
