"""LoRAs in every naming, merged by us and by Diffusers' own loading and fusing, on a tiny random model in fp32."""

import inspect
import json
from dataclasses import replace

import diffusers.loaders.lora_conversion_utils as conversion
import diffusers.loaders.lora_pipeline as lora_pipeline
import pytest
import torch
from safetensors.torch import load_file, save_file

import fluxlab
from fluxlab import checkpoints
from fluxlab.checkpoints.identity import fingerprint
from fluxlab.config import find_row, read_loras
from tests import tiny
from tests.numerics.test_diffusers import diffusers_images, load_diffusers, pixel_gap

HIDDEN, MLP, SCALE = 64, 256, 0.7
OPTIONS = {"height": 32, "width": 48, "steps": 3}
PROMPT = "A cat holding a sign that says hello world"

# layers of the tiny model by BFL's names: (rows, columns) of the weight
DOUBLE = {
    "img_mod.lin": (6 * HIDDEN, HIDDEN),
    "img_attn.qkv": (3 * HIDDEN, HIDDEN),
    "img_attn.proj": (HIDDEN, HIDDEN),
    "img_mlp.0": (MLP, HIDDEN),
    "img_mlp.2": (HIDDEN, MLP),
}
SINGLE = {
    "modulation.lin": (3 * HIDDEN, HIDDEN),
    "linear1": (3 * HIDDEN + MLP, HIDDEN),
    "linear2": (HIDDEN, HIDDEN + MLP),
}
OUTER = {
    "img_in": (HIDDEN, 16),
    "txt_in": (HIDDEN, 32),
    "time_in.in_layer": (HIDDEN, 256),
    "time_in.out_layer": (HIDDEN, HIDDEN),
    "vector_in.in_layer": (HIDDEN, 24),
    "vector_in.out_layer": (HIDDEN, HIDDEN),
    "guidance_in.in_layer": (HIDDEN, 256),
    "guidance_in.out_layer": (HIDDEN, HIDDEN),
    "final_layer.linear": (16, HIDDEN),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}
BFL = {
    **{f"double_blocks.{i}.{name}": size for i in range(2) for name, size in DOUBLE.items()},
    **{f"double_blocks.{i}.{name.replace('img', 'txt')}": size for i in range(2) for name, size in DOUBLE.items()},
    **{f"single_blocks.{i}.{name}": size for i in range(2) for name, size in SINGLE.items()},
    **OUTER,
}
BLOCKS = {name: size for name, size in BFL.items() if "blocks" in name}
DIFFUSERS = {
    **{f"transformer_blocks.{i}.attn.{x}": (HIDDEN, HIDDEN) for i in range(2) for x in ("to_q", "to_v", "add_k_proj")},
    **{
        f"transformer_blocks.{i}.{x}": (MLP, HIDDEN)
        for i in range(2)
        for x in ("ff.net.0.proj", "ff_context.net.0.proj")
    },
    "transformer_blocks.1.norm1.linear": (6 * HIDDEN, HIDDEN),
    "transformer_blocks.1.attn.to_out.0": (HIDDEN, HIDDEN),
    "transformer_blocks.0.attn.to_add_out": (HIDDEN, HIDDEN),
    "single_transformer_blocks.0.attn.to_k": (HIDDEN, HIDDEN),
    "single_transformer_blocks.1.proj_mlp": (MLP, HIDDEN),
    "single_transformer_blocks.1.proj_out": (HIDDEN, HIDDEN + MLP),
    "norm_out.linear": (2 * HIDDEN, HIDDEN),
    "proj_out": (16, HIDDEN),
    "x_embedder": (HIDDEN, 16),
    "time_text_embed.text_embedder.linear_1": (HIDDEN, 24),
}


def random(*shape, size=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(made))).mul(size)


made: list = []


def pairs(layers, down, up, rank=4, prefix="", flat=False, alpha=None):
    """Return the tensors of a LoRA. down, up: what follows a layer's name. alpha: of each layer by its number."""
    tensors = {}
    for n, (name, (rows, cols)) in enumerate(layers.items()):
        made.append(name)
        r = rank if isinstance(rank, int) else rank[n % len(rank)]
        key = prefix + (name.replace(".", "_") if flat else name)
        tensors[key + down] = random(r, cols, size=0.3)
        tensors[key + up] = random(rows, r, size=0.3)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha[n % len(alpha)]))
    return tensors


PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")


def bfl_control():
    """As BFL's own control LoRAs: every layer, a bias of each second matrix, and the scales of all norms."""
    tensors = pairs(BFL, *PEFT)
    # Diffusers exchanges the halves of this matrix too, though its rows are not those of the layer
    tensors["final_layer.adaLN_modulation.1.lora_A.weight"] = random(2, HIDDEN, size=0.3).repeat(2, 1)
    for name, (rows, _) in BFL.items():
        tensors[f"{name}.lora_B.bias"] = random(rows, size=0.1)
    for i in range(2):
        for norm in (f"double_blocks.{i}.img_attn", f"double_blocks.{i}.txt_attn", f"single_blocks.{i}"):
            for side in ("query", "key"):
                tensors[f"{norm}.norm.{side}_norm.scale"] = 1 + random(32, size=0.2)
    return tensors


