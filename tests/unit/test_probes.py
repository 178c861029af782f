"""Probes: the registry of kinds, requests and their errors, memory, arrays in files, and that models stay unchanged."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config

import fluxlab
from fluxlab.model import Flux, FluxParams
from fluxlab.model.attention import Attended
from fluxlab.model.sites import Observed
from fluxlab.positions import Context, Layout, Prompt
from fluxlab.probes import (
    PROBES,
    WORKING,
    Capture,
    Captured,
    Measure,
    Probe,
    ProbeContext,
    label,
    load,
    memory,
    of_sample,
    probe,
    read,
    resolve,
    similarity,
    stream,
    write,
)
from fluxlab.probes.measures import parse_regions
from fluxlab.probes.outputs import select_tokens, token_axes
from fluxlab.probes.recorder import _Incoming
from fluxlab.sampling import image_ids, text_ids
from fluxlab.select.tokens import parse_tokens
from tests import tiny

TEXT, GRID = 6, (4, 3)
PARAMS = FluxParams(8, 8, 12, 10, 32, 2.0, 2, 1, 2, (4, 6, 6), 10000, True, False)
CAT = Prompt("a cat, a hat", ((0, 1), (2, 5), (5, 6), (7, 8), (9, 12), (0, 0)))
DOG = Prompt("dog", ((0, 3), (0, 0)))


def context(grid=GRID, **more) -> Context:
    ids = torch.cat((text_ids(1, TEXT), image_ids(1, *grid)), 1)
    sizes = (PARAMS.axes_dim, PARAMS.theta, PARAMS.depth, PARAMS.depth_single_blocks, PARAMS.num_heads)
    return Context(ids, Layout(TEXT, grid), *sizes, **{"sigmas": (1.0, 0.5, 0.0), "prompts": [CAT], **more})


@pytest.fixture(scope="module")
def flux() -> Flux:
    torch.manual_seed(0)
    model = Flux(PARAMS).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.3)
    return model


@pytest.fixture
def unchecked():
    """Disable shape checks, which cannot be compiled. Users run without them."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def inputs(batch: int = 1) -> dict:
    g = torch.Generator().manual_seed(1)
    ids = context().ids
    draw = lambda *shape: torch.randn(1, *shape, generator=g).expand(batch, *shape)  # noqa: E731
    return {
        "img": draw(GRID[0] * GRID[1], 8),
        "img_ids": ids[:, TEXT:],
        "txt": draw(TEXT, 10),
        "txt_ids": ids[:, :TEXT],
        "timesteps": torch.full((batch,), 0.5),
        "y": draw(12),
    }


def watch(flux, capture, samples: int = 1, steps=(0, 1), **more) -> dict[str, Captured]:
    probe = Probe(capture)
    probe.begin(context(**more), samples)
    with torch.inference_mode():
        for step in steps:
            taps, blocks = probe.taps(step), flux.params.depth + flux.params.depth_single_blocks
            observers = probe.observers([(None, None)] * blocks)
            sites = observers and [Observed(observe) if observe else None for observe in observers]
            flux(**inputs(samples), taps=taps, sites=sites)
    return probe.arrays


