"""Runs, plans and checks of FLUX.2: a tiny random folder in place of FLUX.2 [klein]."""

from pathlib import Path

import numpy as np
import pytest

import fluxlab
from fluxlab import run
from fluxlab.check.__main__ import main as check_main
from fluxlab.errors import UserError
from fluxlab.positions import Program
from tests import tiny2

LENGTH = 56


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny2.save(tmp_path_factory.mktemp("klein"), seed=2)


def words(folder: Path, out: Path, *more: str, exp: str = "article") -> list[str]:
    model = ["model=local", f"model.path={folder}", f"model.max_sequence_length={LENGTH}"]
    size = ["height=32", "width=48", "steps=2", "seeds=2", 'prompts=["a red cat"]']
    return [f"+exp={exp}", *model, *size, "tracking=none", "cache=none", f"out={out}", *more]


ORDER = [
    "+variants.scrambled={a: {op: shuffle, tokens: text}}",
    "+variants.unordered={a: {op: zero, axes: l, tokens: text}}",
    "+variants.moved={a: {op: relocate, tokens: {words: [red cat]}, to: [1, 1]}}",
    "+variants.far={a: {op: set, value: {t: 30}}}",
]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert run.main(words(folder, out, *ORDER, "capture=words")) == 0
    return out


def pixels(store: Path, variant: str, seed: int = 0) -> np.ndarray:
    return np.asarray(fluxlab.read_run(store).open(variant, "a red cat", seed)).astype(int)


def test_the_article_and_the_order_of_text(finished):
    assert {"grid.png", "report.html", "metrics.csv"} <= {file.name for file in finished.iterdir()}
    baseline = pixels(finished, "baseline")
    for variant in ("zero", "half", "double", "axis0", "scrambled", "unordered", "moved", "far"):
        assert np.abs(pixels(finished, variant) - baseline).max() > 0, variant


def test_captured_words(finished):
    """Shares of attention between the words of the prompt, found inside the chat template, and the image."""
    array = fluxlab.read_run(finished).captured("baseline", "a red cat", 0)["words"].sel(direction="image_to_word")
    values = np.asarray(array.values)
    assert {"a", "red", "cat"} <= set(map(str, array.coords["word"][1]))
    assert np.isfinite(values).all()
    assert values.max() > 0


def test_the_same_command_again_changes_nothing(folder, finished):
    before = {file: file.stat().st_mtime_ns for file in (finished / "cells").rglob("*.png")}
    assert run.main(words(folder, finished, *ORDER, "capture=words")) == 0
    assert {file: file.stat().st_mtime_ns for file in (finished / "cells").rglob("*.png")} == before


def test_a_sample_does_not_depend_on_its_batch(folder):
    pipe = fluxlab.load_pipeline(folder, cache="none")
    common = {"height": 32, "width": 48, "steps": 2, "max_sequence_length": LENGTH, "output": "latent"}
    programs = [Program(), Program.from_config({"a": {"op": "shuffle", "tokens": "text"}}), Program()]
    prompts = ["a red cat", "hello", "the red sign"]
    together = pipe.generate(prompts, [0, 1, 2], programs, **common)
    for i, (prompt, program) in enumerate(zip(prompts, programs, strict=True)):
        assert (pipe.generate(prompt, i, program, **common)[0] - together[i]).abs().max() <= 1e-5 * together[i].std()


def test_a_plan(folder, tmp_path, capsys):
    assert run.main(words(folder, tmp_path, "plan=true")) == 0
    text = capsys.readouterr().out
    assert "language model" in text
    assert "times shifted by image size and steps" in text
    assert f"8 × 12 image + {LENGTH} text" in text


@pytest.mark.parametrize("name", ["klein4b", "klein4b_base", "klein9b", "flux2dev"])
def test_a_plan_before_the_download(name, capsys, monkeypatch):
    """Sizes are known before anything is fetched."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run.main(["+exp=hello", f"model={name}", "plan=true", "device=cpu", "tracking=none"]) == 0
    text = capsys.readouterr().out
    assert "not downloaded yet" in text
    assert {"klein4b": "7.8 GB", "klein4b_base": "7.8 GB", "klein9b": "18.2 GB", "flux2dev": "64.4 GB"}[name] in text
    assert ("true_cfg 4" in text) == (name == "klein4b_base")


def test_check(folder, capsys):
    assert check_main(["model=local", f"model.path={folder}", "device=cpu"]) == 0
    text = capsys.readouterr().out
    assert "ids         setting all image ids to 0 changes it" in text
    assert "parameters; finite, and differ between prompts; the language model" in text


def test_what_is_refused_takes_one_line(folder, tmp_path, capsys):
    assert run.main(words(folder, tmp_path / "out", "model.like=dev", exp="hello")) == 2
    error = capsys.readouterr().err
    assert "says how FLUX.1 samples" in error
    assert len(error.strip().splitlines()) <= 3


def test_a_streamed_run_with_a_lora(folder, tmp_path, capsys):
    """The store is that of a resident run, and the plan says what is streamed."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=draw) * 0.3 for shape in ((2, 64), (576, 2)))
    layer = "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "a.safetensors")
    lora = f"lora=[{{path: {tmp_path / 'a.safetensors'}}}]"
    images = {}
    for name, more in {"resident": [lora], "streamed": [lora, "memory=streamed"]}.items():
        assert run.main(words(folder, tmp_path / name, "seeds=1", *more, exp="hello")) == 0
        images[name] = pixels(tmp_path / name, "baseline")
    assert "all 5 blocks streamed" in capsys.readouterr().out
    assert np.array_equal(images["streamed"], images["resident"])


def test_learn_and_attribution(folder, tmp_path, capsys):
    from fluxlab import learn
    from fluxlab.learning import attribute

    mine = "+variants.mine={a: {op: offset, by: {order: {learn: 1.0, min: -4, max: 4}}, tokens: text}}"
    settings = ["objective=sharpness", "updates=1", "starts=1", "seeds=2", "steps=1"]

    def own(out, *more):
        return [word for word in words(folder, tmp_path / out, *more, exp="hello") if "tracking" not in word]

    assert learn.main(own("learned", mine, *settings)) == 0
    assert "a.by" in (tmp_path / "learned" / "result.json").read_text()
    assert attribute.main(own("found", "objective=sharpness", "seeds=1", "steps=1")) == 0
    assert "order" in capsys.readouterr().out


def test_an_autoencoder_of_the_other_family(folder):
    with pytest.raises(UserError, match=r"FLUX\.1's autoencoder, but the transformer is FLUX\.2's"):
        fluxlab.load_pipeline(folder, autoencoder=fluxlab.config.find_row("tiny").path, cache="none")
