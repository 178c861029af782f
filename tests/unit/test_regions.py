"""Prompts of regions: against attention written out, the plain prompt where a region covers everything, and errors."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fluxlab
from fluxlab import gradients
from fluxlab.engines.inline import texts_of
from fluxlab.errors import UserError
from fluxlab.positions import Layout, Program, compile_programs, lint, region_prompts
from fluxlab.probes import Capture, Probe
from fluxlab.sampling import Sampling
from tests import families
from tests.unit.test_positions_model import context

CAT, FOX, DOG = "a blue cat", "a red fox", "a green bird"
LEFT, RIGHT = {"box": [0, 0, 1, 0.5], "unit": "fraction"}, {"box": [0, 0.5, 1, 1], "unit": "fraction"}
ALL = {"box": [0, 0, 1, 1], "unit": "fraction"}
MORE = {"steps": 2, "output": "latent"}


def program(prompts, where, **more):
    return {"a": {"op": "regions", "prompts": prompts, "where": where, **more}}


def load(name, dtype=torch.float32):
    """Return the embedded FLUX.1, or a random FLUX.2."""
    if name == "tiny":
        return fluxlab.load_pipeline("tiny", dtype=dtype, device="cpu")
    return replace(families.load("flux2", dtype=dtype), size=(32, 32), max_sequence_length=16)


@pytest.fixture(scope="module", params=["tiny", "flux2"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    return load(name)


def far(a, b):
    return ((a - b).abs().max() / b.std()).item()


def test_one_region_that_covers_everything_is_the_plain_prompt(pipe, name):
    """The text of the region takes the place of the prompt. CLIP's part of the conditioning is that of the prompt."""
    plain = pipe.generate(CAT, 0, **MORE)
    assert far(pipe.generate(CAT, 0, program([CAT], [ALL]), **MORE), plain) < 1e-4
    other = pipe.generate(CAT, 0, program([FOX], [ALL]), **MORE)
    assert far(other, plain) > {"tiny": 0.1, "flux2": 0.01}[name]  # the text of random weights does less
    txt = pipe.encode_prompt(FOX)[0]
    known = pipe._encoded.copy()
    pipe._encoded[CAT, pipe.max_sequence_length] = (txt, *pipe.encode_prompt(CAT)[1:])
    try:
        assert far(pipe.generate(CAT, 0, **MORE), other) < 1e-4
    finally:
        pipe._encoded.clear()
        pipe._encoded.update(known)


@pytest.mark.parametrize("where", [{"steps": [1]}, {"blocks": [3]}, {"heads": [0]}, {"strength": 0.5}])
def test_where_it_acts(pipe, where):
    plain, full = (pipe.generate(CAT, 0, p, **MORE) for p in (None, program([FOX], [LEFT])))
    part = pipe.generate(CAT, 0, program([FOX], [LEFT], **where), **MORE)
    assert far(part, plain) > 1e-3
    assert far(part, full) > 1e-3


def test_without_an_effect_it_is_the_plain_prompt(pipe):
    plain = pipe.generate(CAT, 0, steps=4, output="latent")
    for where in ({"strength": 0}, {"strength": [[1, 0], [0.5, 0]], "steps": [0]}):
        assert far(pipe.generate(CAT, 0, program([FOX], [LEFT], **where), steps=4, output="latent"), plain) < 1e-4
    early = []
    edit = program([FOX], [LEFT], steps=[3])
    pipe.generate(CAT, 0, edit, steps=4, output="latent", on_step=lambda i, t, x: early.append(x))
    late = []
    pipe.generate(CAT, 0, None, steps=4, output="latent", on_step=lambda i, t, x: late.append(x))
    assert [far(a, b) < 1e-4 for a, b in zip(early, late, strict=True)] == [True, True, True, False]


def test_a_batch_of_different_numbers_of_regions(pipe):
    programs = [None, program([FOX, DOG], [LEFT, RIGHT]), {"a": {"op": "zero"}}, program([FOX], [LEFT])]
    together = pipe.generate(CAT, [0, 1, 2, 3], programs, **MORE)
    for b, one in enumerate(programs):
        assert far(together[b : b + 1], pipe.generate(CAT, b, one, **MORE)) < 1e-4


TEXT, GRID = 3, (2, 4)


