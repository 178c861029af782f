"""The trainer's parts for the FLUX.2 family: text, latents in FLUX.2's form, and what a teacher teaches."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch

from fluxlab.errors import UserError
from fluxlab.families.flux1 import FAMILY as FLUX1
from fluxlab.families.flux2 import FAMILY as FLUX2
from fluxlab.model import AutoEncoder, AutoEncoder2, AutoEncoderParams
from fluxlab.scenes import VOCABULARY, sample_scene
from fluxlab.training import text2
from fluxlab.training.flux2 import as_own_autoencoder as as_flux2
from fluxlab.training.nets import Nets, new_nets, table_for, text_with, tokenizers_of, tokens_of
from fluxlab.training.pool import Pool
from fluxlab.training.recipe import AutoencoderRecipe, Recipe, check
from fluxlab.training.stages import hint_weight
from fluxlab.training.teacher import Reader, check_hints, taught_loss, with_states
from fluxlab.training.transformer import Batches, Phase

SMALL = {
    "family": "flux2", "hidden_size": 64, "depth": 1, "depth_single_blocks": 1, "lm_width": 32, "text_layers": 3,
    "autoencoder": AutoencoderRecipe(z_channels=4),
}  # fmt: skip
LENGTH = 24


def recipe(**changes) -> Recipe:
    return Recipe(name="x", **{**SMALL, **changes})


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return text2.language_model(length=LENGTH, width=32, layers=3)


def random_nets(seed: int, **changes) -> Nets:
    """Networks whose last layer and modulations are not zero."""
    nets, _ = new_nets(recipe(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in nets.transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return nets


class Taught:
    """A teacher without files: networks of the same family."""

    def __init__(self, nets: Nets):
        self.nets, self.params = nets, nets.transformer.params

    @torch.no_grad()
    def __call__(self, x, batch, table):
        return with_states(self.nets, x, batch["t"], batch, table)


def batch_of(text, count: int = 2, grid: tuple[int, int] = (3, 4)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, grid[0] * grid[1], 16)
    parts = {name: torch.randn(shape, generator=generator) for name in ("x0", "noise")}
    parts |= {"t": torch.tensor([0.3, 0.8][:count]), "weights": torch.ones(shape[:2])}
    return parts | tokens_of(text, ["a red fox", "A blue ring above a green square"][:count], LENGTH)


def test_text_in_training_is_the_text_that_sampling_reads(text):
    prompts = ["a red fox", "", "A cat holding a sign that says hello world", "a zebra"]
    tokens = tokens_of(text, prompts, LENGTH)
    assert tokens["lm_ids"].shape == (4, LENGTH)
    states = text.encoder.get_decoder()(
        input_ids=tokens["lm_ids"], attention_mask=tokens["lm_mask"], output_hidden_states=True, use_cache=False
    ).hidden_states
    joined = torch.cat([states[i] for i in (1, 2, 3)], dim=-1)
    for prompt, own in zip(prompts, joined, strict=True):
        (sampled,) = text.encode(prompt, LENGTH, unknown_words="allow")
        torch.testing.assert_close(own, sampled[0], atol=2e-6, rtol=1e-5)


def test_the_tokenizer_knows_the_scenes_words_and_the_template_s_marks(text):
    assert text.vocabulary == tuple(sorted(VOCABULARY))
    ids = text.tokenizer(text.template('A  "Red" fox.')).input_ids
    assert text.tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "a", "red", "fox", "<|end|>", "<|assistant|>"]
    assert [span for span in text.spans("a red fox", LENGTH) if span[1]] == [(0, 1), (2, 5), (6, 9)]
    with pytest.raises(UserError, match=r"(?s)zebra.*It knows a, above"):
        text.check(["a zebra"], LENGTH)
    with pytest.raises(UserError, match=r"<\|user\|>"):
        text.check(["a <|user|> fox"], LENGTH)
    with pytest.raises(UserError, match="max_sequence_length=8"):
        text.check(["a cat holding a sign that says jazz"], 8)


def test_the_states_taken_are_written_with_the_model(text, tmp_path):
    from fluxlab.checkpoints import CheckpointError
    from fluxlab.checkpoints.text2 import load_language_model, load_language_tokenizer, open_language_model

    text.encoder.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    opened = open_language_model(tmp_path)
    model = load_language_model(opened, torch.float32, torch.device("cpu"))
    again = type(text)(load_language_tokenizer(tmp_path), model, opened.kind)
    assert again.layers == text.layers == (1, 2, 3)
    assert torch.equal(again.encode("a red fox", LENGTH)[0], text.encode("a red fox", LENGTH)[0])
    file = tmp_path / "text_encoder" / "config.json"
    written = file.read_text()
    for wrong in ('"x"', "[1, 2]", "[1, 2, 4]", "[-1, 2, 3]"):
        file.write_text(written.replace('"flux2_states": [\n    1,\n    2,\n    3\n  ]', f'"flux2_states": {wrong}'))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_language_model(tmp_path)


def test_a_tokenizer_elsewhere_is_part_of_what_a_model_is(text, tmp_path):
    from fluxlab.checkpoints import CheckpointError
    from fluxlab.checkpoints.identity import fingerprint
    from fluxlab.config import ModelRow

    text.encoder.save_pretrained(tmp_path / "model" / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "other" / "tokenizer")
    row = ModelRow("x", str(tmp_path / "model"), tokenizers=str(tmp_path / "other"))
    before = fingerprint(row)
    template = tmp_path / "other" / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert fingerprint(row) != before
    with pytest.raises(CheckpointError, match=r"missing/tokenizer: no such folder"):
        fingerprint(ModelRow("x", str(tmp_path / "model"), tokenizers=str(tmp_path / "missing")))


def test_latents_in_flux2_s_form_are_those_of_flux1_s():
    torch.manual_seed(0)
    one = AutoEncoder(AutoEncoderParams(64, 3, 32, 3, (1, 1), 0, 4, 0.7, 0.2)).eval().requires_grad_(False)
    two = as_flux2(one)
    assert isinstance(two, AutoEncoder2)
    assert as_flux2(two) is two
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    packed = FLUX1.pack(one.encode(pixels)), FLUX2.pack(two.encode(pixels))
    torch.testing.assert_close(*packed, atol=1e-5, rtol=1e-5)
    images = one.decode(FLUX1.unpack(packed[0], 4, 6)), two.decode(FLUX2.unpack(packed[1], 4, 6))
    torch.testing.assert_close(*images, atol=1e-5, rtol=1e-5)


def test_text_ids_count_on_the_last_axis():
    nets, text = new_nets(recipe())
    p = nets.transformer.params
    ids = torch.zeros(LENGTH + 12, 4)
    ids[:LENGTH, 3] = torch.arange(LENGTH)
    ids[LENGTH:, 1:3] = torch.cartesian_prod(torch.arange(3), torch.arange(4)).float()
    x, tokens = torch.randn(1, 12, 16), tokens_of(text, ["a red fox"], LENGTH)
    nets = random_nets(0)
    t = torch.tensor([0.5])
    found = nets(x, t, tokens, table_for(p, LENGTH, (3, 4)))
    (txt,) = text_with(text, nets).encode("a red fox", LENGTH)
    expected = nets.transformer(x, ids[None, LENGTH:], txt.clone(), ids[None, :LENGTH], t)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_student_that_is_its_teacher_has_no_loss_and_another_has(text):
    teacher = Taught(random_nets(0))
    batch = batch_of(text) | {"hint": torch.tensor(1.0)}
    table = table_for(teacher.params, LENGTH, (3, 4))
    loss, plain = taught_loss(teacher.nets, teacher, batch, table, table)
    assert loss < 1e-10  # gradients choose other products than none
    assert plain < 1e-10
    other = random_nets(1)
    hinted, plain = taught_loss(other, teacher, batch, table, table)
    del batch["hint"]
    unhinted, same = taught_loss(other, teacher, batch, table, table)
    assert same == plain > 0
    assert unhinted.item() == pytest.approx(plain.item(), rel=1e-5)  # all weights are 1
    assert hinted > unhinted


def test_the_distance_of_hidden_states_is_in_spreads_of_the_teacher_s(text):
    teacher, student = Taught(random_nets(0)), random_nets(1)
    batch = batch_of(text) | {"hint": torch.tensor(0.5)}
    batch["weights"][:, :5] = 3
    table = table_for(teacher.params, LENGTH, (3, 4))
    x = batch["x0"] + batch["t"][:, None, None] * (batch["noise"] - batch["x0"])
    (v, ours), (wanted, theirs) = (with_states(n, x, batch["t"], batch, table) for n in (student, teacher.nets))
    assert len(ours) == 2
    weights = batch["weights"] / batch["weights"].sum()
    expected = (weights * (v - wanted).square().mean(-1)).sum()
    for own, target in zip(ours, theirs, strict=True):
        spread = target.flatten(0, 1).var(dim=0, unbiased=False)
        distance = (own - target).square() / (spread + 0.01 * spread.mean())
        expected = expected + 0.5 / 2 * (weights * distance.mean(-1)).sum()
    found, _ = taught_loss(student, teacher, batch, table, table)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_attention_of_a_taught_step_is_attention(text):
    """In bf16 with gradients on a CPU it is computed by two products instead of flash."""
    nets = random_nets(0)
    batch, table = batch_of(text), table_for(nets.transformer.params, LENGTH, (3, 4))
    exact = nets(batch["x0"], batch["t"], batch, table).detach()
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = with_states(nets, batch["x0"], batch["t"], batch, table)
        flash = nets(batch["x0"], batch["t"], batch, table).float()
    assert fast.requires_grad
    assert not torch.equal(fast, flash)
    assert (fast - exact).abs().max() < 3 * (flash - exact).abs().max()


def test_hints_fade_and_batches_can_be_sent_to_workers(text):
    given = recipe(hints=2.0, hint_steps=10)
    assert [hint_weight(given, step) for step in (0, 5, 10, 99)] == [2, 1, 0, 0]
    pool = Pool((12, 16), [sample_scene(np.random.default_rng(0), (48, 64))], torch.zeros(1, 12, 16), torch.ones(1, 12))
    settings = {"seed": 0, "length": LENGTH, "unknown": 0.0, "t_mean": {0: 0.0}, "full_share": 1.0, "t_std": 1.0}
    hints, text = partial(hint_weight, given), tokenizers_of(text)
    batches = Batches([pool], [Phase(0, (12, 16), 1.0, 2)], text, **settings, teacher=Reader(text, LENGTH), hints=hints)
    again = pickle.loads(pickle.dumps(batches))  # as workers that are not forked get them
    for step, hint in ((0, 2.0), (5, 1.0), (10, None)):
        (_, one), (_, two) = batches[step], again[step]
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert torch.equal(one["teacher_lm_ids"], one["lm_ids"])
        assert (one["hint"].item() if "hint" in one else None) == hint


def test_hidden_states_need_the_same_blocks():
    teacher, student = Taught(random_nets(0)), random_nets(1, depth=2)
    with pytest.raises(UserError, match=r"hints: teacher=tiny has .*\(64, 1, 1\)"):
        check_hints(student, teacher, "tiny")


def test_flux2_reads_three_states():
    with pytest.raises(UserError, match="text_layers=2"):
        check(recipe(text_layers=2))
