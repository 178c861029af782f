"""Maps of words that are not in the prompt, against Diffusers' blocks run with the words in place of the text."""

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab.errors import UserError
from fluxlab.probes import Probe
from tests import families, tiny

LENGTH, DOUBLE, HEADS = 24, 2, 2
OPTIONS = {"steps": 2, "max_sequence_length": LENGTH, "height": 16, "width": 24, "output": "latent"}
WORDS = ["fox", "world", "a sign"]
REQUEST = {"kind": "concepts", "words": WORDS, "blocks": "double"}


@pytest.fixture(scope="module", params=families.NAMES)
def folder(request, tmp_path_factory):
    """FLUX.1 with guidance, FLUX.2 without."""
    return tiny.save(tmp_path_factory.mktemp("folder")) if request.param == "flux1" else families.folder("flux2")


@pytest.fixture(scope="module")
def pipe(folder):
    return fluxlab.load_pipeline(folder)


def capture(pipe, request=REQUEST, prompts="a red cat", seeds=7, **more):
    probe = Probe({"c": request})
    latents = pipe.generate(prompts, seeds, probe=probe, **{**OPTIONS, **more})
    return probe.arrays["c"], latents


def test_against_diffusers(pipe):
    found, _ = capture(pipe)
    assert found.axes == ("sample", "step", "block", "word", "row", "col")
    assert found.labels("word") == WORDS
    expected = (of_diffusers() if pipe.family.name == "flux1" else of_diffusers2()).numpy()
    values = found.values[0, -1].reshape(DOUBLE, len(WORDS), -1)
    assert np.ptp(expected, axis=-1).min() > 1e-3  # not the same everywhere
    assert np.abs(values - expected).max() <= 1e-5
    assert np.abs(values.sum(1) - 1).max() <= 1e-6


@torch.no_grad()
def of_diffusers() -> torch.Tensor:
    """The shares of the words `(block, word, image token)` in the last step of Diffusers' pipeline."""
    theirs = tiny.diffusers_pipeline()
    theirs.set_progress_bar_config(disable=True)
    model, seen = theirs.transformer, {}
    embedded = model.time_text_embed.register_forward_hook(lambda m, args, out: seen.update(time=args[:2], temb=out))
    hooks = [embedded]
    for n, block in enumerate(model.transformer_blocks):
        before = block.register_forward_pre_hook(
            lambda m, args, kwargs, n=n: seen.update({(n, "input"): kwargs}), with_kwargs=True
        )
        out = block.attn.to_out[0].register_forward_pre_hook(lambda m, args, n=n: seen.update({(n, "image"): args[0]}))
        hooks += [before, out]
    theirs(
        "a red cat",
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=2,
        guidance_scale=3.5,
        max_sequence_length=LENGTH,
        output_type="latent",
        height=16,
        width=24,
    )
    for hook in hooks:
        hook.remove()
    encoded = [theirs.encode_prompt(word, word, max_sequence_length=LENGTH)[0][:, :1] for word in WORDS]
    words = model.context_embedder(torch.cat(encoded, 1))
    pooled = torch.zeros(1, theirs.text_encoder.config.hidden_size)
    temb = model.time_text_embed(*seen["time"], pooled)
    shares, own = [], {"emb": seen["temb"]}  # the image keeps the modulations of its prompt
    for n, block in enumerate(model.transformer_blocks):
        keep = block.norm1.register_forward_pre_hook(lambda m, args, kwargs: (args, own), with_kwargs=True)
        read = block.attn.to_add_out.register_forward_pre_hook(lambda m, args: seen.update(words=args[0]))
        table = seen[n, "input"]["image_rotary_emb"]
        rows = [0] * len(WORDS) + list(range(LENGTH, table[0].shape[0]))  # all text is at position 0
        words, _ = block(
            hidden_states=seen[n, "input"]["hidden_states"],
            encoder_hidden_states=words,
            temb=temb,
            image_rotary_emb=tuple(part[rows] for part in table),
        )
        keep.remove()
        read.remove()
        shares.append((seen["words"][0] @ seen[n, "image"][0].mT).softmax(0))
    return torch.stack(shares)


