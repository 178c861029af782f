"""Tokens that a probe picks: those with most attention by a dense softmax, the same alone and in a batch."""

import math

import pytest
import torch

import fluxlab
from fluxlab.errors import UserError
from fluxlab.model import attention
from fluxlab.positions import Program, lint
from fluxlab.positions.at_step import program_at_step, sequence
from fluxlab.positions.picked import has_picks, measuring_steps, without_picks
from fluxlab.select.layout import Layout
from fluxlab.select.picked import picked
from fluxlab.select.tokens import parse_tokens

PROMPT = "A cat holding a sign that says hello world"
OPTIONS = {"steps": 3, "height": 32, "width": 48, "output": "latent"}


def hide(**pick):
    return {"a": {"op": "mask", "from": "all", "to": {"probe": "incoming", **pick}}}


@pytest.fixture(scope="module")
def pipe():
    return fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")


def dense_attention_received(pipe, x, t, program=None):
    """Return the mean attention `(N,)` that each token receives, by a softmax of all scores, outside of the probes."""
    seen = []
    original = attention.F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, **more):
        scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
        seen.append((scores if attn_mask is None else scores + attn_mask).softmax(-1).mean((0, 1, 2)))
        return original(q, k, v, attn_mask=attn_mask, **more)

    settings = pipe.resolve(fluxlab.sampling.Sampling(steps=3, height=32, width=48))
    sigmas = pipe.schedule.times(3, 8 * 12)
    programs = None if program is None else [Program.from_config(program)]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(attention.F, "scaled_dot_product_attention", watch)
        pipe._velocity([PROMPT], None, programs, settings, (8, 12), sigmas)(x, t)
    return torch.stack(seen).mean(0)


def steps_of(pipe, program, seed=0):
    """Return the latents before each step and the noise levels."""
    start = pipe.generate(PROMPT, seed, program, on_step=None, **{**OPTIONS, "steps": 3})
    kept = []
    pipe.generate(PROMPT, seed, program, on_step=lambda i, t, x: kept.append(x.clone()), **OPTIONS)
    assert torch.equal(kept[-1], start)
    return kept, pipe.schedule.times(3, 8 * 12)


@pytest.mark.parametrize(("name", "pick"), [("tiny", "top"), ("tiny", "bottom"), ("tiny2", "top")])
def test_the_image_is_that_of_the_tokens_with_most_or_least_attention(name, pick):
    """Step by step: the tokens by a dense softmax are written as numbers, and give the same latents."""
    pipe = fluxlab.load_pipeline(name, dtype=torch.float32, device="cpu")
    kept, sigmas = steps_of(pipe, hide(**{pick: 5}))
    text = pipe.max_sequence_length
    numbers = {}
    for step in range(3):
        x = kept[step - 1] if step else _noise(pipe)
        received = dense_attention_received(pipe, x, sigmas[step])[text:]
        order = received.argsort(descending=pick == "top")[:6]
        assert abs(received[order[4]] - received[order[5]]) > 1e-7  # the choice is clear
        numbers[f"s{step}"] = {
            "op": "mask",
            "from": "all",
            "to": {"indices": order[:5].tolist(), "of": "image"},
            "steps": [step],
        }
    expected = pipe.generate(PROMPT, 0, numbers, **OPTIONS)
    assert torch.equal(expected, kept[-1])
    assert not torch.equal(expected, pipe.generate(PROMPT, 0, **OPTIONS))


def _noise(pipe):
    return pipe.family.noise([0], pipe.autoencoder.params.z_channels, 8, 12, pipe.dtype).float()


def test_alone_and_in_a_batch(pipe):
    """Bits do not depend on the batch, nor on the programs of other samples, edits of activations among them."""
    programs = [
        None,
        hide(top=5),
        {"a": {"op": "offset", "by": 3, "tokens": {"probe": "incoming", "bottom": 4, "from": "text"}}},
        {"a": {"op": "zero", "tokens": {"probe": "incoming", "top": 2, "blocks": "double"}, "steps": [1]}},
        hide(random=5, seed=3),
    ]
    seeds = list(range(len(programs)))
    together = pipe.generate([PROMPT] * 5, seeds, programs, **OPTIONS)
    plain = pipe.generate([PROMPT] * 5, seeds, **OPTIONS)
    for b, program in enumerate(programs):
        assert torch.equal(together[b : b + 1], pipe.generate(PROMPT, b, program, **OPTIONS))
        assert torch.equal(together[b], plain[b]) == (program is None)
    injecting = {"a": {"op": "inject", "source": {"sample": 0}, "what": "values", "blocks": 1}}
    mixed = pipe.generate([PROMPT] * 3, [0, 1, 2], [None, hide(top=5), injecting], **OPTIONS)
    assert torch.equal(mixed[:2], together[:2])