WORDS = {"kind": "words", "words": ["cat"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("wrods", "capture: 'wrods', expected one of concepts, distance, full, none, words, or .*; did you mean words"),
        (3, "capture: 3, expected a mapping of requests"),
        (WORDS, "capture: .* is a request without a name"),
        ({"a b": WORDS}, "capture.a b: 'a b', expected a name of letters"),
        ({"a": "words"}, "capture.a: 'words', expected a request such as"),
        ({"a": {"words": ["cat"]}}, "capture.a.kind: missing, expected one of words, regions"),
        ({"a": {"kind": "entorpy"}}, "capture.a.kind: 'entorpy', expected one of .*; did you mean entropy?"),
        ({"a": {**WORDS, "wods": 1}}, "capture.a.wods: 1, unknown key of words, expected words, .*; did"),
        ({"a": {**WORDS, "words": []}}, r"capture.a.words: \[\], expected a word or phrase"),
        ({"a": {**WORDS, "direction": "word"}}, "capture.a.direction: 'word', expected image_to_word or word_to_image"),
        ({"a": {**WORDS, "blocks": "dubble"}}, "capture.a.blocks: 'dubble', expected all, .*did you mean double"),
        ({"a": {**WORDS, "steps": {"sgma": [0, 1]}}}, "capture.a.steps.sgma: .*unknown key"),
        ({"a": {**WORDS, "heads": "x"}}, "capture.a.heads: 'x', expected all, or heads"),
        ({"a": {**WORDS, "average": "head"}}, r"capture.a.average\[0\]: 'head', expected some of steps, .*; did"),
        ({"a": {**WORDS, "average": ["tokens"]}}, r"capture.a.average\[0\]: 'tokens', expected some of"),
        ({"a": {**WORDS, "average": 3}}, "capture.a.average: 3, expected some of"),
        ({"a": {"kind": "peak", "average": "heads"}}, "capture.a.average.0.: 'heads', expected none: peak has no"),
        ({"a": {"kind": "map", "from": "all"}}, "capture.a.to: missing, map needs it"),
        ({"a": {"kind": "map", "from": "al", "to": "all"}}, "capture.a.from: 'al', expected image, text, all"),
        ({"a": {"kind": "regions", "regions": ["image"]}}, "capture.a.regions: .*expected a mapping of names"),
        ({"a": {"kind": "regions", "regions": {"x": "imag"}}}, "capture.a.regions.x: 'imag', expected image, text"),
        ({"a": {"kind": "similarity", "to": -1}}, "capture.a.to: -1, expected a sample of the batch"),
        ({"max_mb": 0, "a": WORDS}, "capture.max_mb: 0, expected a number above 0"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_reported(config, message):
    with pytest.raises(ValueError, match=message) as error:
        Probe(config)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("request_", "more", "message"),
    [
        ({**WORDS, "words": "fox"}, {}, "capture.a.words: 'fox' is not in the prompt, which has: a, cat, hat"),
        (WORDS, {"prompts": None}, "capture.a.words: .*but the run has no prompts"),
        ({"kind": "words"}, {"prompts": [Prompt("…", ((0, 1),))]}, "capture.a.words: all, but .*'…' has no words"),
        ({**WORDS, "blocks": [3]}, {}, "capture.a.blocks: 3, expected a block below 3"),
        ({**WORDS, "steps": [2]}, {}, "capture.a.steps: 2, expected a step of this run"),
        ({**WORDS, "heads": [2]}, {}, "capture.a.heads: 2, expected a head below 2"),
        ({"kind": "distance", "tokens": "all"}, {}, "capture.a.tokens: 'all', expected image tokens only"),
        ({"kind": "similarity", "to": 2}, {}, "capture.a.to: 2, expected a sample of this batch, 0 … 1"),
        ({"kind": "entropy", "tokens": {"words": "a#1"}}, {"prompts": [CAT, Prompt("a a", ((0, 1), (0, 1)))]},
         r"capture.a.tokens: selects \[1, 2\] tokens of the samples, expected the same number for each"),
    ],
)  # fmt: skip
def test_what_a_run_does_not_have_is_reported(request_, more, message):
    with pytest.raises(ValueError, match=message):
        Probe({"a": request_}).begin(context(**more), 2)


def test_a_config_round_trips():
    config = {
        "max_mb": 7.0,
        "cats": {"kind": "words", "words": "cat", "steps": "0-1", "blocks": ["double", 2], "average": "heads"},
        "near": {"kind": "distance", "heads": [1, 0], "average": ["tokens", "blocks"]},
        "sky": {"kind": "regions", "regions": {"sky": {"box": [0, 0, 1, 3]}, "rest": ["text", {"indices": 5}]}},
        "why": {"kind": "logits", "from": {"indices": 1}, "to": "text", "against": "all"},
    }
    capture = Capture.from_config(config)
    again = Capture.from_config(json.loads(json.dumps(capture.to_config())))
    assert again == capture
    assert capture.to_config()["near"] == {"kind": "distance", "heads": [0, 1], "average": ["blocks", "tokens"]}
    assert not Capture.from_config(None)
    assert not Capture.from_config("none")


@pytest.mark.parametrize("name", ["words", "distance", "full"])
def test_presets_run(flux, name):
    arrays = watch(flux, name)
    assert {one.split(".")[0] for one in arrays} == {request.name for request in Probe(name).capture.requests}
    for one in arrays.values():
        assert np.isfinite(one.values).all()
        assert np.abs(one.values).max() > 0


EXAMPLES = {
    parse_tokens: [{"indices": [0, 5, 6]}, {"words": "cat"}],
    parse_regions: {"a": {"indices": [0, 7]}, "text": "text"},
    PROBES["activation"].parsers["site"]: "values",
    PROBES["concepts"].parsers["words"]: ["cat", "sign"],
}
"""Values for arguments without a default, by their parser."""


def every_kind(**more) -> dict:
    """Return a request for each registered kind, by its name."""
    return {
        name: {"kind": name, **{key: EXAMPLES[kind.parsers[key]] for key in kind.required}, **more}
        for name, kind in PROBES.items()
    }


@pytest.mark.parametrize("name", [name for name in PROBES if name != "concepts"])
def test_every_kind(flux, tmp_path, name):
    """Finite labelled results that survive a file, and averages that are means of them, for steps, blocks and heads."""
    request_ = every_kind()[name]
    averages = {axis: {**request_, "average": [axis]} for axis in PROBES[name].averages}
    arrays = watch(flux, {"plain": request_, **averages}, samples=2)
    write(tmp_path / "a.safetensors", arrays)
    for key, array in read(tmp_path / "a.safetensors").items():
        assert array.dims == arrays[key].axes
        assert array.dims[0] == "sample"
        np.testing.assert_array_equal(array.values, arrays[key].values)
        assert np.isfinite(array.values).all()
        assert array.attrs["request"]["kind"] == name
        assert array.attrs["unit"]
        assert set(array.dims) <= set(array.coords)
    outputs = [key.removeprefix("plain") for key in arrays if key.split(".")[0] == "plain"]
    for axis in {"steps", "blocks", "heads"} & set(averages):
        for output in outputs:
            expected = arrays[f"plain{output}"].mean(axis[:-1])
            np.testing.assert_allclose(arrays[f"{axis}{output}"].values, expected.values, atol=1e-5)
            assert arrays[f"{axis}{output}"].axes == expected.axes
    if "tokens" in averages:
        for output in outputs:
            plain, mean = arrays[f"plain{output}"], arrays[f"tokens{output}"]
            gone = [axis for axis in plain.axes if axis not in mean.axes]
            np.testing.assert_allclose(mean.values, plain.mean(*gone).values, atol=1e-5)


def test_concepts_need_a_pipeline(flux):
    with pytest.raises(ValueError, match=r"capture.a: concepts need the text encoders; use generate\(probe=…\)"):
        watch(flux, {"a": {**every_kind()["concepts"], "blocks": "double"}})


@pytest.mark.parametrize("name", PROBES)
def test_every_kind_describes_itself(name):
    kind = PROBES[name]
    assert kind.summary.endswith(".")
    assert len(kind.summary) <= 120
    config = Capture.from_config({"a": every_kind()[name]}).to_config()
    assert Capture.from_config(config).to_config() == config
    explicit = Capture.from_config({"a": {**every_kind()[name], **kind.defaults}}).to_config()
    assert explicit == config  # defaults are left out


def test_a_registered_probe_is_found(flux):
    @probe("reading", {"tokens": parse_tokens, "from": parse_tokens}, averages=("heads",))
    def reading(context: ProbeContext, tokens="image", from_="text") -> Measure:
        """Attention from tokens to text."""
        queries, keys = (select_tokens(part, context, key) for part, key in ((tokens, "tokens"), (from_, "from")))

        def observe(attended, b, heads, add):
            for p, which in stream.attention_weights(attended, b, heads, queries[b], keys[b]):
                add("", (which,), p.sum(-1))

        return Measure({"": token_axes(queries, context, "tokens")}, observe, "probability")

    try:
        arrays = watch(flux, {"a": {"kind": "reading", "average": "heads"}, "b": {"kind": "quadrants"}})
        expected = arrays["b"].sel(**{"from": "image", "to": "text"}).mean("head").values
        np.testing.assert_allclose(arrays["a"].mean("row", "col").values, expected, atol=1e-6)
        assert PROBES["reading"].defaults == {"tokens": "image", "from": "text"}
        with pytest.raises(ValueError, match=r"capture.a.average\[0\]: 'steps', expected some of heads"):
            Probe({"a": {"kind": "reading", "average": "steps"}})
        with pytest.raises(ValueError, match=r"probe 'reading' is registered by .*test_probes; choose another name"):
            probe("reading")(lambda context: None)
        with pytest.raises(AssertionError, match="steps is a key of every request"):
            probe("other", {"steps": parse_tokens})(lambda context, steps: None)
        with pytest.raises(AssertionError, match=r"parsers \['tokens'\] do not match \['token'\]"):
            probe("other", {"tokens": parse_tokens})(lambda context, token: None)
    finally:
        PROBES.pop("reading", None)
    assert "other" not in PROBES


def test_labels(flux):
    box, spots = {"box": [1, 1, 3, 3]}, {"indices": 1}
    capture = {
        "map": {"kind": "map", "from": box, "to": "text", "blocks": "single"},
        "words": {"kind": "words"},
        "entropy": {"kind": "entropy"},
        "regions": {"kind": "regions", "regions": {"left": {"box": [0, 0, 4, 1]}, "text": "text"}, "heads": 1},
        "logits": {"kind": "logits", "from": spots, "to": "text", "average": ["steps"]},
        "distance": {"kind": "distance"},
    }
    found = {name: label(array) for name, array in watch(flux, capture, samples=2).items()}
    assert found["map"].dims == ("sample", "step", "block", "head", "from_row", "from_col", "to")
    assert found["map"].sel(block=2, from_row=1, to=3).shape == (2, 2, 2, 2)
    assert found["map"].block.values.tolist() == [1, 2]
    assert found["words"].sel(word="cat", direction="image_to_word").dims[-2:] == ("row", "col")
    assert found["entropy"].sizes["row"] == 4
    assert found["entropy"].sigma.values.tolist() == [1.0, 0.5]
    assert found["entropy"].stream.values.tolist() == ["double", "single", "single"]
    assert found["regions"].dims == ("sample", "step", "block", "head", "from", "to")
    assert found["regions"]["head"].values.tolist() == [1]
    assert found["logits"].dims == ("sample", "block", "head", "pair")
    assert found["logits"].groupby("axis").sum().sizes["axis"] == 3
    assert found["distance.histogram"].delta_col.values.tolist() == [-2, -1, 0, 1, 2]


def test_words_of_different_prompts(flux):
    arrays = watch(flux, {"words": {"kind": "words", "direction": "image_to_word"}}, samples=2, prompts=[CAT, DOG])
    words = arrays["words"]
    assert words.coords["text"] == (("sample", "word"), [["a#1", "cat", "a#2", "hat"], ["dog", "", "", ""]])
    assert np.isnan(words.values[1, ..., 1:, :, :]).all()
    assert np.isfinite(words.values[1, ..., 0, :, :]).all()
    cat, dog = (of_sample(arrays, i)["words"] for i in (0, 1))
    assert cat.labels("word") == ["a#1", "cat", "a#2", "hat"]
    assert dog.labels("word") == ["dog"]
    alone = watch(flux, {"words": {"kind": "words", "direction": "image_to_word"}}, prompts=[DOG])["words"]
    np.testing.assert_allclose(dog.values, alone.values[0], atol=1e-6)
    assert "sample" not in dog.axes


def test_truncated_words():
    cut = Prompt("a cat, a hat", CAT.spans[:2])
    (one,) = resolve(Capture.from_config({"a": {"kind": "words"}}), context(prompts=[cut]), 1)
    assert one.measure.outputs[""].coords["word"][1] == ["a#1", "cat"]
    with pytest.raises(ValueError, match=r"capture.a.words: 'hat' was cut off"):
        resolve(Capture.from_config({"a": {"kind": "words", "words": ["hat"]}}), context(prompts=[cut]), 1)


def test_selections_that_differ_by_sample(flux):
    prompts = [CAT, Prompt("hat cat", ((0, 3), (4, 7), (0, 0)))]
    arrays = watch(flux, {"m": {"kind": "map", "from": {"words": ["hat"]}, "to": "text"}}, samples=2, prompts=prompts)
    assert arrays["m"].coords["from_place"] == (("sample", "from"), [[4], [0]])
    other = watch(flux, {"m": {"kind": "map", "from": {"indices": [0], "of": "text"}, "to": "text"}})
    np.testing.assert_allclose(arrays["m"].values[1], other["m"].values[0], atol=1e-6)
    # the axis of a single sample is labelled like that of a batch whose samples select the same tokens
    assert of_sample(arrays, 1)["m"].coords["from"] == (("from",), [0]) == of_sample(other, 0)["m"].coords["from"]
    assert set(of_sample(arrays, 0)["m"].coords) == set(of_sample(other, 0)["m"].coords)


def test_memory_is_planned():
    capture = Capture.from_config(
        {
            "a": {"kind": "words", "words": ["cat", "hat"]},
            "b": {"kind": "words", "words": ["cat"], "direction": "image_to_word", "average": ["heads", "steps"]},
            "c": {"kind": "map", "from": {"indices": 1}, "to": "all", "blocks": "double", "steps": [0], "heads": 0},
            "d": {"kind": "distance", "average": ["tokens"], "blocks": [0]},
        }
    )
    needed = memory(resolve(capture, context(), 3), context())
    assert needed.pop(WORKING) >= stream.CHUNK_BYTES["cpu"]
    heads, steps, blocks, samples, tokens = 2, 2, 3, 3, 12
    assert needed == {
        "a": 4 * samples * steps * blocks * heads * 2 * 2 * tokens,
        "b": 4 * samples * blocks * tokens,
        "c": 4 * samples * (TEXT + tokens),
        "d": 4 * samples * steps * heads * (3 + 7 * 5),
    }


def test_a_small_budget_is_refused_before_the_run():
    big = {"max_mb": 9, "all": {"kind": "map", "from": "image", "to": "image"}}
    message = r"capture.max_mb: 9, but 132 MB are needed \(all 123, working memory 8.8\)"
    with pytest.raises(ValueError, match=message) as error:
        Probe(big).begin(context((40, 40)), 1)
    assert len(str(error.value).splitlines()) <= 3
    Probe({**big, "max_mb": 133}).begin(context((40, 40)), 1)


def test_arrays_need_a_whole_run(flux):
    probe = Probe({"a": {"kind": "quadrants"}})
    with pytest.raises(ValueError, match=r"probe.arrays: nothing captured yet"):
        probe.arrays  # noqa: B018
    probe.begin(context(), 1)
    flux(**inputs(), taps=probe.taps(0))
    with pytest.raises(ValueError, match="did not complete"):
        probe.arrays  # noqa: B018
    flux(**inputs(), taps=probe.taps(1))
    first = probe.arrays["a"].values.copy()
    probe.begin(context(), 1)  # a second run replaces the results
    for step in (0, 1):
        flux(**inputs(), taps=probe.taps(step))
    np.testing.assert_array_equal(probe.arrays["a"].values, first)


def test_a_second_forward_pass_is_an_error(flux):
    probe = Probe({"a": {"kind": "quadrants", "steps": [1]}})
    probe.begin(context(), 1)
    taps = probe.taps(1)
    with pytest.raises(ValueError, match="probe: a batch of 2, but begin\\(\\) was given 1"):
        flux(**inputs(2), taps=taps)
    with pytest.raises(ValueError, match="probe: step 1 was recorded already"):
        probe.taps(1)
    assert probe.taps(0) is None


def test_only_requested_blocks_and_steps_are_recorded(flux, monkeypatch):
    probe = Probe({"a": {"kind": "quadrants", "blocks": [1], "steps": [1]}})
    probe.begin(context(), 1)
    assert probe.taps(0) is None
    taps = probe.taps(1)
    assert [tap is None for tap in taps] == [True, False, True]
    calls = []
    monkeypatch.setattr(
        fluxlab.model.attention,
        "fused_attention_with_lse",
        lambda *a, real=fluxlab.model.attention.fused_attention_with_lse: calls.append(1) or real(*a),
    )
    flux(**inputs())
    assert not calls
    flux(**inputs(), taps=taps)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="taps has 1 entries, the model has 3 blocks"):
        flux(**inputs(), taps=taps[:1])


@pytest.mark.parametrize("bytes_", [64, 1000, 5000])
def test_results_do_not_depend_on_the_size_of_chunks(flux, monkeypatch, bytes_):
    """And a chunk is never larger than the limit."""
    capture = {name: request for name, request in every_kind().items() if name != "concepts"}
    expected = watch(flux, capture)
    monkeypatch.setitem(stream.CHUNK_BYTES, "cpu", bytes_)
    sizes, real = [], stream.attention_weights

    def spy(*arguments):
        for p, which in real(*arguments):
            sizes.append((p.numel() * p.element_size(), p.shape[1]))
            yield p, which

    for module in (fluxlab.probes.measures, fluxlab.probes.per_query):
        monkeypatch.setattr(module, "attention_weights", spy)
    for name, one in watch(flux, capture).items():
        np.testing.assert_allclose(one.values, expected[name].values, atol=1e-6, err_msg=name)
    assert all(size <= bytes_ or rows == 1 for size, rows in sizes)


def test_one_head_and_groups_out_of_order():
    """The queries of a kernel call may be in any order, and keys anywhere in the sequence."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 10, 8, generator=g), torch.randn(1, 3, 10, 8, generator=g)
    scores = q @ k.mT / 8**0.5
    order = torch.tensor([7, 2, 9, 0, 4])
    seen = Attended(q[:, :, order], k, scores.logsumexp(-1)[:, :, order], None, order)
    wanted, keys = stream.tokens(torch.tensor([0, 1, 2, 9])), stream.tokens(torch.tensor([3, 8]))
    ((p, which),) = stream.attention_weights(seen, 0, torch.tensor([2]), wanted, keys)
    assert which.on_host.tolist() == [0, 2, 3]
    expected = scores.softmax(-1)[0, 2][torch.tensor([0, 2, 9])][:, torch.tensor([3, 8])]
    torch.testing.assert_close(p[0], expected)


@pytest.mark.parametrize(
    "shape", [(10, 10), (1, 10), (3, 10, 10), (2, 1, 10, 10), (1, 3, 1, 10), (2, 3, 10, 1)], ids=str
)
def test_masks_that_broadcast(shape):
    g = torch.Generator().manual_seed(0)
    q, k, mask = torch.randn(2, 3, 10, 8, generator=g), torch.randn(2, 3, 10, 8, generator=g), torch.randn(shape)
    scores = q @ k.mT / 8**0.5 + mask
    seen = Attended(q, k, scores.logsumexp(-1), mask, None)
    wanted, keys = torch.tensor([1, 4, 9]), torch.tensor([0, 3, 8, 9])
    for heads in (None, torch.tensor([0, 2])):
        ((p, _),) = stream.attention_weights(seen, 1, heads, stream.tokens(wanted), stream.tokens(keys))
        expected = scores.softmax(-1)[1] if heads is None else scores.softmax(-1)[1, heads]
        torch.testing.assert_close(p, expected[:, wanted][..., keys])


def test_a_compiled_model_can_be_probed(flux, unchecked):
    torch._dynamo.reset()
    compiled = torch.compile(flux, backend="aot_eager")
    capture = {"a": {"kind": "quadrants"}, "b": {"kind": "entropy", "blocks": [0]}}
    plain, found = watch(flux, capture), watch(compiled, capture)
    for name, one in plain.items():
        np.testing.assert_allclose(found[name].values, one.values, atol=1e-5)


def test_autocast_does_not_change_p(flux):
    with torch.autocast("cpu", torch.bfloat16):
        weights = watch(flux, {"a": {"kind": "map", "from": "all", "to": "all"}})["a"].values
    assert np.abs(weights.sum(-1) - 1).max() <= 1e-4


def test_select_and_average(flux):
    words = watch(flux, {"a": {"kind": "words"}})["a"]
    one = words.sel(sample=0, word="cat", step=1, direction="word_to_image").mean("block", "head")
    np.testing.assert_allclose(one.values, words.values[0, 1, :, :, 1, 1].mean((0, 1)), rtol=1e-6)
    assert one.axes == ("row", "col")
    assert set(one.coords) == {"row", "col"}
    with pytest.raises(ValueError, match="word='dog': not found, expected one of a#1, cat"):
        words.sel(word="dog")
    with pytest.raises(ValueError, match="wrod: axis not found, expected one of sample, step"):
        words.mean("wrod")


def maps(values, words=("a", "b")):
    values = np.asarray(values, np.float32)
    coords = {"word": (("word",), list(words)), "row": (("row",), list(range(values.shape[1])))}
    return Captured(values, ("word", "row", "col"), coords, {"unit": "probability"})


def test_similarity_is_a_cosine():
    one = maps([[[1, 0], [0, 0]], [[3, 0], [0, 4]]])
    other = maps([[[0, 0], [2, 0]], [[6, 0], [0, 8]]])
    assert similarity(one, other).values.tolist() == [0, 1]
    assert similarity(one, other).axes == ("word",)
    assert similarity(one, other).labels("word") == ["a", "b"]
    assert similarity(one, maps([[[1, 0], [1, 0]], [[1, 1], [0, 0]]])).values == pytest.approx([0.5**0.5, 0.6 / 2**0.5])
    along = similarity(one, maps([[[1, 1], [0, 0]], [[3, 0], [0, 4]]]), over="col")
    np.testing.assert_allclose(along.values, [[0.5**0.5, np.nan], [1, 1]])  # a map of zeros has no direction
    assert along.axes == ("word", "row")


def test_similarity_of_labelled_maps():
    one = label(maps([[[1, 0], [0, 0]], [[3, 0], [0, 4]]]))
    other = label(maps([[[6, 0], [0, 8]], [[1, 2], [3, 4]]], words=("b", "c")))
    alike = similarity(one, other)
    assert alike.word.values.tolist() == ["b"]  # the labels that both have
    assert alike.values.tolist() == [1]
    against = similarity(one, one.sel(word="b"))  # an axis that only one has is broadcast
    np.testing.assert_allclose(against.values, [0.6, 1])
    lacking = one.where(one.word != "a")
    assert np.isnan(similarity(lacking, one).sel(word="a"))


def test_similarity_of_maps_that_cannot_be_compared():
    one = maps(np.ones((2, 2, 2)))
    for other, over, message in (
        (one, ("rwo", "col"), r"over=\['rwo', 'col'\]: expected some of word, row, col"),
        (one, (), r"over=\[\]: expected"),
        (label(one), ("row", "col"), "expected two Captured or two DataArrays"),
        (one.sel(word="a"), ("row", "col"), "the axes differ, word, row, col and row, col"),
        (maps(np.ones((2, 3, 2))), ("row", "col"), r"the labels of row differ \(2 and 3 entries\)"),
        (maps(np.ones((2, 2, 2)), words=("a", "c")), ("row", "col"), r"the labels of word differ \(2 and 2 entries\)"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity(one, other, over)
    with pytest.raises(
        ValueError, match=r"the labels of row differ \(2 and 3 entries\)"
    ):  # not reduced to the rows that both have
        similarity(label(one), label(maps(np.ones((2, 3, 2)))))


def test_files_without_arrays(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    write(tmp_path / "cut.safetensors", {"x": Captured(np.zeros(2), ("row",), {}, {})})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-1])
    for name, message in (
        ("none", "file not found"),
        ("other", "not a file of captured arrays"),
        ("broken", "or damaged"),
        ("cut", "or damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / f"{name}.safetensors")


def test_without_xarray(tmp_path, monkeypatch):
    write(tmp_path / "a", {"x": Captured(np.zeros(2), ("row",), {}, {})})
    monkeypatch.setitem(sys.modules, "xarray", None)
    assert load(tmp_path / "a")["x"].axes == ("row",)
    with pytest.raises(ValueError, match=r"pip install 'fluxlab\[probes\]'"):
        read(tmp_path / "a")


def test_importing_is_light():
    code = "import sys, fluxlab.probes as p; bad = {'xarray', 'pandas', 'matplotlib', 'transformers', 'torch._dynamo'}"
    subprocess.run([sys.executable, "-c", f"{code} & set(sys.modules); assert not bad, bad"], check=True)


def test_generate_takes_a_probe_only(tmp_path):
    pipe = fluxlab.load_pipeline(tiny.save(tmp_path, guidance=False))
    call = {"prompts": "a cat", "height": 16, "width": 24, "steps": 1, "max_sequence_length": 16, "output": "latent"}
    with pytest.raises(ValueError, match=r"probe='words': expected a fluxlab.probes.Probe"):
        pipe.generate(**call, probe="words")
    probe = Probe("words")
    pipe.generate(**call, probe=probe)
    assert probe.arrays["words"].labels("word") == ["a", "cat"]
    assert probe.arrays["words"].values.shape == (1, 1, 4, 1, 2, 4, 6)


def test_values_that_wait_for_a_device_can_be_added_after_the_run():
    """A run computes in inference mode; `probe.arrays` is read outside of it."""
    sums, incoming = np.zeros(3, np.float32), _Incoming()
    with torch.inference_mode():
        target, copied = torch.from_numpy(sums), torch.tensor([1.0, 2.0])
        incoming._waiting.append((SimpleNamespace(synchronize=lambda: None), target, (slice(1, None),), copied))
        incoming._bytes = copied.nbytes
    incoming.finish()
    assert sums.tolist() == [0, 1, 2]
