import csv
import io
import itertools
import json
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import fourier_shift, gaussian_filter

from fluxlab import scenes
from fluxlab.measure import (
    METRICS,
    Sample,
    about,
    compare,
    describe,
    metric,
    oracle_columns,
    oracle_compare,
    summarise,
    table,
    to_csv,
)
from fluxlab.measure import summary as summaries
from fluxlab.measure.images import sawtooth, squared_error
from fluxlab.measure.oracle import inspect
from fluxlab.measure.registry import SCENE_SIDE, columns, evaluate, shown_metrics
from fluxlab.measure.summary import complete, effects
from fluxlab.measure.text import interval_text, number_text

CAPTION = "a red fox on the left holding a sign that says hello world"


def texture(seed, height, width, sigma=2.0):
    """Return a random image of soft blobs that uses the whole range of values."""
    values = gaussian_filter(
        np.random.default_rng(seed).normal(size=(height, width, 3)), (sigma, sigma, 0), mode="wrap"
    )
    return np.uint8((values - values.min()) / np.ptp(values) * 255)


def grey(values):
    """Return luma (H, W) in 0 ... 1 as uint8 (H, W, 3)."""
    return np.repeat(np.uint8(np.rint(np.clip(values, 0, 1) * 255))[..., None], 3, 2)


def drawn(inside, side=128, fine=8):
    """Return the antialiased luma (side, side) of a region given as a function of y and x in pixels."""
    points = (np.arange(side * fine) + 0.5) / fine
    hits = inside(*np.meshgrid(points, points, indexing="ij")).astype(float)
    return hits.reshape(side, fine, side, fine).mean((1, 3))


def photograph(name):
    from skimage import data

    return getattr(data, name)()


# ---- against a baseline


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(8, 70), st.integers(8, 70), st.booleans())
def test_an_image_equals_itself(seed, height, width, flat):
    image = np.full((height, width, 3), seed, np.uint8) if flat else texture(seed, height, width)
    assert compare(image, image.copy()) == {
        "psnr": np.inf,
        "ssim": 1,
        "rmse": 0,
        "colour_shift": 0,
        "displacement_row": 0,
        "displacement_col": 0,
        "displacement": 0,
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(-9, 9), st.integers(-9, 9), st.integers(64, 90), st.integers(64, 90))
def test_a_shift_is_found(seed, down, right, height, width):
    wide = texture(seed, height + 20, width + 20)
    baseline = wide[10 : 10 + height, 10 : 10 + width]
    image = wide[10 - down : 10 - down + height, 10 - right : 10 - right + width]  # new content enters at the edges
    found = compare(image, baseline)
    assert (found["displacement_row"], found["displacement_col"]) == pytest.approx((down, right), abs=0.11)
    assert found["displacement"] == pytest.approx(np.hypot(down, right), abs=0.16)


def test_a_shift_by_a_fraction_of_a_pixel_is_found():
    luma = texture(0, 96, 64)[..., 0] / 255
    moved = np.fft.ifft2(fourier_shift(np.fft.fft2(luma), (1.4, -2.7))).real
    found = compare(grey(moved), grey(luma))
    assert (found["displacement_row"], found["displacement_col"]) == pytest.approx((1.4, -2.7), abs=0.11)


def test_shifts_of_scenes_are_found():
    rng = np.random.default_rng(0)
    for _ in range(10):
        image = np.pad(scenes.render(scenes.sample_scene(rng)), ((8, 8), (8, 8), (0, 0)), mode="edge")
        found = compare(image[5:69, 11:75], image[8:72, 8:72])
        assert (found["displacement_row"], found["displacement_col"]) == pytest.approx((3, -3), abs=0.11)


def test_images_with_nothing_in_common_have_no_displacement():
    others = [texture(s, 64, 64) for s in range(1, 6)] + [np.full((64, 64, 3), 9, np.uint8)]
    for other in others:
        found = compare(texture(0, 64, 64), other)
        assert np.isnan([found["displacement_row"], found["displacement_col"], found["displacement"]]).all()
        assert np.isfinite([found["psnr"], found["ssim"], found["rmse"], found["colour_shift"]]).all()


def test_a_degraded_image_is_not_displaced():
    # phase correlation alone finds a shift of 10 px: a soft image leaves it little but noise
    image = photograph("astronaut")[60:188, 160:288]
    noise = np.random.default_rng(0).normal(0, 12, image.shape)
    soft = np.uint8(np.clip(gaussian_filter(image.astype(float), (6, 6, 0)) + noise, 0, 255))
    assert compare(soft, image)["displacement"] == 0


def test_psnr_and_rmse_of_known_differences():
    image = np.full((32, 40, 3), 100, np.uint8)
    found = compare(image + np.uint8(10), image)
    assert found["rmse"] == 10
    assert found["psnr"] == pytest.approx(20 * np.log10(25.5))
    black, white = np.zeros_like(image), np.full_like(image, 255)
    assert compare(black, white)["psnr"] == 0
    assert compare(black, white)["ssim"] == pytest.approx(0, abs=1e-3)


def test_colour_shift_is_that_of_the_mean_colour():
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert compare(black, white)["colour_shift"] == pytest.approx(100, abs=0.01)  # L* from 0 to 100
    image = texture(0, 32, 32)
    flipped = compare(image[::-1], image)
    assert flipped["colour_shift"] == pytest.approx(0, abs=1e-3)
    assert flipped["rmse"] > 20
    redder = np.uint8(np.clip(image + np.array([40, 0, 0]), 0, 255))
    assert compare(redder, image)["colour_shift"] > 5