def test_in_parts_and_with_shared_steps(pipe):
    """Samples that share steps, and batches of several forwards, have the bits of samples alone."""
    late = {"a": {**hide(top=5)["a"], "steps": [1, 2]}}
    programs = [None, late, hide(top=5), hide(bottom=5), {**late, "b": {"op": "zero", "steps": [2]}}]
    settings = fluxlab.sampling.Sampling(steps=3, height=32, width=48)
    together = pipe.sample([PROMPT] * 5, [0] * 5, programs, settings, output="latent", at_once=2)
    for b, program in enumerate(programs):
        assert torch.equal(together[b : b + 1], pipe.generate(PROMPT, 0, program, **OPTIONS))


def test_other_edits_come_first(pipe):
    """The attention is that of the program without its edits of picked tokens."""
    scaled = {"b": {"op": "scale", "factor": 3}}
    x, t = _noise(pipe), 1.0
    text = pipe.max_sequence_length
    order = dense_attention_received(pipe, x, t, scaled)[text:].argsort(descending=True)[:5].tolist()
    assert set(order) != set(dense_attention_received(pipe, x, t)[text:].argsort(descending=True)[:5].tolist())
    fixed = {"a": {"op": "mask", "from": "all", "to": {"indices": order}}, **scaled}
    one = {**OPTIONS, "steps": 1}
    assert torch.equal(
        pipe.generate(PROMPT, 0, {**hide(top=5), **scaled}, **one), pipe.generate(PROMPT, 0, fixed, **one)
    )


def test_forward_passes(pipe, monkeypatch):
    """One more pass at each step on which such an edit acts, of the samples that need it; none for random tokens."""
    batches = []
    original = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda img, *a, **k: (batches.append(len(img)), original(img, *a, **k))[1]
    )
    late = {"a": {**hide(top=5)["a"], "steps": [1, 2]}}
    pipe.generate([PROMPT] * 3, [0, 1, 2], [None, late, hide(random=5)], **OPTIONS)
    assert batches == [3, 1, 3, 1, 3]
    expected = ([False] * 3, [False, True, True], [False] * 3)
    for config, steps in zip((None, late, hide(random=5)), expected, strict=True):
        assert measuring_steps(Program.from_config(config), [1, 0.7, 0.3, 0]) == steps


def test_guidance_with_negative_prompts(pipe):
    """Each forward picks its own tokens; words of the program do not count for the negative prompt."""
    program = {**hide(top=5), "b": {"op": "zero", "tokens": {"words": ["cat"]}}}
    more = {**OPTIONS, "true_cfg": 2, "negative_prompts": "a dog"}
    two = pipe.generate([PROMPT] * 2, [0, 1], [program, None], **more)
    assert torch.equal(two[:1], pipe.generate(PROMPT, 0, program, **more))


def test_the_tokens_of_a_layout():
    layout, attention = Layout(3, (2, 2), ((1, 2),)), torch.tensor([0.1, 0.5, 0.1, 0.3], dtype=torch.float64)
    parse = lambda **pick: parse_tokens({"probe": "incoming", **pick}, "tokens")  # noqa: E731
    assert picked(parse(top=2), layout, 0, attention) == [4, 6]
    assert picked(parse(top=3), layout, 0, attention) == [3, 4, 6]  # of equal ones the first
    assert picked(parse(bottom=1), layout, 0, attention) == [3]
    draws = [tuple(picked(parse(random=2), layout, step, None)) for step in range(20)]
    assert len(set(draws)) > 3
    assert all(3 <= a < b < 7 for a, b in draws)
    assert draws == [tuple(picked(parse(random=2, seed=0), layout, step, None)) for step in range(20)]
    assert picked(parse(random=2, of="reference"), layout, 0, None) == [7, 8]
    assert sorted({n for step in range(40) for n in picked(parse(random=1, seed=1), layout, step, None)}) == [
        3,
        4,
        5,
        6,
    ]


