"""The transformer: sizes, ids, rotary tables and masks. All ways to run it compute the same output."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config as jaxtyping_config

from fluxlab.model import TRANSFORMERS, Flux, FluxParams, attention, rotary_table
from fluxlab.model.attention import attend
from fluxlab.model.norm_rotate import norm_and_rotate
from fluxlab.model.rope import Rotary, apply_rotary, apply_rotary_
from fluxlab.model.torch_ops import ONEDNN_DTYPES

PARAMS = FluxParams(8, 6, 12, 10, 32, 4.0, 2, 2, 2, (4, 6, 6), 10000, True, True)
BATCH, TEXT, IMAGE = 4, 5, 12
BLOCKS = PARAMS.depth + PARAMS.depth_single_blocks


@pytest.fixture(scope="module")
def flux() -> Flux:
    torch.manual_seed(0)
    model = Flux(PARAMS).eval()
    with torch.no_grad():  # weights large enough for every part to matter
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.25 if weight.ndim > 1 else 0.1)
            if name.endswith("norm.scale"):
                weight.add_(1.5)
    return model


@pytest.fixture
def unchecked():
    """Disable the shape checks of the tests, so that the code runs as it does for a user."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def inputs(batch: int = BATCH, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(batch, *shape, generator=g, dtype=torch.float64)  # noqa: E731
    rows = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(4.0), indexing="ij"), -1)
    ids = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "img": draw(IMAGE, 8).to(dtype),
        "img_ids": (rows.reshape(1, IMAGE, 3) + draw(IMAGE, 3)).to(ids),
        "txt": draw(TEXT, 10).to(dtype),
        "txt_ids": draw(TEXT, 3).to(ids),
        "timesteps": torch.linspace(1, 0.2, batch, dtype=ids),
        "y": draw(12).to(dtype),
        "guidance": torch.linspace(1, 4, batch, dtype=ids),
    }