def xlabs():
    attention = {f"double_blocks.{i}.processor.qkv_lora{k}": (3 * HIDDEN, HIDDEN) for i in range(2) for k in (1, 2)}
    attention |= {f"double_blocks.{i}.processor.proj_lora{k}": (HIDDEN, HIDDEN) for i in range(2) for k in (1, 2)}
    attention |= {
        "single_blocks.1.processor.qkv_lora": (3 * HIDDEN, HIDDEN),
        "single_blocks.1.processor.proj_lora": (HIDDEN, HIDDEN + MLP),
    }
    return pairs(attention, ".down.weight", ".up.weight")


def base_model():
    layers = {**BLOCKS, "final_layer.linear": BFL["final_layer.linear"]}
    return pairs(layers, *PEFT, prefix="base_model.model.")


# Diffusers gives the alpha of proj_out to single_transformer_blocks.1.proj_out too: PEFT compares the ends of names
NOT_AN_ENDING = {name: size for name, size in DIFFUSERS.items() if name != "proj_out"}
NAMINGS = {
    "diffusers": lambda: pairs(DIFFUSERS, *PEFT, prefix="transformer.", rank=(4, 2, 8)),
    "diffusers-alpha": lambda: pairs(NOT_AN_ENDING, *PEFT, prefix="transformer.", alpha=(8, 2, 4)),
    "bfl": bfl_control,
    "kohya": lambda: pairs(BLOCKS, *KOHYA, prefix="lora_unet_", flat=True, alpha=(2, 4, 1), rank=(4, 2)),
    "kohya-diffusers": lambda: pairs(
        {k: v for k, v in DIFFUSERS.items() if "attn" in k}, *KOHYA, prefix="lora_transformer_", flat=True, alpha=(20,)
    ),
    "comfyui": lambda: pairs(BLOCKS, *KOHYA, prefix="diffusion_model.", alpha=(2, 8)),
    "xlabs": xlabs,
    "xlabs-comfyui": lambda: {f"diffusion_model.{key}": value for key, value in xlabs().items()},
    "base_model": base_model,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), guidance=True)


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch):
    """Diffusers' converters have FLUX.1's sizes written into them: the same code with those of the tiny model."""
    sizes = {"range(19)": "range(2)", "range(38)": "range(2)", "num_layers = 19": "num_layers = 2",
             "num_single_layers = 38": "num_single_layers = 2", "inner_dim = 3072": f"inner_dim = {HIDDEN}",
             "[3072, 3072, 3072, 12288]": str([HIDDEN] * 3 + [MLP])}  # fmt: skip
    for name in ("kohya_flux_lora", "bfl_flux_control_lora", "fal_kontext_lora"):
        name = f"_convert_{name}_to_diffusers"
        source = inspect.getsource(getattr(conversion, name))
        assert any(size in source for size in sizes)
        for theirs, ours in sizes.items():
            source = source.replace(theirs, ours)
        namespace = dict(vars(conversion))
        exec(source, namespace)
        monkeypatch.setattr(lora_pipeline, name, namespace[name])


def fused(folder, files):
    """Return Diffusers' pipeline with LoRAs fused, as (file, scale)."""
    pipe = load_diffusers(folder)
    for n, (file, scale) in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"a{n}")
        pipe.fuse_lora(lora_scale=scale, adapter_names=[f"a{n}"])
        pipe.transformer._transformer_norm_layers = None  # it would set the norms back
        pipe.unload_lora_weights()
    return pipe


def gap_of_weights(ours, theirs, tmp_path) -> float:
    checkpoints.save_transformer(ours.transformer, tmp_path / "saved", layout="diffusers")
    saved = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    state = theirs.transformer.state_dict()
    assert saved.keys() == state.keys()
    return max(float((saved[name] - state[name]).abs().max()) for name in state)


def images(ours, theirs, seed=0):
    (image,) = ours.generate(PROMPT, seed, max_sequence_length=24, guidance=3.5, **OPTIONS)
    (other,) = diffusers_images(theirs, PROMPT, seed, 32, 48, OPTIONS["steps"], guidance_scale=3.5)
    return image, other