def test_config_digest_and_description():
    program = Program.from_config(hide(top=8, blocks=[0, 1]))
    assert Program.from_config(program.to_config()) == program
    assert program.describe() == "mask from all, to the 8 image tokens with most attention in blocks 0–1"
    same = [
        hide(top=8),
        hide(top=8.0, of="image"),
        {"a": {"to": {"top": 8, "probe": "incoming"}, "from": "all", "op": "mask"}},
    ]
    assert len({Program.from_config(config).digest for config in same}) == 1
    others = [hide(top=8), hide(top=9), hide(bottom=8), hide(random=8), hide(random=8, seed=1), hide(top=8, of="all")]
    assert len({Program.from_config(config).digest for config in others}) == len(others)
    union = {"a": {"op": "zero", "tokens": [{"probe": "incoming", "random": 1, "of": "text"}, {"box": [0, 0, 1, 1]}]}}
    assert Program.from_config(union).describe() == ("zero on 1 random text token (seed 0) + box [0, 0, 1, 1] tokens")
    assert has_picks(Program.from_config(union))
    assert not without_picks(Program.from_config(union))


def test_notes_and_drawing():
    context = sequence(grid=(4, 4), text=3, trained=(4, 4))
    assert [str(note) for note in lint(Program.from_config(hide(top=16)), context)] == [
        "a.to: selects all 16 image tokens"
    ]
    still = {"a": {"op": "scale", "factor": 1, "tokens": {"probe": "incoming", "top": 3}}}
    assert [str(note) for note in lint(Program.from_config(still), context)] == ["a: changes nothing: its factor is 1"]
    moved = {"a": {"op": "offset", "by": 50, "tokens": {"probe": "incoming", "top": 3}}}
    state = program_at_step(moved, context)
    assert state.labels["picked"] == "tokens picked by a probe: random ones as an example"
    assert int((state.after != state.before).any(1).sum()) == 3


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (hide(top=97), r"a\.to\.top: 97, expected at most 96, the number of image tokens"),
        (hide(top=1, of="reference"), r"a\.to: .* but there are no reference images"),
        (hide(top=1, **{"from": "reference"}), r"a\.to\.from: 'reference', but there are no reference images"),
        (hide(top=1, blocks=6), r"a\.to\.blocks: 6, expected a block below 6"),
        (hide(top=0), r"a\.to\.top: 0, expected a number of tokens, from 1"),
        (hide(top=1, bottom=1), r"a\.to: .* exactly one of top, bottom, random, such as \{probe: incoming, top: 8\}"),
        (hide(), r"a\.to: .* exactly one of top, bottom, random"),
        (hide(random=1, blocks=1), r"a\.to\.blocks: 1, unknown key of \{probe: incoming, random: …\}"),
        (hide(topp=1), r"a\.to\.topp: 1, unknown key.*did you mean top"),
        (
            {"a": {"op": "zero", "tokens": {"probe": "entropy", "top": 1}}},
            r"a\.tokens\.probe: 'entropy', expected incoming",
        ),
        (
            {"a": {"op": "inject", "source": {"sample": 0}, "what": "keys", "from": {"probe": "incoming", "top": 1}}},
            r"a\.from: .* tokens of the source: a probe picks those of the image itself",
        ),
        (
            {**hide(top=1), "w": {"op": "windows", "size": 2}},
            r"a\.to: picked by attention, which has no single value in a program with windows \(programs\.w\)",
        ),
    ],
)
def test_errors(pipe, program, message):
    with pytest.raises(UserError, match=message) as error:
        pipe.generate(PROMPT, 0, program, **OPTIONS)
    assert "\n" not in str(error.value)


def test_where_no_image_is_computed():
    from fluxlab.probes import Capture, Probe
    from fluxlab.probes.resolve import resolve

    with pytest.raises(UserError, match=r"a\.to: .* is found while an image is computed, and is possible in programs"):
        fluxlab.positions.tables(hide(top=1), 4, 4)
    capture = Capture.from_config({"m": {"kind": "entropy", "tokens": {"probe": "incoming", "top": 1}}})
    with pytest.raises(UserError, match=r"capture\.m\.tokens: .* is found while an image is computed"):
        resolve(capture, sequence(), 1)
    assert Probe({"m": {"kind": "incoming"}})