def joint_ids(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat((x["txt_ids"], x["img_ids"]), dim=1)


def with_tables(x, rotary, **more):
    return {**x, "img_ids": None, "txt_ids": None, "rotary": rotary, **more}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest error in units of b's standard deviation."""
    return ((a.double() - b.double()).abs().max() / b.double().std()).item()


@pytest.mark.parametrize(("name", "count", "tensors"), [("dev", 11_901_408_320, 780), ("schnell", 11_891_178_560, 776)])
def test_sizes_of_flux1(name, count, tensors):
    with torch.device("meta"):
        state = Flux(TRANSFORMERS[name]).state_dict()
    assert (sum(t.numel() for t in state.values()), len(state)) == (count, tensors)


@pytest.mark.parametrize("name", ["img_ids", "txt_ids"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda ids: ids[0],
        lambda ids: ids.bfloat16(),
        lambda ids: ids.long(),
        lambda ids: ids.double(),
        lambda ids: ids[:, :-1],
        lambda ids: ids[..., :2],
        lambda ids: ids[:3],
    ],
    ids=["2-D", "bf16", "integers", "fp64", "tokens", "axes", "batch"],
)
def test_wrong_ids_raise(flux, name, spoil, unchecked):
    x = inputs()
    with pytest.raises(ValueError, match=name) as error:
        flux(**{**x, name: spoil(x[name])})
    assert len(str(error.value).splitlines()) <= 3


def test_wrong_arguments_raise(flux, unchecked):
    x = inputs()
    table = rotary_table(joint_ids(x), PARAMS.axes_dim, PARAMS.theta)
    wrong = [
        ({**x, "guidance": None}, "guidance is missing"),
        ({**x, "img_ids": None}, "are needed"),
        ({**x, "rotary": table}, "pass one or the other"),
        (with_tables(x, [(table, table)] * 3), "3 pairs of tables, the model has 4 blocks"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            flux(**arguments)


@torch.inference_mode()
def test_positions_are_relative(flux):
    x = inputs()
    shift = torch.tensor([3.0, -7.25, 40.0])
    all_shifted = {**x, "img_ids": x["img_ids"] + shift, "txt_ids": x["txt_ids"] + shift}
    assert difference(flux(**all_shifted), flux(**x)) <= 1e-4
    assert difference(flux(**{**x, "img_ids": x["img_ids"] + shift}), flux(**x)) > 1e-2


@torch.inference_mode()
def test_batch_equals_one_at_a_time(flux):
    x = inputs()
    one_by_one = [flux(**{name: value[i : i + 1] for name, value in x.items()}) for i in range(BATCH)]
    assert difference(flux(**x), torch.cat(one_by_one)) <= 1e-5
    swapped = flux(**{**x, "img_ids": x["img_ids"].flip(0)})
    assert difference(swapped, flux(**x)) > 1e-2
    shared = flux(**{**x, "img_ids": x["img_ids"][:1], "txt_ids": x["txt_ids"][:1]})
    assert torch.equal(shared[0], flux(**x)[0])


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_tables_replace_ids(flux, grad):
    x = inputs()
    table = rotary_table(joint_ids(x), PARAMS.axes_dim, PARAMS.theta)
    other = rotary_table(joint_ids(x) * 1.7, PARAMS.axes_dim, PARAMS.theta)
    per_head = type(table)(*(part.expand(-1, PARAMS.num_heads, -1, -1).contiguous() for part in table))
    split = type(table)(*(torch.cat((a, b), dim=1) for a, b in zip(table, other, strict=True)))
    with torch.set_grad_enabled(grad):
        expected = flux(**x)
        for rotary in (table, [(table, table)] * BLOCKS, [(per_head, table)] * BLOCKS):
            assert torch.equal(flux(**with_tables(x, rotary)), expected)
        outputs = [expected, flux(**with_tables(x, other))]
        for pairs in ((other, table), (table, other), (split, split)):
            outputs += [flux(**with_tables(x, [pairs] * BLOCKS))]
        outputs += [flux(**with_tables(x, [(table, table)] * (BLOCKS - 1) + [(other, other)]))]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert difference(a, b) > 1e-3


@torch.inference_mode()
def test_masks(flux):
    x = inputs()
    mask = torch.rand(BATCH, 1, TEXT + IMAGE, TEXT + IMAGE, generator=torch.Generator().manual_seed(2)) > 0.3
    mask |= torch.eye(TEXT + IMAGE, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    assert torch.equal(flux(**x, mask=mask), flux(**x, mask=additive))
    assert difference(flux(**x, mask=mask), flux(**x)) > 1e-2
    assert difference(flux(**x, mask=torch.ones(1, 1, TEXT + IMAGE, TEXT + IMAGE) > 0), flux(**x)) <= 1e-5

    unseen = torch.ones(1, 1, 1, TEXT + IMAGE, dtype=torch.bool)
    unseen[..., TEXT - 1] = False
    changed = {**x, "txt": x["txt"].clone()}
    changed["txt"][:, TEXT - 1] += 5
    assert torch.equal(flux(**changed, mask=unseen), flux(**x, mask=unseen))
    assert difference(flux(**changed), flux(**x)) > 1e-2


@pytest.mark.parametrize("shape", [(2, 3, 33, 33, 16), (1, 5, 700, 1100, 8), (1, 2, 1, 1100, 64), (2, 3, 256, 256, 64)])
@pytest.mark.parametrize("tiles", [False, True], ids=["without-amx", "amx"])
@torch.inference_mode()
def test_attention_against_dense_softmax(shape, tiles, monkeypatch):
    monkeypatch.setattr(attention, "BF16_TILES", tiles)
    B, H, queries, keys, d = shape
    g = torch.Generator().manual_seed(3)
    q = torch.randn(B, H, queries, d, generator=g).bfloat16()
    k, v = (torch.randn(B, H, keys, d, generator=g).bfloat16() for _ in range(2))

    def dense(mask=0):
        scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(d) + mask
        return scores.softmax(-1) @ v.double()

    assert (attend(q.float(), k.float(), v.float()) - dense()).abs().max() <= 1e-6
    flash = (F.scaled_dot_product_attention(q, k, v) - dense()).square().mean().sqrt()
    assert (attend(q, k, v) - dense()).square().mean().sqrt() <= 1.1 * flash
    mask = torch.randn(B, 1, queries, keys, generator=g)
    assert (attend(q.float(), k.float(), v.float(), mask) - dense(mask)).abs().max() <= 1e-6


def test_rotation_in_place_equals_the_formula():
    g = torch.Generator().manual_seed(4)
    x, ids = torch.randn(2, 3, 7, 16, generator=g), torch.randn(2, 7, 3, generator=g) * 30
    table = rotary_table(ids, (4, 6, 6), 10000)
    assert (apply_rotary_(x.clone(), table) - apply_rotary(x, table)).abs().max() <= 1e-6


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lengths", [(7,), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_norm_and_rotate_against_the_formula(dtype, lengths, heads):
    """Of one or two streams, by a table of all heads or one per head, or two tables. Compiled code too."""
    g = torch.Generator().manual_seed(5)
    joint = torch.randn(2, 7, 3, 3, 16, generator=g).to(dtype)  # (B, N, 3, H, d), with the values
    scales = [torch.randn(2, 16, generator=g).to(dtype) for _ in lengths]
    ids = torch.randn(heads, 7, 3, generator=g) * 30
    table = Rotary(*(part.transpose(0, 1) for part in rotary_table(ids, (4, 6, 6), 10000)))

    other = Rotary(*(part.roll(1, dims=2) for part in table))
    x = joint[:, :, :2].double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    scale = torch.cat([s.double().expand(n, 2, 16) for s, n in zip(scales, lengths, strict=True)])
    q, k = (normed * scale[None, :, :, None]).permute(2, 0, 3, 1, 4)
    torch._dynamo.reset()
    compiled = torch.compile(norm_and_rotate, fullgraph=True, backend="aot_eager")
    for tables in ((table, table), (table, other)):
        expected = [apply_rotary(x, Rotary(*map(torch.Tensor.double, t))) for x, t in zip((q, k), tables, strict=True)]
        for function in (norm_and_rotate, compiled):
            for i, out in enumerate(function(joint.split(lengths, dim=1), [tuple(s) for s in scales], *tables)):
                assert out.dtype == torch.float32
                by_token = function is compiled and i == 0
                assert out.stride()[1:] == ((16, 48, 1) if by_token else (7 * 16, 16, 1))
                assert (out - expected[i]).abs().max() <= 2e-6 * expected[i].abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_output_with_and_without_gradients(flux, dtype, bound):
    model, x = Flux(PARAMS).to(dtype), inputs(dtype=dtype)
    model.load_state_dict(flux.state_dict())
    with torch.no_grad():
        off = model(**x)
    on = model(**x)
    assert on.requires_grad
    assert on.dtype == dtype
    assert difference(on, off) <= bound


def test_gradients_in_ids():
    torch.manual_seed(5)
    model = Flux(FluxParams(4, 4, 6, 5, 12, 2.0, 1, 1, 1, (4, 4, 4), 100, True, False)).double()
    x = {"img": 3, "txt": 2}
    img, txt = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)
    ids = [torch.randn(1, n, 3, dtype=torch.float64, requires_grad=True) for n in x.values()]
    t, y = torch.full((1,), 0.5, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: model(img, a, txt, b, t, y), ids)


def test_fp64_model_takes_fp64_ids(flux):
    model, x = Flux(PARAMS).double(), inputs(dtype=torch.float64)
    assert model(**x).dtype == torch.float64
    with pytest.raises(ValueError, match="img_ids has dtype"):
        model(**{**x, "img_ids": x["img_ids"].float()})


def test_fp16_stays_finite(flux):
    model, x = Flux(PARAMS).half(), inputs(dtype=torch.float16)
    model.load_state_dict(flux.state_dict())
    with torch.no_grad():
        assert difference(model(**x), flux(**inputs())) <= 0.05
        block = model.single_blocks[0]  # its residual sum, 60000 + 1 · 60000, overflows
        block.modulation.lin.bias.fill_(1)
        block.modulation.lin.weight.zero_()
        block.linear2.bias.fill_(60000)
        block.linear2.weight.zero_()
        table = rotary_table(inputs()["img_ids"], PARAMS.axes_dim, PARAMS.theta)
        x = torch.full((BATCH, IMAGE, PARAMS.hidden_size), 60000.0).half()
        vec = torch.zeros(BATCH, PARAMS.hidden_size).half()
        assert block(x, vec, (table, table), None).eq(65504).all()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_autocast_keeps_positions(flux, grad):
    """bf16 rounds 501.25 to 502. Under autocast the two must still give different outputs."""
    x = inputs()
    far = {**x, "img_ids": x["img_ids"] + 500, "txt_ids": x["txt_ids"] + 500}
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        output = flux(**x)
        assert rotary_table(x["img_ids"], PARAMS.axes_dim, PARAMS.theta).cos.dtype == torch.float32
        assert difference(flux(**far), output) <= 0.05
        with pytest.raises(ValueError, match="bf16"):
            flux(**{**x, "img_ids": x["img_ids"].bfloat16()})
    assert difference(output, flux(**x)) <= 0.1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: type(t)(t.cos.bfloat16(), t.sin.bfloat16()), "torch.bfloat16: expected"),
        (lambda t: type(t)(t.cos.double(), t.sin.double()), "torch.float64: expected"),
        (lambda t: type(t)(t.cos[:, :, 1:], t.sin[:, :, 1:]), r"shape \(4, 1, 16, 8\)"),
        (lambda t: type(t)(t.cos[..., 1:], t.sin[..., 1:]), r"shape \(4, 1, 17, 7\)"),
        (lambda t: type(t)(t.cos[:3], t.sin[:3]), r"shape \(3, 1, 17, 8\)"),
        (lambda t: [(t, t)], "1 pairs of tables, the model has 4 blocks"),
        (lambda t: [tuple(t)] * BLOCKS, "rotary holds a Tensor"),
    ],
)
def test_wrong_tables_raise(flux, unchecked, spoil, message):
    x = inputs()
    with pytest.raises(ValueError, match=message) as error:
        flux(**with_tables(x, spoil(rotary_table(joint_ids(x), PARAMS.axes_dim, PARAMS.theta))))
    assert len(str(error.value).splitlines()) <= 3