@torch.no_grad()
def of_diffusers2() -> torch.Tensor:
    """The same of FLUX.2. Each word is its last token in the chat template, at that token's position."""
    import diffusers

    theirs = diffusers.Flux2KleinPipeline.from_pretrained(families.folder("flux2"))
    theirs.set_progress_bar_config(disable=True)
    model, seen, hooks = theirs.transformer, {}, []
    for n, block in enumerate(model.transformer_blocks):
        before = block.register_forward_pre_hook(
            lambda m, args, kwargs, n=n: seen.update({(n, "input"): kwargs}), with_kwargs=True
        )
        out = block.attn.to_out[0].register_forward_pre_hook(lambda m, args, n=n: seen.update({(n, "image"): args[0]}))
        hooks += [before, out]
    options = {"num_inference_steps": 2, "guidance_scale": 1, "max_sequence_length": LENGTH, "output_type": "latent"}
    theirs(prompt="a red cat", generator=torch.Generator().manual_seed(7), height=16, width=24, **options)
    for hook in hooks:
        hook.remove()
    places = [1, 1, 2]  # of the last token of "fox", "world" and "a sign", after that of the template
    encoded = [theirs.encode_prompt(word, max_sequence_length=LENGTH)[0] for word in WORDS]
    words = model.context_embedder(torch.stack([txt[:, i] for txt, i in zip(encoded, places, strict=True)], 1))
    shares = []
    for n, block in enumerate(model.transformer_blocks):
        read = block.attn.to_add_out.register_forward_pre_hook(lambda m, args: seen.update(words=args[0]))
        own = seen[n, "input"]
        rows = [*places, *range(LENGTH, own["image_rotary_emb"][0].shape[0])]
        tables = tuple(part[rows] for part in own["image_rotary_emb"])
        words, _ = block(**{**own, "encoder_hidden_states": words, "image_rotary_emb": tables})
        read.remove()
        shares.append((seen["words"][0] @ seen[n, "image"][0].mT).softmax(0))
    return torch.stack(shares)


def test_no_bit_of_the_image_changes(pipe, folder):
    plain = pipe.generate("a red cat", 7, **OPTIONS)
    assert torch.equal(capture(pipe)[1], plain)
    half = fluxlab.load_pipeline(folder, dtype=torch.bfloat16)
    found, latents = capture(half)
    assert torch.equal(latents, half.generate("a red cat", 7, **OPTIONS))
    assert np.isfinite(found.values).all()
    assert np.abs(found.values - capture(pipe)[0].values).max() <= 0.05


def test_a_cell_does_not_depend_on_its_batch_nor_on_the_prompts_words(pipe):
    program = {"a": {"op": "inject", "source": 0, "what": "values"}}
    alone = capture(pipe)[0].values[0]
    found, _ = capture(pipe, prompts=["the blue fox", "a red cat", "a red cat"], programs=[None, None, program])
    assert np.array_equal(found.values[1], alone)
    assert not np.allclose(found.values[2], alone, atol=1e-4)  # activations are read after the edits
    apart, _ = capture(pipe, prompts=["the blue fox", "a red cat"])
    assert np.array_equal(apart.values, found.values[:2])


def test_steps_blocks_and_means(pipe):
    whole = capture(pipe)[0].values
    last = capture(pipe, {**REQUEST, "steps": -1, "blocks": 1})[0]
    assert np.array_equal(last.values[0, 0, 0], whole[0, 1, 1])
    mean = capture(pipe, {**REQUEST, "average": ["steps", "blocks"]})[0]
    assert mean.axes == ("sample", "word", "row", "col")
    assert np.abs(mean.values - whole.mean((1, 2))).max() <= 1e-6