@pytest.mark.parametrize("naming", NAMINGS)
def test_naming(naming, folder, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(NAMINGS[naming](), file)
    ours = fluxlab.load_pipeline(folder, lora={"path": file, "scale": SCALE})
    theirs = fused(folder, [(file, SCALE)])
    assert gap_of_weights(ours, theirs, tmp_path) < 2e-6
    image, other = images(ours, theirs)
    assert pixel_gap(image, other) <= 1
    (plain,) = fluxlab.load_pipeline(folder).generate(PROMPT, 0, max_sequence_length=24, guidance=3.5, **OPTIONS)
    assert pixel_gap(image, plain) > 20


def test_several(folder, tmp_path):
    """Two files that change the same layers, of which one is subtracted."""
    files = []
    for naming, scale in (("kohya", 0.5), ("diffusers-alpha", -0.25)):
        file = tmp_path / f"{naming}.safetensors"
        save_file(NAMINGS[naming](), file)
        files.append((file, scale))
    ours = fluxlab.load_pipeline(folder, lora=[{"path": file, "scale": scale} for file, scale in files])
    theirs = fused(folder, files)
    assert gap_of_weights(ours, theirs, tmp_path) < 2e-6
    assert pixel_gap(*images(ours, theirs)) <= 1


def names_of_bfl():
    """The same additions in every naming that has BFL's layers."""
    tensors = pairs(BFL, *KOHYA, alpha=(2, 8, 1), rank=(4, 2, 3))

    def renamed(prefix, down, up, flat=False):
        parts = {}
        for key, value in tensors.items():
            module, kind = next((key.removesuffix(s), s) for s in (*KOHYA, ".alpha") if key.endswith(s))
            module = module.replace(".", "_") if flat else module
            parts[prefix + module + {KOHYA[0]: down, KOHYA[1]: up}.get(kind, kind)] = value
        return parts

    yield tensors
    yield renamed("", *PEFT)
    yield renamed("lora_unet_", *KOHYA, flat=True)
    yield renamed("diffusion_model.", *KOHYA)
    yield renamed("model.diffusion_model.", *PEFT)
    yield renamed("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight")


def test_every_layer_by_its_formula(folder, tmp_path):
    """All layers, also those that Diffusers leaves out of kohya's files (img_in, txt_in, time_in, final_layer, …)."""
    plain = fluxlab.load_pipeline(folder).transformer.state_dict()
    for n, tensors in enumerate(names_of_bfl()):
        if n == 0:
            expected = dict(plain)
            for name in BFL:
                down, up = (tensors[name + part].double() for part in KOHYA)
                added = SCALE * float(tensors[f"{name}.alpha"]) / len(down) * (up @ down)
                expected[f"{name}.weight"] = (plain[f"{name}.weight"].double() + added).float()
        save_file(tensors, tmp_path / f"{n}.safetensors")
        merged = fluxlab.load_pipeline(folder, lora={"path": tmp_path / f"{n}.safetensors", "scale": SCALE})
        state = merged.transformer.state_dict()
        assert max(float((state[name] - expected[name]).abs().max()) for name in state) < 2e-6
        changed = [name for name in state if not torch.equal(state[name], plain[name])]
        assert sorted(changed) == sorted(f"{name}.weight" for name in BFL)


@pytest.mark.parametrize("rslora", [False, True])
def test_settings_of_peft(folder, tmp_path, rslora):
    """alpha, its pattern and rank-stabilised scaling come from the metadata that Diffusers writes."""
    from peft import LoraConfig

    theirs = load_diffusers(folder)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        alpha_pattern={"transformer_blocks.0.attn.to_q": 16},
        rank_pattern={"transformer_blocks.1.attn.to_v": 2},
        use_rslora=rslora,
        target_modules=["to_q", "to_v"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    theirs.transformer.add_adapter(config)
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(theirs.transformer)
    theirs.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    theirs.fuse_lora(lora_scale=SCALE, adapter_names=["default"])
    theirs.unload_lora_weights()
    ours = fluxlab.load_pipeline(folder, lora={"path": tmp_path, "scale": SCALE})
    assert gap_of_weights(ours, theirs, tmp_path) < 2e-6
    assert gap_of_weights(fluxlab.load_pipeline(folder), theirs, tmp_path / "plain") > 0.05


def test_peft_folder(folder, tmp_path):
    """A folder that PEFT writes: adapter_config.json has alpha."""
    from peft import LoraConfig, PeftModel, get_peft_model

    theirs = load_diffusers(folder)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["to_k", "proj_out"], init_lora_weights=False)
    get_peft_model(theirs.transformer, config).save_pretrained(tmp_path / "lora")
    plain = load_diffusers(folder)
    plain.transformer = PeftModel.from_pretrained(plain.transformer, tmp_path / "lora").merge_and_unload()
    ours = fluxlab.load_pipeline(folder, lora=tmp_path / "lora")
    assert gap_of_weights(ours, plain, tmp_path) < 2e-6
    row = find_row(str(folder))
    loras = read_loras(tmp_path / "lora")
    before = fingerprint(replace(row, lora=loras))
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 5}))
    assert fingerprint(replace(row, lora=loras)) != before
