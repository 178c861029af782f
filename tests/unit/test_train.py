"""The trainer's parts: what a step trains on, what is kept between two sittings, what a user can get wrong."""

import json

import numpy as np
import pytest
import torch

from fluxlab import scenes
from fluxlab.checkpoints import CheckpointError
from fluxlab.checkpoints.manifest import verify_manifest, write_manifest
from fluxlab.compose import compose
from fluxlab.config import config_folder
from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams
from fluxlab.sampling import with_negative
from fluxlab.train import main
from fluxlab.training.guidance import guided
from fluxlab.training.nets import Nets, new_nets, table_for, tokens_of
from fluxlab.training.pool import NOISE_WORD, build_pool, captions, draw_chunk, draw_scenes, token_weights
from fluxlab.training.recipe import Recipe, check
from fluxlab.training.seeds import numpy_rng, torch_rng
from fluxlab.training.state import (
    load_optimizers,
    load_parameters,
    optimizer_tensors,
    parameter_tensors,
    read_tensors,
    write_tensors,
)
from fluxlab.training.text import PAD, UNK, text_encoders, token_ids
from fluxlab.training.transformer import Batches, Phase, flow_loss, learning_rate


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return text_encoders(length=24, t5_width=32, clip_width=32, layers=1)


@pytest.fixture(scope="module")
def pools():
    model = AutoEncoder(AutoEncoderParams(64, 3, 32, 3, (1, 1), 0, 4, 1.0, 0.0)).eval()
    return [build_pool(model, size, 6, seed=0, sign_weight=3.0, thing_weight=2.0) for size in ((48, 48), (48, 64))]


def batches(pools, text, **changes):
    settings = {"seed": 0, "length": 24, "unknown": 0.0, "t_mean": {0: 0.0}, "full_share": 0.7, "t_std": 1.0} | changes
    return Batches(pools, [Phase(0, (48, 48), 0.5, 4), Phase(9, (48, 64), 1.0, 3)], text, **settings)


def test_a_seed_a_purpose_and_a_step_settle_a_draw():
    draws = [numpy_rng(0, "a", 0).random(), numpy_rng(0, "a", 1).random(), numpy_rng(0, "b", 0).random()]
    assert draws[0] == numpy_rng(0, "a", 0).random()
    assert len({*draws, numpy_rng(1, "a", 0).random()}) == 4
    assert torch.equal(torch.rand(3, generator=torch_rng(0, "a", 0)), torch.rand(3, generator=torch_rng(0, "a", 0)))


def test_learning_rate_rises_stays_and_falls():
    share = [learning_rate(step, 100, 10, 0.3) for step in range(101)]
    assert share[0] == pytest.approx(0.1)
    assert share[9:71] == [1.0] * 62
    assert share[85] == pytest.approx(0.5)
    assert share[100] == 0.02
    assert share[:60] == [learning_rate(step, 200, 10, 0.3) for step in range(60)]  # the end may be settled later