def test_images_of_different_sizes_are_rejected():
    with pytest.raises(ValueError, match=r"image: 16 x 24 px, but the baseline has 24 x 16 px; expected equal sizes"):
        compare(np.zeros((16, 24, 3), np.uint8), np.zeros((24, 16, 3), np.uint8))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((16, 16, 3)),
        np.zeros((16, 16), np.uint8),
        np.zeros((16, 16, 4), np.uint8),
        np.zeros((7, 16, 3), np.uint8),
    ],
)
def test_other_images_are_rejected(image):
    good = np.zeros((16, 16, 3), np.uint8)
    for call in (lambda: compare(image, good), lambda: describe(image, 4), lambda: oracle_columns(image, "a cat")):
        with pytest.raises(
            ValueError, match=r"image: .*expected uint8 \(height, width, 3\) with sides of at least 8 px"
        ):
            call()
    with pytest.raises(ValueError, match="baseline: "):
        compare(good, image)


# ---- alone


def test_constant_images_have_defined_values_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in (8, 16, 65):
            for value in (0, 200, 255):
                image = np.full((side, side, 3), value, np.uint8)
                found = describe(image, 2)
                assert np.isnan(found.pop("spectrum_slope"))
                assert found == {"sharpness": 0, "edge_energy": 0, "sawtooth": 0}
                compare(image, 255 - image)
                compare(image, texture(0, side, side))
                oracle_columns(image, CAPTION)


def test_sharpness_is_the_gradient_of_a_ramp():
    rows, cols = np.mgrid[:40, :50]
    found = describe(np.repeat((3 * rows + 2 * cols).astype(np.uint8)[..., None], 3, 2), 8)
    assert found["sharpness"] == pytest.approx(np.hypot(3, 2) / 255)
    assert found["edge_energy"] == pytest.approx((3**2 + 2**2) / 255**2)


def test_blur_lowers_the_energy_of_an_edge_but_not_its_gradient():
    edge = np.where(np.arange(64) < 32, 0.2, 0.8)[None].repeat(64, 0)
    sharp, soft = describe(grey(edge), 8), describe(grey(gaussian_filter(edge, 3)), 8)
    assert soft["sharpness"] == pytest.approx(sharp["sharpness"], rel=0.01)
    assert soft["edge_energy"] < 0.15 * sharp["edge_energy"]


def noise(seed, size, slope, whole=(256, 256)):
    """Return a crop, luma of `size`, of a larger noise whose power falls with a slope: it does not wrap around."""
    frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, whole), indexing="ij"))
    frequency[0, 0] = np.inf
    white = np.fft.fft2(np.random.default_rng(seed).normal(size=whole))
    values = np.fft.ifft2(white * frequency ** (slope / 2)).real[: size[0], : size[1]]
    return 0.5 + 0.15 * (values - values.mean()) / values.std()


@pytest.mark.parametrize("slope", [0, -1, -2, -3])
@pytest.mark.parametrize(("size", "within"), [((64, 96), 0.06), ((32, 32), 0.15)])
def test_spectrum_slope_is_that_of_the_noise(slope, size, within):
    found = [describe(grey(noise(seed, size, slope)), 8)["spectrum_slope"] for seed in range(20)]
    assert np.mean(found) == pytest.approx(slope, abs=within)