def visible(strength, image, heads=None):
    """The odds with which a query may see a key, one pair at a time. Regions: columns 0 and 1; column 1 and 2."""
    layout = Layout(TEXT, GRID, further=2 * TEXT)
    regions = [{0, 1}, {1, 2}]
    owner = {}
    for n in range(layout.tokens):
        if n < TEXT:
            owner[n] = ("text", None)
        elif n < 3 * TEXT:
            owner[n] = ("further", n // TEXT - 1)
        else:
            owner[n] = ("image", {k for k in (0, 1) if (n - 3 * TEXT) % GRID[1] in regions[k]})
    odds = torch.zeros(layout.tokens, layout.tokens, dtype=torch.float64)
    for q, (kind_q, of_q) in owner.items():
        for k, (kind_k, of_k) in owner.items():
            if kind_q == "further":
                odds[q, k] = float((kind_k == "further" and of_q == of_k) or (kind_k == "image" and of_q in of_k))
                continue
            plain = kind_k != "further"
            if kind_q == "text":
                acting = kind_k == "text" or (kind_k == "image" and not of_k)
            elif kind_k == "text":
                acting = not of_q
            elif kind_k == "further":
                acting = of_k in of_q
            else:
                acting = image == "together" or bool(of_q & of_k) or not (of_q or of_k)
            odds[q, k] = 1.0 if plain and acting else 1 - strength if plain else strength if acting else 0.0
    return layout, odds


@pytest.mark.parametrize("image", ["apart", "together"])
@pytest.mark.parametrize("strength", [0.3, 1])
def test_the_mask_against_every_pair(strength, image):
    layout, odds = visible(strength, image)
    where = [{"box": [0, 0, 2, 2]}, {"mask": [".##.", ".##."]}]
    given = program(["x", "y"], where, image=image, strength=strength, blocks=[1])
    ids = torch.zeros(1, layout.tokens, 3)
    of = type(context())(**{**vars(context()), "ids": ids, "layout": layout})
    masks = compile_programs([Program.from_config(given)], of).at(1.0).mask
    assert torch.allclose(masks[1][0, 0].double().exp(), odds, atol=1e-6)
    _, hidden = visible(0, image)
    assert torch.allclose(masks[0][0, 0].double().exp(), hidden, atol=1e-6)
    assert (masks[0] == -math.inf).any()


def test_negative_prompts_have_no_regions(pipe):
    """v⁻ + 2·(v⁺ - v⁻), with v⁻ of a sequence without the texts of regions."""
    edit = program([FOX], [LEFT])
    one = {"steps": 1, "output": "latent"}
    plus, minus = pipe.generate(CAT, 0, edit, **one), pipe.generate("", 0, None, **one)
    guided = pipe.generate(CAT, 0, edit, true_cfg=2.0, **one)
    assert far(guided, minus + 2 * (plus - minus)) < 1e-4


def test_captures_and_words(pipe):
    probe = Probe({"maps": {"kind": "words", "words": ["cat"], "average": ["heads"]}})
    edit = {**program([FOX], [RIGHT]), "b": {"op": "offset", "by": 1, "tokens": {"words": "cat"}}}
    plain = pipe.generate(CAT, 0, edit, **MORE)
    assert torch.equal(pipe.generate(CAT, 0, edit, probe=probe, **MORE), plain)
    maps = probe.arrays["maps"].sel(direction="image_to_word", word="cat").values
    half = maps.shape[-1] // 2
    assert (maps[..., half:] == 0).all()
    assert (maps[..., :half] > 0).all()


def test_the_gradient_of_the_strength(pipe, name):
    """The latents are those of `generate`, and their gradient that of central differences in fp64."""
    settings, parsed = Sampling(steps=2, height=32, width=32), Program.from_config(program([FOX, DOG], [LEFT, RIGHT]))

    def latents(prepared, strength):
        edits = Program(tuple(replace(edit, where={**edit.where, "strength": strength}) for edit in parsed.edits))
        return gradients.sampled(prepared, gradients.stepping(prepared, gradients.compiled(prepared, edits)))

    exact = load(name, torch.float64)
    single, double = (
        gradients.prepare(p, [CAT, DOG], [0, 1], settings, regions=region_prompts(parsed)) for p in (pipe, exact)
    )
    edit = program([FOX, DOG], [LEFT, RIGHT], strength=0.7)
    with torch.no_grad():
        expected = pipe.generate([CAT, DOG], [0, 1], edit, height=32, width=32, **MORE)
        assert far(latents(single, 0.7), expected) < 1e-4
        difference = (latents(double, 0.7 + 1e-5) - latents(double, 0.7 - 1e-5)) / 2e-5
    strength = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad((latents(double, strength) * difference).sum(), strength)
    assert found.item() == pytest.approx(difference.square().sum().item(), rel=1e-4)
    with pytest.raises(UserError, match=r"prompts of regions \['a red fox'\], but the batch has"):
        gradients.compiled(double, Program.from_config(program([FOX], [LEFT])))


def test_a_run_encodes_the_prompts_of_regions():
    """Text is encoded before the transformer is loaded, and the encoders are then released."""
    variants = {"base": Program(), "two": Program.from_config(program([FOX, DOG], [LEFT, RIGHT]))}
    assert region_prompts(variants["two"]) == (FOX, DOG)
    model, capture = SimpleNamespace(true_cfg=None), Capture()
    experiment = SimpleNamespace(prompts=(CAT,), variants=variants, sampling=Sampling(), model=model, capture=capture)
    assert texts_of(experiment).prompts == (CAT, FOX, DOG)


def test_digest_and_description():
    one, other = (Program.from_config(program([p], [LEFT])) for p in (FOX, CAT))
    assert one.digest != other.digest
    assert Program.from_config(one.to_config()) == one
    assert "regions prompts [a red fox], where [box [0, 0, 1, 0.5] fraction]" in one.describe()
    from fluxlab.positions.at_step import sequence

    assert lint(one, sequence(grid=(4, 4), text=4)) == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (program([FOX, CAT], [LEFT]), "a.where: 1 regions, expected one for each of the 2 prompts"),
        (program([], [LEFT]), "a.prompts: 0 prompts, expected 1 to 16"),
        (program([3], [LEFT]), r"a.prompts\[0\]: 3, expected a prompt as text"),
        (program([FOX], LEFT), "a.where: .* expected a list of boxes"),
        (program([FOX], ["text"]), r"a.where\[0\]: selects tokens that are not of the image"),
        (program([FOX], [{"box": [0, 0, 99, 99]}]), r"a.where\[0\].box"),
        (
            {**program([FOX], [LEFT]), "b": program([CAT], [LEFT])["a"]},
            "b: a second edit of regions; give .*a all prompts",
        ),
    ],
)
def test_errors(pipe, edit, message):
    with pytest.raises(UserError, match=message):
        pipe.generate(CAT, 0, edit, unknown_words="error", **MORE)


def test_a_prompt_with_an_unknown_word(pipe, name):
    word = {"tiny": "zebra", "flux2": "<|im_end|>"}[name]
    with pytest.raises(UserError, match=re.escape(word)):
        pipe.generate(CAT, 0, program([f"a {word}"], [LEFT]), unknown_words="error", **MORE)
