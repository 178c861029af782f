"""Sizes as a multiple of the model's own, images that are resized to them, and one variant per block."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from fluxlab import make_experiment
from fluxlab.checkpoints.stored import stored
from fluxlab.config import find_row
from fluxlab.errors import NonFiniteError, UserError
from fluxlab.experiment import captures
from fluxlab.experiment.cells import cell_key
from fluxlab.experiment.each import expanded
from fluxlab.experiment.settings import resolve
from fluxlab.loading import pipeline_without_weights
from fluxlab.positions import Program, split_resample
from fluxlab.resampling import check_resampled, is_resampled, resampled
from fluxlab.settings import Sampling

SMALL = Program.from_config({"a": {"op": "resample", "filter": "nearest"}, "b": {"op": "scale", "factor": 2}})
PLAIN = Program.from_config({"b": {"op": "scale", "factor": 2}})
INJECT = Program.from_config({"a": {"op": "inject", "source": {"sample": 0}, "what": "keys"}})
SIZE = Sampling(height=6, width=8)


def sampler(calls, fails=()):
    def sample(chosen, programs, settings):
        calls.append((list(chosen), list(programs), (settings.height, settings.width)))
        images = [Image.new("L", (settings.width or 4, settings.height or 3), 10 * i) for i in chosen]
        bad = [n for n, i in enumerate(chosen) if i in fails]
        if bad:
            images = [None if n in bad else image for n, image in enumerate(images)]
            raise NonFiniteError("not finite", dict.fromkeys(bad, 1), dict.fromkeys(bad, "why"), images)
        return images

    return sample


def test_a_batch_is_computed_in_two_parts_and_returned_in_order():
    calls = []
    images = resampled([PLAIN, SMALL, PLAIN, SMALL], SIZE, sampler(calls))
    assert calls == [([0, 2], [PLAIN] * 2, (6, 8)), ([1, 3], [PLAIN] * 2, (None, None))]
    assert [image.size for image in images] == [(8, 6)] * 4
    assert [image.getpixel((0, 0)) for image in images] == [0, 10, 20, 30]
    assert is_resampled([PLAIN, SMALL])
    assert not is_resampled([PLAIN])
    assert not is_resampled(None)


def test_sources_are_computed_with_both_parts():
    calls = []
    images = resampled([PLAIN, SMALL, INJECT], SIZE, sampler(calls))
    assert [chosen for chosen, _, _ in calls] == [[0, 1, 2]] * 2
    assert [image.getpixel((0, 0)) for image in images] == [0, 10, 20]


@pytest.mark.parametrize("fails", [(1,), (2,), (0, 3)])
def test_samples_that_are_not_finite_keep_their_place(fails):
    with pytest.raises(NonFiniteError) as raised:
        resampled([PLAIN, SMALL, PLAIN, SMALL], SIZE, sampler([], fails))
    assert raised.value.samples == sorted(fails)
    assert [i for i, image in enumerate(raised.value.results) if image is None] == sorted(fails)
    assert set(raised.value.reasons) == set(fails)


def test_what_a_resized_sample_does_not_have():
    with pytest.raises(UserError, match="output='latent': the op resample returns images"):
        check_resampled("latent")
    with pytest.raises(UserError, match="latents: not possible with the op resample"):
        check_resampled("pil", latents=torch.zeros(1), probe=None)


def test_the_rest_of_a_program_is_kept():
    assert split_resample(SMALL) == (PLAIN, "nearest")
    assert split_resample(PLAIN) == (PLAIN, None)
    with pytest.raises(UserError, match=r"a.filter: 'cubic', expected bicubic or"):
        Program.from_config({"a": {"op": "resample", "filter": "cubic"}})
    with pytest.raises(UserError, match=r"a.tokens: 'text', unknown key of resample"):
        Program.from_config({"a": {"op": "resample", "tokens": "text"}})


@pytest.fixture(scope="module")
def pipe():
    row = find_row("tiny")
    return pipeline_without_weights(row, stored(row), None, torch.device("cpu"))


@pytest.mark.parametrize(("enlarge", "size"), [(1.5, 96), (2, 128), (1, 64), (0.5, 32), (1.1, 72), (0.01, 4)])
def test_enlarge_is_a_multiple_of_the_models_size(pipe, enlarge, size):
    settings = pipe.resolve(Sampling(enlarge=enlarge))
    assert (settings.height, settings.width, settings.enlarge) == (size, size, None)
    assert settings == pipe.resolve(Sampling(height=size, width=size))  # so that cells have equal keys


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enlarge": 0}, "enlarge=0: expected a factor above 0"),
        ({"enlarge": 100}, "enlarge=100: expected .* at most 64"),
        ({"enlarge": True}, "enlarge=True: expected a finite number"),
        ({"enlarge": 1.5, "width": 64}, "enlarge=1.5: sets height and width; leave those out"),
    ],
)
def test_sizes_that_do_not_fit_together(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings).check()


def test_old_digests_do_not_change():
    assert "enlarge" not in make_experiment("a cat", identify=False).request()


def test_keys_depend_on_the_trained_size_only_where_images_do(pipe):
    settings = resolve(make_experiment("a cat", identify=False), pipe, None, 100, 1)
    other = replace(settings, trained=[32, 32, 24])
    assert settings.trained == [16, 16, 24]
    for program, same in ((PLAIN, True), (Program(), True), (SMALL, False), ({"a": {"op": "yarn"}}, False)):
        program = Program.from_config(program)
        assert (cell_key(settings, "a cat", 0, program) == cell_key(other, "a cat", 0, program)) == same
    assert "trained" not in replace(settings, trained=None).record()  # as in older stores


def test_one_variant_per_block():
    variants = {
        "baseline": {},
        "none": {"a": {"op": "drop", "blocks": "each"}, "b": {"op": "mirror"}},
        "pair": {"a": {"op": "zero", "blocks": "each"}, "b": {"op": "mirror", "blocks": "each"}},
        "p": PLAIN,
    }
    assert expanded(variants, 2) == {
        "baseline": {},
        "none_0": {"a": {"op": "drop", "blocks": 0}, "b": {"op": "mirror"}},
        "none_1": {"a": {"op": "drop", "blocks": 1}, "b": {"op": "mirror"}},
        "pair_0": {"a": {"op": "zero", "blocks": 0}, "b": {"op": "mirror", "blocks": 0}},
        "pair_1": {"a": {"op": "zero", "blocks": 1}, "b": {"op": "mirror", "blocks": 1}},
        "p": PLAIN,
    }
    each = {"none": {"a": {"op": "drop", "blocks": "each"}}}
    tiny = make_experiment("a cat", each, identify=False).variants
    assert list(tiny) == ["baseline", *(f"none_{block}" for block in range(6))]
    assert len(make_experiment("a cat", each, model="schnell", identify=False).variants) == 1 + 57
    with pytest.raises(UserError, match=r"variants.none: blocks: each makes a variant 'none_1', which exists"):
        make_experiment("a cat", {**each, "none_1": {}}, identify=False)


def test_a_program_that_is_resized_is_checked_at_the_models_own_size(pipe):
    """The box lies within 20 × 20 tokens, and not within the model's own 16 × 16."""
    box = {"b": {"op": "zero", "tokens": {"box": [0, 0, 20, 20]}}}
    large = Sampling(height=96, width=96, steps=1)
    pipe.check(["a cat"], [Program.from_config(box)], large)
    with pytest.raises(UserError, match=r"b\.tokens\.box: .* a box within \[0, 0, 16, 16\]"):
        pipe.check(["a cat"], [Program.from_config({"a": {"op": "resample"}, **box})], large)


def test_a_capture_of_a_resized_image_is_refused_before_the_run(pipe):
    experiment = make_experiment("a cat", {"small": SMALL}, capture="words", identify=False)
    with pytest.raises(UserError, match=r"variants\.small: the op resample .* capture=none"):
        captures.check(experiment, pipe, resolve(experiment, pipe, None, 100, 1))