def test_spectra_of_patterns_are_finite():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows, cols = np.indices((64, 64))
        for pattern in ((rows + cols) % 2, rows % 2, cols // 8 % 2, rows == 20, (rows == 20) & (cols == 31), cols / 63):
            assert np.isfinite(describe(grey(pattern), 8)["spectrum_slope"])


def test_photographs_have_a_slope_of_about_minus_two():
    for name in ("astronaut", "coffee", "chelsea"):
        assert -3.2 < describe(photograph(name)[:256, :256], 16)["spectrum_slope"] < -1.8


# ---- saw-teeth


@pytest.mark.parametrize("period", [4, 8, 16])
@pytest.mark.parametrize("angle", np.linspace(-1.5, 1.5, 9))
def test_straight_edges_have_no_teeth(period, angle):
    luma = drawn(lambda y, x: x * np.cos(angle) + y * np.sin(angle) > 60 + 10 * angle)
    assert abs(describe(grey(luma), period)["sawtooth"]) < 0.01


@pytest.mark.parametrize("period", [4, 8, 16])
def test_discs_and_squares_on_the_grid_have_no_teeth(period):
    for centre, radius in ((64, 40), (60.3, 30.7)):
        disc = drawn(lambda y, x, c=centre, r=radius: (y - c) ** 2 + (x - c) ** 2 < r * r)
        assert abs(describe(grey(disc), period)["sawtooth"]) < 0.03
    square = drawn(lambda y, x: (y > 32) & (y < 96) & (x > 32) & (x < 80))
    assert describe(grey(square), period)["sawtooth"] == pytest.approx(0, abs=1e-9)


def zigzag(by, period):
    """Return a vertical edge that is moved by ± `by` px in alternate rows of tokens."""
    return drawn(lambda y, x: x > 64 + by * np.where(y // period % 2, 1, -1))


@pytest.mark.parametrize("period", [8, 16])
def test_sawtooth_grows_with_the_amplitude_of_a_zigzag(period):
    amplitudes = np.array([0.25, 0.5, 1, period / 8])
    found = [describe(grey(zigzag(a, period)), period)["sawtooth"] for a in amplitudes]
    assert found == pytest.approx(2 * amplitudes / period, rel=0.25)
    assert all(np.diff(np.unique(found)) > 0)
    sideways = [sawtooth(zigzag(a, period).T, period) for a in amplitudes]
    assert sideways == pytest.approx([sawtooth(zigzag(a, period), period) for a in amplitudes])


def test_round_and_blurred_zigzags_count():
    disc = drawn(lambda y, x: (y - 64) ** 2 + (x - 64 - 2 * np.where(y // 16 % 2, 1, -1)) ** 2 < 1600)
    assert describe(grey(disc), 16)["sawtooth"] > 0.05
    soft = [describe(grey(gaussian_filter(zigzag(2, 16), s)), 16)["sawtooth"] for s in (0, 1, 2, 4)]
    assert all(np.diff(soft) < 0)
    assert soft[2] > 0.05


def test_teeth_of_another_period_do_not_count():
    assert abs(describe(grey(zigzag(1, 5)), 16)["sawtooth"]) < 0.05


@pytest.mark.parametrize("period", [4, 8, 16])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_photographs_drawn_at_half_their_ids_have_teeth(period, name):
    # each token shows its patch at its own size, half a patch after the one before: ids x 0.5
    photo = photograph(name)[:256, :256]
    pick = np.arange(256) // period * period // 2 + np.arange(256) % period
    assert abs(describe(photo, period)["sawtooth"]) < 0.04
    assert describe(photo[np.ix_(pick, pick)], period)["sawtooth"] > 0.1


@pytest.mark.parametrize("period", [4, 8, 16])
def test_small_images_scatter_little(period):
    rng = np.random.default_rng(0)
    images = [scenes.render(scenes.sample_scene(rng)) for _ in range(60)]
    images += list(rng.integers(0, 256, (10, 40, 40, 3), dtype=np.uint8))
    found = [describe(image, period)["sawtooth"] for image in images]
    assert np.std(found) < 0.2
    assert abs(np.mean(found)) < 0.05


def test_teeth_need_two_tokens():
    assert np.isnan(sawtooth(np.zeros((34, 90)), 16))
    assert sawtooth(np.zeros((35, 90)), 16) == 0


@pytest.mark.parametrize("period", [0, 1, 2.5, -4])
def test_other_periods_are_rejected(period):
    with pytest.raises(ValueError, match=f"period={period}: expected the pixels per token"):
        describe(np.zeros((64, 64, 3), np.uint8), period)


# ---- the oracle


def scene_with_sign(seed=0):
    rng = np.random.default_rng(seed)
    while not (scene := scenes.sample_scene(rng)).sign:
        pass
    return scene


def test_oracle_columns_are_those_of_the_report():
    scene = scene_with_sign()
    image, wanted = scenes.render(scene), scenes.wanted_of(scene)
    found = oracle_columns(image, scenes.write(wanted))
    thing = inspect(image, wanted).things[0]
    expected = dict.fromkeys(("object", "colour", "shape", "place", "sign", "word", "letters"), 1.0)
    expected |= {"thing_row": thing.row, "thing_col": thing.col, "thing_size": float(thing.size)}
    assert np.isnan(found.pop("relation"))
    assert found == expected
    assert all(type(value) is float for value in found.values())
    other = next(colour for colour in scenes.COLOURS if colour != wanted.colour)
    image[scene.sign.row : scene.sign.row + 7, scene.sign.col : scene.sign.col + 3] = (
        scenes.scene.BOARD
    )  # erase a letter
    found = oracle_columns(image, scenes.write(replace(wanted, place=None, colour=other)))
    assert (found["colour"], found["word"], found["shape"]) == (0, 0, 1)
    assert found["letters"] == pytest.approx(1 - 1 / sum(map(len, wanted.sign)))
    assert np.isnan(found["place"])


@pytest.mark.parametrize(
    "caption", ["A photo of a horse", "A cat holding a sign that says hello world!", "an red cat", "ф" * 900]
)
def test_captions_outside_the_grammar_have_no_values(caption):
    image = scenes.render(scene_with_sign())
    assert np.isnan(list(oracle_columns(image, caption).values())).all()
    assert np.isnan(list(oracle_compare(image, image, caption).values())).all()


def test_an_empty_caption_says_nothing_but_the_thing_is_found():
    found = oracle_columns(scenes.render(scene_with_sign()), "")
    assert np.isnan([value for name, value in found.items() if not name.startswith("thing")]).all()
    assert np.isfinite([found["thing_row"], found["thing_col"], found["thing_size"]]).all()


def test_large_images_are_not_scenes():
    image = np.zeros((SCENE_SIDE, 64, 3), np.uint8)
    assert oracle_columns(image, "a cat")["object"] == 0
    assert np.isnan(list(oracle_columns(np.zeros((SCENE_SIDE + 8, 64, 3), np.uint8), "a cat").values())).all()


def test_a_moved_thing_is_measured():
    scene = replace(scene_with_sign(), sign=None)
    thing = scene.things[0]
    moved = replace(scene, things=(replace(thing, row=32, col=34),))
    before = replace(scene, things=(replace(thing, row=28, col=31),))
    images = [scenes.render(s) for s in (moved, before, replace(scene, things=()))]
    found = oracle_compare(*images[:2], "a cat")  # the name does not matter
    assert list(found.values()) == pytest.approx([4, 3, 5])
    assert np.isnan(list(oracle_compare(images[0], images[2], "a cat").values())).all()


def test_every_metric_is_registered_with_its_properties():
    image = scenes.render(scene_with_sign())
    alone = describe(image, 4) | oracle_columns(image, CAPTION)
    against = compare(image, image) | oracle_compare(image, image, CAPTION)
    given = dict.fromkeys(("psnr_outside", "seam", "psnr_target", "ssim_target"), True)
    similar = {"clip_image": False, "clip_text": True, "dino_image": False} | given
    assert {name: m.alone for name, m in METRICS.items()} == dict.fromkeys(alone, True) | dict.fromkeys(
        against, False
    ) | similar
    for name, entry in METRICS.items():
        assert entry.better in ("higher", "lower", "neutral"), name
        assert entry.meaning
        assert "\n" not in entry.meaning
        assert not entry.meaning.endswith(".")
        assert entry.title
        assert not entry.share or not entry.unit, name


def test_columns_depend_on_what_the_run_has():
    assert columns() == [
        *compare(*([np.zeros((16, 16, 3), np.uint8)] * 2)),
        "sharpness",
        "edge_energy",
        "spectrum_slope",
        "sawtooth",
    ]
    assert columns({"scenes", "mask", "target", "clip", "dino"}) == list(METRICS)
    assert set(METRICS) - set(columns({"scenes", "target", "clip", "dino"})) == {"psnr_outside", "seam"}
    assert columns({"clip"})[-2:] == ["clip_image", "clip_text"]
    assert shown_metrics()[:3] == ["psnr", "ssim", "word"]


@pytest.fixture
def contrast():
    """A metric of a user's own."""

    @metric("contrast of the luma", "0..1", better="higher", shown=1)
    def contrast(image: Sample) -> float:
        """Standard deviation of the luma.

        More about it.
        """
        return image.luma.std()

    yield contrast
    del METRICS["contrast"]


def test_a_metric_is_one_function(contrast):
    entry = METRICS["contrast"]
    assert (entry.unit, entry.title, entry.alone) == ("0..1", "contrast of the luma", True)
    assert entry.meaning == "standard deviation of the luma"
    assert columns()[-1] == "contrast"
    assert "contrast" in shown_metrics()[:2]
    value = evaluate("contrast", Sample(texture(0, 16, 16)))
    assert type(value) is float
    assert 0 < value < 1
    assert about("unknown_one") == ("", "", "unknown one", *about("unknown_one")[3:])


@pytest.mark.parametrize(
    ("options", "function", "message"),
    [
        ({}, lambda: 1, "0 parameters, expected"),
        ({"better": "more"}, lambda image: 1, "expected better in"),
        ({"needs": "gpu"}, lambda image: 1, "expected better in"),
    ],
)
def test_metrics_that_cannot_be_registered(options, function, message):
    function.__name__ = "m"
    function.__doc__ = "Something."
    before = list(METRICS)
    with pytest.raises(ValueError, match=f"metric 'm': .*{message}"):
        metric("m", **options)(function)
    function.__name__ = "psnr"
    with pytest.raises(ValueError, match="metric 'psnr' is already registered"):
        metric("m")(function)
    assert list(METRICS) == before


def test_shared_parts_are_computed_once(monkeypatch):
    from fluxlab.measure import oracle

    scene = scene_with_sign()
    image, baseline = (Sample(scenes.render(s), CAPTION, 4) for s in (scene, replace(scene, things=())))
    seen = []
    monkeypatch.setattr(oracle, "inspect", lambda pixels, wanted: seen.append(pixels) or inspect(pixels, wanted))
    for name in columns({"scenes"}):
        evaluate(name, image, baseline)
    assert len(seen) == 2


# ---- by a model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Write random models of each kind with transformers."""
    import torch
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from fluxlab.checkpoints.random import tokenizers

    torch.manual_seed(0)
    root, tokenizer = tmp_path_factory.mktemp("similarity"), tokenizers()[0]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    seen = {"image_size": 28, "patch_size": 7}
    config = CLIPConfig(
        text_config=small | special | {"vocab_size": len(tokenizer)}, vision_config=small | seen, projection_dim=12
    )
    CLIPModel(config).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(root / "clip")
    Dinov2Model(Dinov2Config(**small, image_size=35, patch_size=7)).save_pretrained(root / "dinov2")
    processor = BitImageProcessorPil(
        size={"shortest_edge": 33}, crop_size=28, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    processor.save_pretrained(root / "dinov2")
    ViTModel(ViTConfig(**small, **seen)).save_pretrained(root / "dino")
    return root


@pytest.fixture(scope="module")
def images():
    return [texture(0, 40, 64), texture(1, 90, 61), texture(2, 28, 28), texture(3, 64, 40)]


def similar(similarity, image, baseline, prompt=""):
    """Return the metrics of one similarity model."""
    image, baseline = (Sample(x, prompt, models={similarity.kind: similarity}) for x in (image, baseline))
    names = [name for name, entry in METRICS.items() if entry.needs == similarity.kind]
    return {name: evaluate(name, image, baseline) for name in names}


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_images_are_prepared_as_by_transformers(checkpoints, images, kind):
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from fluxlab.measure.similarity import Similarity, prepare

    folder, cls = {"clip": ("clip", CLIPImageProcessorPil), "dino": ("dinov2", BitImageProcessorPil)}[kind]
    expected = cls.from_pretrained(checkpoints / folder)(images, return_tensors="np")["pixel_values"]
    made = prepare(images, Similarity(checkpoints / folder, kind).preparation)
    assert made.dtype == np.float32
    assert made.shape == (4, 3, 28, 28)
    np.testing.assert_allclose(made, expected, atol=2e-6)


def test_clip_agrees_with_transformers(checkpoints, images):
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    from fluxlab.measure.similarity import Similarity, prepare

    prompts = ["a red fox", "hello world of long signs", "", "word " * 300]
    similarity = Similarity(checkpoints / "clip", "clip", batch=3)
    model = CLIPModel.from_pretrained(checkpoints / "clip").eval()
    tokens = CLIPTokenizer.from_pretrained(checkpoints / "clip")(
        prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model(**tokens, pixel_values=torch.from_numpy(prepare(images, similarity.preparation)))
    vectors, texts = similarity.image(images), similarity.text(prompts)
    np.testing.assert_allclose(vectors, expected.image_embeds, atol=1e-5)
    np.testing.assert_allclose(texts, expected.text_embeds, atol=1e-5)
    pairs = zip(images, images[::-1], prompts, strict=True)
    found = [similar(similarity, *pair) for pair in pairs]
    assert [c["clip_image"] for c in found] == pytest.approx((vectors * vectors[::-1]).sum(1))
    assert [c["clip_text"] for c in found] == pytest.approx((vectors * texts).sum(1), abs=1e-6)  # padding rounds
    assert len({round(c["clip_image"], 4) for c in found}) == 2  # each pair twice


@pytest.mark.parametrize("folder", ["dinov2", "dino"])
def test_dino_is_the_class_token(checkpoints, images, folder):
    import torch
    from transformers import AutoModel

    from fluxlab.measure.similarity import Similarity, prepare

    similarity = Similarity(checkpoints / folder, "dino", batch=2)
    model = AutoModel.from_pretrained(checkpoints / folder).eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(prepare(images, similarity.preparation))
        expected = torch.nn.functional.normalize(model(pixels).last_hidden_state[:, 0], dim=-1)
    np.testing.assert_allclose(similarity.image(images), expected, atol=1e-5)
    found = [similar(similarity, image, image) for image in images]
    assert [list(c) for c in found] == [["dino_image"]] * 4
    assert [c["dino_image"] for c in found] == pytest.approx([1] * 4)
    with pytest.raises(ValueError, match="kind='dino': has no text encoder"):
        similarity.text(["a cat"])
    assert similarity.image([]).shape == (0, 0)


def test_a_baseline_and_a_prompt_are_embedded_once(checkpoints, images, monkeypatch):
    from fluxlab.measure.similarity import Similarity

    similarity, embedded = Similarity(checkpoints / "clip", "clip"), []
    for kind in ("image", "text"):
        embed = getattr(similarity, kind)
        monkeypatch.setattr(
            similarity, kind, lambda given, embed=embed, kind=kind: embedded.append(kind) or embed(given)
        )
    samples = [Sample(image, "a red fox", models={"clip": similarity}) for image in images[:3]]
    baseline = samples[0]
    assert evaluate("clip_image", baseline, baseline) == pytest.approx(1)
    texts = {evaluate("clip_text", sample) for sample in samples}
    assert len({evaluate("clip_image", sample, baseline) for sample in samples}) == len(texts) == 3
    assert sorted(embedded) == ["image"] * 3 + ["text"]


def changed(source, target, name=None, **content):
    """Copy a checkpoint and change keys in one of its JSON files."""
    shutil.copytree(source, target)
    if name:
        (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | content))
    return target


def test_without_a_processor_the_models_size_is_used(checkpoints, tmp_path):
    from fluxlab.measure.similarity import Similarity

    for name, kind, side in (("clip", "clip", 28), ("dinov2", "dino", 35)):
        folder = changed(checkpoints / name, tmp_path / name)
        (folder / "preprocessor_config.json").unlink()
        found = Similarity(folder, kind)
        assert found.image([texture(0, 40, 50)]).shape[0] == 1
        assert (found.preparation.crop or found.preparation.resize) == (side, side)
        assert found.preparation.resample == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"size": {"longest_edge": 28}}, "expected a shorter side and a crop within it"),
        ({"do_center_crop": False}, "expected a shorter side and a crop within it"),
        ({"crop_size": 40}, "expected a shorter side and a crop within it"),
        ({"crop_size": 14}, r"gives images of 14 x 14 px, but the model expects 28 x 28"),
    ],
)
def test_unsupported_processors_are_rejected(checkpoints, tmp_path, settings, message):
    from fluxlab.measure.similarity import Similarity

    folder = changed(checkpoints / "clip", tmp_path / "clip", "preprocessor_config.json", **settings)
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: .*{message}"):
        Similarity(folder, "clip")


def test_older_and_newer_processor_files(checkpoints, tmp_path):
    from fluxlab.measure.similarity import Similarity

    expected = Similarity(checkpoints / "clip", "clip").preparation
    old = changed(checkpoints / "clip", tmp_path / "old", "preprocessor_config.json", size=28, crop_size=28)
    assert Similarity(old, "clip").preparation == expected
    new = changed(checkpoints / "clip", tmp_path / "new")
    settings = json.loads((new / "preprocessor_config.json").read_text())
    (new / "preprocessor_config.json").unlink()
    (new / "processor_config.json").write_text(json.dumps({"image_processor": settings | {"resample": 2}}))
    assert Similarity(new, "clip").preparation == expected._replace(resample=2)


def test_checkpoints_of_another_kind_or_incomplete_are_rejected(checkpoints, tmp_path):
    from fluxlab.measure.similarity import Similarity

    def refused(checkpoint, kind, message):
        with pytest.raises(ValueError, match=message) as error:
            Similarity(checkpoint, kind)
        assert 1 <= len(str(error.value).splitlines()) <= 3

    refused(checkpoints / "clip", "siglip", "kind='siglip': expected one of clip, dino")
    refused(checkpoints / "clip", "dino", "model_type is 'clip'.*\nThis checkpoint is of the kind 'clip'")
    refused(checkpoints / "dinov2", "clip", "model_type is 'dinov2'.*\nThis checkpoint is of the kind 'dino'")
    refused(tmp_path / "none", "clip", "none: no such folder")
    refused("owner/none", "dino", "owner/none: no such folder here, and it could not be fetched")
    refused("owner/none/model.safetensors", "dino", "model.safetensors: no such folder")
    refused(tmp_path, "clip", "no config.json")
    folder = changed(checkpoints / "clip", tmp_path / "other", "config.json", model_type="t5")
    refused(folder, "clip", "config.json: model_type is 't5'.*\nUse a checkpoint such as")
    folder = changed(checkpoints / "clip", tmp_path / "weights")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(folder, "clip", "the clip model cannot be loaded")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "clip", "no weights|refused")
    folder = changed(checkpoints / "clip", tmp_path / "words")
    (folder / "tokenizer.json").unlink()
    refused(folder, "clip", "words: no tokenizer")


def test_missing_and_foreign_weights_are_fatal(checkpoints, tmp_path):
    from safetensors.numpy import load_file, save_file

    from fluxlab.measure.similarity import Similarity

    folder = changed(checkpoints / "dinov2", tmp_path / "dinov2")
    weights = load_file(folder / "model.safetensors")
    (name, value) = next((k, v) for k, v in weights.items() if k.endswith("layernorm.weight"))
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 missing \({name}\)"):
        Similarity(folder, "dino")
    save_file({**weights, "extra.weight": value}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected \(extra.weight\)"):
        Similarity(folder, "dino")
    unused = {
        "classifier.weight": value,
        "embeddings.position_ids": np.arange(3),
    }  # a head, and position indices of older releases
    save_file({**weights, **unused}, folder / "model.safetensors", {"format": "pt"})
    Similarity(folder, "dino")


# ---- many cells


def cells(seed=0, variants=("baseline", "half", "noise floor", "another seed"), seeds=12, **shift):
    """Return rows that differ much between cells, and by a constant between a variant and the baseline."""
    rng = np.random.default_rng(seed)
    level = {(p, s): rng.normal(0, 5) for p in "ab" for s in range(seeds)}
    return [
        {
            "variant": v,
            "prompt": p,
            "seed": s,
            "sharpness": value + shift.get(v, 0),
            "psnr": np.inf if v == "baseline" else 20 + rng.normal(),
            "ssim": rng.random(),
        }
        for v in variants
        for (p, s), value in level.items()
    ]


def entry(summary, variant, metric):
    return next(row for row in summary if (row["variant"], row["metric"]) == (variant, metric))


def test_intervals_agree_with_the_standard_error():
    rows = cells(seeds=60)
    found = entry(summarise(rows, "baseline", ["ssim"]), "half", "ssim")
    values = [row["ssim"] for row in rows if row["variant"] == "half"]
    error = 1.96 * np.std(values) / len(values) ** 0.5
    assert found["n"] == 120
    assert found["mean"] == pytest.approx(np.mean(values))
    assert (found["low"], found["high"]) == pytest.approx((found["mean"] - error, found["mean"] + error), rel=0.02)


def test_differences_are_paired():
    summary = summarise(cells(half=0.5), "baseline", ["sharpness", "ssim", "psnr"])
    found = entry(summary, "half", "sharpness")
    assert found["high"] - found["low"] > 2
    assert (found["paired_mean"], found["paired_low"], found["paired_high"]) == pytest.approx((0.5, 0.5, 0.5))
    for variant, name in (("baseline", "sharpness"), ("half", "ssim"), ("half", "psnr")):
        assert np.isnan([entry(summary, variant, name)[f"paired_{k}"] for k in ("mean", "low", "high")]).all()


def test_pairs_have_equal_prompt_and_seed_in_any_order():
    rows = cells(half=0.5)
    rows = rows[::-1][3:]  # in reverse order, without three cells of the last variant
    for row in rows[:40:7]:
        row["sharpness"] = np.nan
    found = entry(summarise(rows, "baseline", ["sharpness"]), "half", "sharpness")
    assert found["n"] == sum(r["variant"] == "half" and not np.isnan(r["sharpness"]) for r in rows)
    assert found["paired_mean"] == pytest.approx(0.5)
    assert found["paired_low"] == pytest.approx(0.5)


def test_psnr_is_pooled_as_squared_error():
    def pooled(*values):
        rows = [{"variant": "v", "prompt": "p", "seed": i, "psnr": x} for i, x in enumerate(values)]
        return summarise(rows, "v", ["psnr"])[0]

    assert pooled(10, 20)["mean"] == pytest.approx(-10 * np.log10((0.1 + 0.01) / 2))
    assert pooled(np.inf, 20)["mean"] == pytest.approx(20 + 10 * np.log10(2))
    same = pooled(np.inf, np.inf)
    assert (same["mean"], same["low"], same["high"]) == (np.inf, np.inf, np.inf)
    some = pooled(np.inf, 20, 25, 30)
    assert 20 < some["low"] < some["mean"] < some["high"]


def test_few_and_constant_values_have_no_width():
    rows = [{"variant": "v", "prompt": "p", "seed": i, "a": 0.1, "b": np.nan, "c": np.nan} for i in range(7)]
    rows[0]["c"] = 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant, none, one = summarise(rows, "v", ["a", "b", "c"])
    assert [constant[k] for k in ("n", "mean", "low", "high")] == [7, pytest.approx(0.1), 0.1, 0.1]
    assert none["n"] == 0
    assert np.isnan([none[k] for k in ("mean", "low", "high")]).all()
    assert (one["n"], one["mean"]) == (1, 3)
    assert np.isnan([one["low"], one["high"]]).all()


def test_a_summary_depends_on_its_own_values_only():
    rows = cells(seed=1, seeds=20)
    for i, row in enumerate(rows):
        row |= {f"m{k}": np.sin(i * (k + 1)) for k in range(30)}
    names = ["sharpness", "psnr", "ssim", *(f"m{k}" for k in range(30))]
    whole = summarise(rows, "baseline", names)
    assert to_csv(whole) == to_csv(summarise(rows, "baseline", names))
    for name in ("ssim", "m29"):
        alone = summarise([r for r in rows if r["variant"] in ("baseline", "half")], "baseline", [name])
        assert to_csv([entry(whole, "half", name)]) == to_csv([entry(alone, "half", name)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(variant="half"), "variant 'half' has prompt 'a' with seed 0 twice"),
        (
            lambda rows: rows[0].update(ssim=np.inf),
            "ssim of variant 'baseline', seed 0 is inf; only psnr may be infinite",
        ),
        (lambda rows: [row.pop("ssim") for row in rows], "metrics: 'ssim' is in none of the rows"),
        (lambda rows: [row.update(variant="x") for row in rows[:24]], "baseline='baseline': not in the rows"),
    ],
)
def test_invalid_rows_are_rejected(change, message):
    rows = cells()
    change(rows)
    with pytest.raises(ValueError, match=message):
        summarise(rows, "baseline", ["ssim"])


def test_csv_has_a_line_per_variant_and_metric():
    rows = [
        {"variant": v, "prompt": "p", "seed": s, "ssim": 1 / 3, "psnr": np.inf, "word": s + k}
        for k, v in enumerate(("baseline", 'a, "b"'))
        for s in (0.0, 1.0)
    ]
    text = to_csv(summarise(rows, "baseline", ["ssim", "psnr", "word"]))
    assert text.startswith(
        "variant,metric,n,mean,low,high,paired_mean,paired_low,paired_high,paired_n,median\n"
        "baseline,ssim,2,0.3333333333,0.3333333333,0.3333333333,,,,0,0.3333333333\n"
        "baseline,psnr,2,inf,inf,inf,,,,0,inf\n"
        "baseline,word,2,0.5,0,1,,,,0,0.5\n"
    )
    assert list(csv.reader(io.StringIO(text)))[-1] == [
        'a, "b"',
        "word",
        "2",
        "1.5",
        "1",
        "2",
        "1",
        "1",
        "1",
        "2",
        "1.5",
    ]


def printed(made, width=100):
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width).print(made)
    return text.getvalue().splitlines()


def test_table_has_the_controls_below_a_rule_and_fits():
    rows = cells(variants=("another seed", "baseline", "half", "noise floor", "quite a long name of a variant"))
    for row in rows:
        row |= {"word": 0.5, "sawtooth": row["ssim"] / 10, "colour_shift": 3 + row["ssim"], "thing_moved": np.nan}
    metrics = ["thing_moved", "colour_shift", "sawtooth", "word", "ssim", "psnr", "sharpness"]
    summary = summarise(rows, "baseline", metrics)
    lines = printed(table(summary))
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in "".join(lines)
    starts = [line.split()[0] for line in lines if re.match(r" ?\w", line)]
    assert starts == ["variant", "baseline", "half", "quite", "noise", "another", "mean", "Δ:", "psnr:"]
    rules = [i for i, line in enumerate(lines) if "─" in line]
    assert [i for i, line in enumerate(lines) if line.startswith(" noise floor")] == [rules[2] + 1]
    heading = lines[rules[0] + 1]
    assert heading.index("psnr (dB, pooled)") < heading.index("ssim") < heading.index("word")
    assert "thing_moved" not in heading  # it has no values
    half = next(line for line in lines if line.startswith(" half"))
    ssim = entry(summary, "half", "ssim")
    assert f"{ssim['mean']:.3f} [{ssim['low']:.3f}, {ssim['high']:.3f}]" in half
    assert "…" not in half


NAMES = ["word", "psnr", "sharpness", "thing_row"]


def uneven():
    """A noise floor with 2 of 8 cells that changes nothing, and a variant that changes every cell."""
    words, rows = [1, 1, 1, 0, 1, 0, 0, 1], []
    for seed, word in enumerate(words):
        base = {"prompt": "p", "seed": seed, "word": word, "psnr": np.inf, "sharpness": 0.1, "thing_row": np.nan}
        rows.append({"variant": "baseline", **base})
        rows.append({"variant": "half", **base, "word": 0, "psnr": 48.5, "sharpness": 0.2})
        if seed in (3, 4):
            rows.append({"variant": "noise floor", **base, "psnr": 60.0, "sharpness": 0.1 - 1.6e-5})
    rows[0]["thing_row"] = 7.0
    return sorted(rows, key=lambda row: ["baseline", "half", "noise floor"].index(row["variant"]))


def test_effects_compare_at_equal_prompt_and_seed():
    summary = summarise(uneven(), "baseline", NAMES)
    found = {entry[:2]: entry for entry in effects(summary, "baseline")}
    floor = found["noise floor", "word"]
    assert entry(summary, "noise floor", "word")["mean"] == 0.5  # its own two cells, no effect
    assert (floor.value, floor.difference, floor.n, floor.own_mean) == (0.625, 0, 2, 0.5)
    half = found["half", "word"]
    assert (half.value, half.difference, half.n) == (0, -0.625, 8)
    assert half.low == pytest.approx(0.625 + half.difference_low)
    assert half.high == pytest.approx(0.625 + half.difference_high)
    baseline = found["baseline", "word"]
    assert (baseline.value, baseline.n) == (0.625, 8)
    assert np.isnan(baseline.difference)
    psnr = found["half", "psnr"]
    assert (psnr.value, psnr.n) == (pytest.approx(48.5), 8)
    assert np.isnan(psnr.difference)


def test_missing_values_have_a_reason():
    found = {entry[:2]: entry for entry in effects(summarise(uneven(), "baseline", NAMES), "baseline")}
    assert found["half", "thing_row"].missing == "no object found"
    assert found["half", "thing_row"].n == 0
    assert np.isnan(found["half", "thing_row"].value)
    assert found["half", "word"].missing == ""
    for entry in METRICS.values():
        assert entry.absent or entry.needs != "scenes"


def test_median_stands_next_to_the_pooled_mean():
    rows = [
        {"variant": "v", "prompt": "p", "seed": i, "psnr": x, "ssim": x} for i, x in enumerate((48.5, 22, 54.9, 54.4))
    ]
    psnr, ssim = summarise(rows, "v", ["psnr", "ssim"])
    assert psnr["mean"] == pytest.approx(28.0, abs=0.05)
    assert psnr["median"] == pytest.approx(51.45)
    assert ssim["median"] == pytest.approx(51.45)
    assert METRICS["psnr"].pooled == "squared error"
    assert [name for name, entry in METRICS.items() if entry.pooled] == ["psnr"]


def test_table_shows_differences_and_counts():
    summary = summarise(uneven(), "baseline", NAMES)
    text = printed(table(summary, metrics=["word", "psnr", "sharpness", "thing_row"], width=140), width=140)
    lines = {line.split("  ")[0].strip(): (line, after) for line, after in itertools.pairwise(text)}
    floor, half = lines["noise floor"], lines["half"]
    assert re.match(r" noise floor +2 +0\.625 ", floor[0])
    assert "Δ +0.000 " in floor[1]  # exactly 0
    assert "Δ -1.6e-05 " in floor[1]
    assert re.match(r" half +8 +0\.000 ", half[0])
    assert "Δ -0.625 [" in half[1]
    assert "no object found" in half[0]
    assert "7.00, n = 1" in lines["baseline"][0]
    assert any("psnr: of the mean squared error over cells (pooled)" in line for line in text)
    assert any("median 48.5" in line for line in text)


@pytest.mark.parametrize(
    ("value", "digits", "signed", "text"),
    [
        (0.0, 3, True, "+0.000"),
        (-0.0, 2, False, "0.00"),
        (-1.6e-5, 3, True, "-1.6e-05"),
        (1.6e-5, 3, True, "+1.6e-05"),
        (4.9e-4, 3, False, "4.9e-04"),
        (5.1e-4, 3, False, "0.001"),
        (-0.125, 3, True, "-0.125"),
        (np.inf, 1, False, "∞"),
        (-np.inf, 1, True, "-∞"),
        (np.nan, 1, True, ""),
    ],
)
def test_numbers_as_text(value, digits, signed, text):
    assert number_text(value, digits, signed) == text


def test_intervals_as_text():
    assert interval_text(-2e-5, 3e-5, 3, signed=True) == "[-2.0e-05, +3.0e-05]"
    assert interval_text(0.1, 0.25, 2) == "[0.10, 0.25]"
    assert interval_text(0.1, 0.1, 2) == interval_text(np.nan, np.nan, 2) == ""


def test_a_summary_of_release_0_1_is_completed():
    summary = summarise(uneven(), "baseline", NAMES)
    old = [{key: value for key, value in row.items() if key not in ("paired_n", "median")} for row in summary]
    np.testing.assert_equal(complete(old, uneven, "baseline"), summary)
    np.testing.assert_equal(complete(summary, list, "baseline"), summary)


def test_table_of_chosen_columns():
    rows = cells(variants=("baseline", "half"))
    summary = summarise(rows, "baseline", ["sharpness", "psnr"])
    lines = printed(table(summary, metrics=["sharpness"]))
    assert any("sharpness (1/px)" in line for line in lines)
    assert not any("psnr" in line for line in lines)
    assert sum("─" in line for line in lines) == 3  # no rule without controls
    with pytest.raises(ValueError, match="metrics: no 'ssim' in the summary"):
        table(summary, metrics=["ssim"])


@pytest.mark.parametrize(("rows", "cells"), [(3, 8), (2, 300), (1, 9000)])
def test_intervals_are_those_of_scipy(rows, cells):
    """To the bit. Only the draws of a whole batch and of the last one differ in number."""
    from scipy.stats import bootstrap

    rng = np.random.default_rng(rows)
    for samples in (rng.normal(size=(rows, cells)), (rng.random((rows, cells)) < 0.5).astype(float)):
        expected = bootstrap(
            (samples,),
            np.mean,
            axis=1,
            n_resamples=summaries.RESAMPLES,
            batch=max(1, 200_000 // cells),
            vectorized=True,
            confidence_level=0.95,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = summaries._bounds(samples)
        assert np.array_equal(low, expected.low)
        assert np.array_equal(high, expected.high)


def test_squared_error_is_that_of_scikit_image():
    """Bit by bit: psnr and rmse of stores that exist stay as they are."""
    from skimage.metrics import mean_squared_error

    g = np.random.default_rng(0)
    for shape in ((64, 64, 3), (37, 53, 3), (7, 7, 3)):
        a, b = (g.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
        assert squared_error(Sample(a), Sample(b)) == mean_squared_error(a, b)