def test_token_weights_cover_the_board_and_the_things_and_nothing_else():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = scenes.sample_scene(rng, (48, 64))
        weights = token_weights(scene, sign=3.0, thing=2.0).reshape(12, 16)
        assert (weights == 3).any() == (scene.sign is not None)
        assert (weights == 2).any()
        most = 192
        if scene.sign:
            top, left, bottom, right = scene.sign.box
            assert weights[top // 4, left // 4] == weights[(bottom - 1) // 4, (right - 1) // 4] == 3
            most += 2 * ((bottom - top) // 4 + 2) * ((right - left) // 4 + 2)
        for thing in scene.things:
            assert weights[int(thing.row) // 4, int(thing.col) // 4] >= 2
            most += (thing.size // 4 + 2) ** 2
        assert weights.sum() <= most


def test_unknown_words_never_come_between_the_sign_s_words():
    rng = np.random.default_rng(0)
    drawn = [scenes.sample_scene(rng) for _ in range(60)]
    texts = captions(drawn, np.random.default_rng(1), 1.0, 0.7)
    assert all(not text or NOISE_WORD in text for text in texts)
    for scene, text in zip(drawn, texts, strict=True):
        if text and scene.sign:
            assert text.lower().endswith("says " + " ".join(scene.sign.words))


def test_tokenizers_know_every_word_and_one_mark_for_all_others(text):
    ids = token_ids(text.t5_tokenizer, [" ".join(scenes.VOCABULARY[:20]), 'A  "Red" fox.', "zebra"], 24)
    assert ids.shape == (3, 24)
    assert UNK not in ids[0]
    assert ids[1].tolist() == token_ids(text.t5_tokenizer, ["a red fox"], 24)[0].tolist()
    assert ids[2, 0] == UNK
    assert (ids[2, 2:] == PAD).all()
    pooled = [text.clip(token_ids(text.clip_tokenizer, [p], 24)).pooler_output for p in ("a fox", "a red fox")]
    assert pooled[0].shape == (1, 32)
    assert not torch.allclose(*pooled)


def test_order_of_words_reaches_the_transformer(text):
    """Text ids are all zero, so that T5 alone can tell "hello world" from "world hello"."""
    one, two = (text.t5(token_ids(text.t5_tokenizer, [p], 24))[0] for p in ("hello world", "world hello"))
    assert (one[0, 0] - two[0, 1]).abs().max() > 1e-4  # rounding is 1e-6


def test_batches_are_a_function_of_seed_and_step(pools, text):
    make = batches(pools, text, unknown=0.5)
    for step in (0, 3, 12):
        (one, a), (two, b) = make[step], batches(pools, text, unknown=0.5)[step]
        assert one == two
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(make[12][1]["noise"], make[13][1]["noise"])
    assert {make[step][0] for step in range(9)} == {(48, 48), (48, 64)}
    assert make[9][1]["x0"].shape == (3, 192, 16)


def test_batches_and_pools_do_not_depend_on_the_number_of_workers(pools, text):
    make = batches(pools, text, unknown=0.5)
    drawn = [list(make.stream(range(3), "cpu", workers)) for workers in (0, 2)]
    for (pool_0, batch_0), (pool_2, batch_2) in zip(*drawn, strict=True):
        assert pool_0 is pool_2
        assert all(torch.equal(batch_0[key], batch_2[key]) for key in batch_0)
    alone, shared = ([chunk for chunk, _ in draw_scenes(0, (48, 48), 3, 0.5, False, workers)] for workers in (0, 2))
    assert alone == shared


def test_only_the_d_of_signs_differs_with_small_d():
    (now, images), (before, others) = (draw_chunk(0, (64, 64), 0, 60, 1.0, small_d) for small_d in (False, True))
    assert now == before
    for scene, image, other in zip(now, images, others, strict=True):
        pixels = scenes.text_mask(scene.sign.words) ^ scenes.text_mask(scene.sign.words, small_d=True)
        columns = [n for word in scene.sign.words for n, letter in enumerate(word) if letter == "d"]
        assert bool(columns) == pixels.any()
        assert {int(n) // 4 for n in np.nonzero(pixels)[1]} == set(columns)
        assert (image != other).any(-1).sum() == pixels.sum()
    small = "\n".join("".join(".#"[int(v)] for v in row) for row in scenes.text_mask(("d",), small_d=True))
    assert small == "..#\n..#\n###\n#.#\n#.#\n#.#\n###"


def test_two_words_sets_the_share_of_signs_with_two_words():
    def share(two_words):
        scenes_drawn, _ = draw_chunk(0, (64, 64), 0, 400, two_words, False)
        return np.mean([bool(scene.sign) and len(scene.sign.words) == 2 for scene in scenes_drawn])

    assert share(0.0) == pytest.approx(0.25, abs=0.07)
    assert share(0.6) == pytest.approx(0.6 + 0.4 * 0.25, abs=0.07)


def test_times_follow_their_mean(pools, text):
    make = batches(pools, text, t_mean={0: 0.0, 100: 1.0})
    early, late = (torch.cat([make[start + i][1]["t"] for i in range(60)]) for start in (0, 100))
    assert early.logit().mean() == pytest.approx(0.0, abs=0.1)
    assert late.logit().mean() == pytest.approx(1.0, abs=0.1)


def test_flow_loss_of_the_true_velocity_is_zero(pools, text):
    _, batch = batches(pools, text)[0]

    def true(x, t, tokens, table):
        return batch["noise"] - batch["x0"]

    weighted, plain = flow_loss(true, batch, None)
    assert weighted == plain == 0


def test_what_guidance_teaches_is_what_true_cfg_does(pools, text):
    torch.manual_seed(0)
    params = FluxParams(
        in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=32, hidden_size=64, mlp_ratio=4.0, num_heads=1,
        depth=1, depth_single_blocks=1, axes_dim=(8, 28, 28), theta=10000, qkv_bias=True, guidance_embed=False,
    )  # fmt: skip
    small = text_encoders(length=24, t5_width=32, clip_width=32, layers=1)
    nets = Nets(Flux(params), small).eval()
    size, batch = batches(pools, small)[0]
    table = table_for(params, 24, (size[0] // 4, size[1] // 4))
    empty = tokens_of(small, [""], 24)
    found = guided(nets, batch["noise"], batch, empty, table, 3.0)

    def velocity(tokens):
        return lambda x, t: nets(x, batch["t"], tokens, table)

    count = len(batch["t"])
    with_text = velocity(batch)
    without = velocity({key: ids.repeat(count, 1) for key, ids in empty.items()})
    with torch.no_grad():
        expected = with_negative(with_text, without, 3.0)(batch["noise"], 0.5)
        plain = with_text(batch["noise"], 0.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_tables_stay_exact_under_autocast():
    recipe = Recipe(name="x", hidden_size=64, depth=1, depth_single_blocks=1)
    params = new_nets(recipe)[0].transformer.params
    table = table_for(params, 24, (16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        again = table_for(params, 24, (16, 16))
    assert table.cos.dtype == torch.float32
    assert torch.equal(table.cos, again.cos)


def test_state_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    net, twin = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def both(module):
        return [torch.optim.Muon([module.weight], lr=0.1), torch.optim.AdamW([module.bias], lr=0.1)]

    optimizers = both(net)

    def step(module, chosen):
        module(torch.ones(2, 4)).square().sum().backward()
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()

    step(net, optimizers)
    write_tensors(tmp_path / "s.safetensors", parameter_tensors("net.", net) | optimizer_tensors(optimizers), {"n": 1})
    tensors, notes = read_tensors(tmp_path / "s.safetensors")
    assert notes == {"n": 1}
    load_parameters("net.", twin, tensors)
    others = both(twin)
    load_optimizers(others, tensors)
    step(net, optimizers)
    step(twin, others)
    assert torch.equal(net.weight, twin.weight)
    assert torch.equal(net.bias, twin.bias)
    with pytest.raises(ValueError, match="another recipe"):
        load_parameters("net.", torch.nn.Linear(4, 5), tensors)


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "state.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match=r"state\.safetensors.*delete it"):
        read_tensors(tmp_path / "state.safetensors")


def test_manifest_names_a_flipped_bit_and_a_lost_file(tmp_path):
    (tmp_path / "vae").mkdir()
    weights = tmp_path / "vae" / "w.safetensors"
    weights.write_bytes(bytes(range(200)))
    (tmp_path / "model_index.json").write_text("{}")
    verify_manifest(tmp_path)  # none yet: nothing to hold it to
    write_manifest(tmp_path)
    (tmp_path / "README.md").write_text("not weighed")
    verify_manifest(tmp_path)
    flipped = bytearray(weights.read_bytes())
    flipped[100] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"vae/w\.safetensors"):
        verify_manifest(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"vae/w\.safetensors"):
        verify_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize("name", ["tiny", "small", "tiny2"])
def test_recipes_compose_and_open_with_their_command(name):
    from fluxlab.config import config_folder

    recipe = compose("train_schema", Recipe, "train_schema", [f"+train={name}"])
    check(recipe)
    assert recipe.name == name
    assert f"python -m fluxlab.train +train={name}" in (config_folder() / "train" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("hidden_size", 100),
        ("t5_width", 40),
        ("tracker", "tensorboard"),
        ("native_share", 0.0),
        ("guidance_batch", 0),
        ("guidance_steps", -1),
        ("t_mean", {5: 0.0}),
        ("family", "flux3"),
        ("hints", 1.0),
        ("hint_steps", 0),
    ],
)
def test_a_recipe_that_makes_no_sense_names_its_key(key, value):
    with pytest.raises(ValueError, match=key):
        check(Recipe(name="x", **{key: value}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["+train=nope"], "nope"), (["+train=tiny", "stepz=3"], "stepz"), (["+train=tiny", "steps=soon"], "steps")],
)
def test_errors_of_use_take_at_most_three_lines_and_exit_2(arguments, said, capsys):
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert 1 <= len(errors.splitlines()) <= 3


def test_the_usage_has_a_column_of_names(capsys):
    assert main([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {line.split()[0] for line in lines} == {file.stem for file in (config_folder() / "train").glob("*.yaml")}