def test_a_shift_of_all_positions_changes_nothing(pipe):
    """Words stand where the text does, so that only positions relative to the text count."""
    by = {"kind": 3, "row": 5, "col": 7} | ({"order": 2} if pipe.family.name == "flux2" else {})
    shifted, _ = capture(pipe, programs={"a": {"op": "offset", "by": by, "tokens": "all"}})
    assert np.abs(shifted.values - capture(pipe)[0].values).max() <= 1e-4


def test_keys_that_the_text_sees_elsewhere(pipe):
    """Words see the keys as the text does: an edit that only the text sees counts, one that only the image sees does
    not, in the first block."""
    first = {**REQUEST, "steps": 0, "blocks": 0}
    plain, zero = capture(pipe, first)[0].values, {"op": "zero", "side": "keys"}
    of_text = capture(pipe, first, programs={"a": {**zero, "seen_by": "text"}})[0].values
    both = capture(pipe, first, programs={"a": zero})[0].values
    assert not np.allclose(of_text, plain, atol=1e-4)
    assert not np.allclose(both, of_text, atol=1e-5)  # the image's own outputs differ


def test_streamed_weights(folder, pipe):
    streamed = fluxlab.load_pipeline(folder, memory="streamed")
    assert np.array_equal(capture(streamed)[0].values, capture(pipe)[0].values)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"words": ["fox"]}, r"capture.c.words: \['fox'\], expected two or more different words"),
        ({"words": "fox"}, "capture.c.words: 'fox', expected two or more"),
        ({"words": ["fox", "fox"]}, "expected two or more different words"),
        ({"blocks": "all"}, r"capture.c.blocks: concepts .* double blocks only \(0 … 1\); write blocks: double"),
        ({"heads": 0}, "capture.c.heads: .*has no heads"),
        ({"average": ["heads"]}, "capture.c.average"),
    ],
)
def test_errors(pipe, request_, message):
    with pytest.raises(UserError, match=message) as error:
        capture(pipe, {**REQUEST, **request_})
    assert len(str(error.value).splitlines()) == 1


def test_an_unknown_word_and_the_budget(pipe):
    if pipe.family.name == "flux1":  # FLUX.2's language models read every character
        with pytest.raises(UserError, match=r"capture.c.words: the text encoders have no token for '☃'"):
            capture(pipe, {**REQUEST, "words": ["fox", "☃"]})
    with pytest.raises(UserError, match=r"capture.max_mb: 0.01, but \d+ MB are needed"):
        pipe.generate("a red cat", probe=Probe({"max_mb": 0.01, "c": REQUEST}), **OPTIONS)


def test_windows_are_refused(pipe):
    with pytest.raises(UserError, match="windows has several tables"):
        capture(pipe, programs={"a": {"op": "windows", "size": 2}})


def test_the_preset_on_the_embedded_model():
    pipe = fluxlab.load_pipeline("tiny")
    probe = Probe("concepts")
    prompt = "a blue fox on the left"
    latents = pipe.generate(prompt, steps=1, probe=probe, output="latent")
    assert torch.equal(latents, pipe.generate(prompt, steps=1, output="latent"))
    maps = probe.arrays["concepts"]
    assert maps.labels("word") == ["cat", "star", "sign"]
    assert np.abs(maps.values.sum(3) - 1).max() <= 1e-6
    assert maps.values.std() > 0.05


def test_texts_of_regions_are_text_that_words_do_not_see(pipe):
    """At strength 0 the image does not see them either: whatever they are, maps are those without regions."""
    where = [{"box": [0, 0, 1, 0.5], "unit": "fraction"}]
    texts = [{"a": {"op": "regions", "prompts": [p], "where": where, "strength": 0}} for p in ("a blue star", "a fox")]
    maps = [capture(pipe, programs=program)[0].values for program in (None, *texts)]
    for other in maps[1:]:
        assert np.abs(other - maps[0]).max() <= 1e-4