def test_integer_masks_raise(flux, unchecked):
    with pytest.raises(ValueError, match=r"torch.int64: expected booleans"):
        flux(**inputs(), mask=torch.ones(TEXT + IMAGE, TEXT + IMAGE, dtype=torch.long))


def test_sizes_of_zero_raise():
    with pytest.raises(ValueError, match="num_heads 0: expected at least 1"):
        replace(PARAMS, num_heads=0)


def test_rotary_tables_need_no_fp64_on_the_device():
    """MPS has no fp64. The meta device takes its place here."""
    from tests.unit.test_pipeline import NoDoubleOnMeta

    model, x = Flux(PARAMS).to("meta"), {name: value.to("meta") for name, value in inputs().items()}
    with NoDoubleOnMeta():
        assert model(**x).shape == (BATCH, IMAGE, 6)


@torch.no_grad()
def test_modulations_replace_the_conditioning(flux):
    x = inputs()
    expected = flux(**x)
    vec = flux.conditioning(x["timesteps"], x["y"], x["guidance"])
    modules = (*flux.double_blocks, *flux.single_blocks, flux.final_layer)
    known = [module.modulations(vec) for module in modules]
    other = {key: torch.full_like(x[key], 0.5) for key in ("timesteps", "y", "guidance")}
    assert torch.equal(flux(**{**x, **other}, modulations=known), expected)
    doubled = [tuple(affine._replace(shift=2 * affine.shift) for affine in block) for block in known]
    assert not torch.equal(flux(**x, modulations=doubled), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_the_bits_of_a_sample_do_not_depend_on_its_batch(dtype, threads):
    """Variants that share steps are computed in smaller batches (`fluxlab.sampling.shared`)."""
    if not ONEDNN_DTYPES[dtype]:
        pytest.skip(f"oneDNN has no {dtype} on this processor")
    torch.manual_seed(0)
    params = replace(PARAMS, hidden_size=192, num_heads=3, axes_dim=(8, 28, 28), depth=1, depth_single_blocks=1)
    model, g = Flux(params).to(dtype).eval(), torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(12, *shape, generator=g).to(dtype)  # noqa: E731
    image, text, y, t = draw(256, 8), draw(24, 10), draw(12), torch.linspace(1, 0.2, 12)
    ids = torch.randn(12, 280, 3, generator=g)

    def forward(rows: list[int]) -> torch.Tensor:
        of_text, of_image = ids[rows].split((24, 256), dim=1)
        return model(image[rows], of_image, text[rows], of_text, t[rows], y[rows], t[rows])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = forward(list(range(12)))
        for rows in ([0], [11], [3, 7], [1, 2, 3], [0, 4, 5, 8, 9], list(range(11))):
            assert torch.equal(forward(rows), whole[rows]), rows
    finally:
        torch.set_num_threads(before)
