"""README, CONTRIBUTING and docs/ describe the project as it is."""

import importlib.util
import itertools
import json
import math
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

import fluxlab
from docs import architecture, measured, results, tables
from fluxlab.compose import compose
from fluxlab.files import sha256_of
from fluxlab.positions import Program
from fluxlab.run import RunConfig
from fluxlab.sampling import Sampling

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(params=PAGES, ids=lambda file: file.name)
def page(request) -> Path:
    return request.param


def test_generated_tables_are_current(page):
    """`make docs` refreshes them."""
    text = page.read_text()
    assert tables.rendered(text) == text, "run make docs"


def test_a_stale_table_is_replaced_and_the_rest_kept():
    stale = "before\n<!-- table: models -->\n| stale row |\n<!-- end table -->\nafter\n"
    fresh = tables.rendered(stale)
    assert fresh.startswith("before\n<!-- table: models -->\n| `model=` |")
    assert "| `schnell` | FLUX.1 [schnell]" in fresh
    assert fresh.endswith("\n<!-- end table -->\nafter\n")
    assert "stale row" not in fresh
    assert tables.rendered(fresh) == fresh
    with pytest.raises(KeyError, match="'tabel', expected one of answer, "):
        tables.rendered(stale.replace("models", "tabel"))


def test_the_numbers_belong_to_the_embedded_model():
    """After a new model run `python benchmarks/embedded.py --cells 192`, `docs/results.py` and `docs/tables.py`."""
    weights = sha256_of(results.WEIGHTS)[:12]
    assert json.loads(measured.EMBEDDED.read_text())["weights"] == weights
    assert json.loads(measured.RESULTS.read_text())["weights"] == weights
    weights2 = sha256_of(results.WEIGHTS2)[:12]
    assert json.loads(measured.EMBEDDED2.read_text())["weights"] == weights2
    assert json.loads(measured.RESULTS.read_text())["weights of tiny2"] == weights2
    for page in ("learning.md", "interventions.md"):  # +exp=learn_offset, learn_sharpest; experiments.attribution
        assert f"`{weights}`" in (tables.ROOT / "docs" / page).read_text()


def test_the_findings_follow_from_the_numbers():
    """Each sentence of docs/findings.md.j2. If one fails with a new embedded model, rewrite the sentence."""
    rows = measured.quoted()
    base, zero, half, double, stretch = (rows[name] for name in ("base", "zero", "half", "double", "stretch"))
    assert zero["object"][2] < 0.1 < min(base["object"][1], rows["seed"]["object"][1])  # 1: upper and lower bounds
    for factor, row in ((0.5, half), (1.2, stretch), (2, double)):  # 2
        assert row["size"][0] * factor / base["size"][0] == pytest.approx(1, abs=0.15)
    assert stretch["object"][1] > 0.9
    assert max(half["word"][2], double["word"][2]) < stretch["word"][1]  # 3
    assert stretch["word"][2] < base["word"][1]
    assert min(half["object"][1], double["object"][1]) > 0.3
    assert rows["floor"]["ssim"][0] >= rows["axis0"]["ssim"][0] > 0.9 > rows["seed"]["ssim"][2]  # 4
    assert rows["late"]["ssim"]["high"] < rows["early"]["ssim"]["low"]  # 5
    assert rows["late"]["object"]["mean"] < 0.5 < rows["early"]["object"]["mean"]


def test_the_findings_on_ideas_follow_from_the_numbers():
    """Each sentence of docs/ideas.md.j2. If one fails with a new embedded model, rewrite the sentence."""
    runs = json.loads(measured.RESULTS.read_text())
    dose, edits, steps = (runs[measured.IDEAS[name]] for name in ("dose", "edits", "steps"))
    assert max(dose["x0_5"]["ssim"]["high"], dose["x2"]["ssim"]["high"]) < edits["another seed"]["ssim"]["mean"]  # 1
    cosines = {f: (sum(math.cos(f * 10000 ** (-i / 14)) for i in range(14)) + 14) / 28 for f in (1, 0.5, 2)}
    assert [round(value, 3) for value in cosines.values()] == [0.977, 0.994, 0.925]
    assert edits["index_16"]["ssim"]["low"] > edits["another seed"]["ssim"]["high"]  # 2
    for name in ("row_16", "col_16"):
        assert edits[name]["ssim"]["high"] < edits["another seed"]["ssim"]["low"]
    assert edits["jitter_0_25"]["ssim"]["low"] > edits["another seed"]["ssim"]["high"]  # 3
    falling = [edits[name]["ssim"] for name in ("jitter_0_25", "jitter_0_5", "jitter_1", "jitter_2")]
    assert all(a["low"] > b["high"] for a, b in itertools.pairwise(falling))
    windows = [steps[name]["psnr"] for name in ("first", "second", "third", "last")]  # 4
    assert min(windows[1]["low"], windows[2]["low"]) > max(windows[0]["high"], windows[3]["high"])


def test_the_findings_on_relocation_follow_from_the_numbers():
    """Sentences 5 and 6 of docs/ideas.md.j2. If one fails with a new embedded model, rewrite the sentence."""
    runs = json.loads(measured.RESULTS.read_text())
    moved, learned = (runs[measured.IDEAS[name]] for name in ("moved", "learned"))
    assert moved["move"]["slope"]["high"] < 0.1  # 5
    assert moved["mask"]["slope"]["low"] > max(
        0.2, moved["mask"]["chance"]["high"], moved["move_mask"]["slope"]["high"]
    )
    assert moved["early_mask"]["slope"]["low"] > 0.5 * moved["mask"]["slope"]["mean"]
    assert abs(moved["early_move"]["slope"]["mean"] - moved["move"]["slope"]["mean"]) < 0.1
    assert moved["mask"]["in_box_gain"]["low"] > 0.2 > 0 > moved["move"]["in_box_gain"]["mean"]
    assert moved["mask"]["seeds"]["low"] > max(0, moved["move"]["seeds"]["high"])
    assert moved["mask"]["letters"]["mean"] > 0.9
    assert learned["attention"]["learned - baseline"][1] > 0  # 6
    assert learned["learned"]["in_box"]["high"] < learned["mask"]["in_box"]["low"]
    assert min(learned[name]["in_box"]["n"] for name in ("learned", "mask")) >= 64


def test_the_finding_on_the_atlas_follows_from_the_numbers():
    """Sentence 10 of docs/ideas.md.j2. If it fails with a new embedded model, rewrite the sentence."""
    found = json.loads(measured.RESULTS.read_text())["atlas"]
    short = [found["shares"][f"wavelength {band}"] for band in ("below 8", "8 to 32")]
    assert sum(part["low"] for part in short) > 2 * sum(part["sites"] for part in short)
    rows = found["ablation"]
    assert rows["place 2"]["moved"]["low"] > rows["denoising 2"]["moved"]["high"] > rows["random 2"]["moved"]["high"]
    assert rows["noise floor"]["moved"]["mean"] < 0.05 < rows["random 2"]["moved"]["low"]
    assert rows["place 4"]["found"]["high"] < rows["denoising 4"]["found"]["low"]
    assert rows["random 16"]["found"]["mean"] == rows["another seed"]["place"]["mean"] == 1
    for k in (2, 4, 8, 16, 32):
        assert rows[f"place {k}"]["place"]["mean"] == rows[f"place {k}"]["found"]["mean"]
    assert found["agreement"]["correlation"] < 0.2


def test_the_finding_on_inpainting_follows_from_the_numbers():
    """What docs/ideas.md.j2 says about it. If it fails with a new embedded model, rewrite the paragraph."""
    inpaint = json.loads(measured.RESULTS.read_text())["inpaint"]
    noised, inverted, once = (inpaint[name] for name in ("baseline", "inverted", "inverted_once"))
    assert noised["asked"]["n"] == 64
    assert noised["asked"]["low"] > inverted["asked"]["high"] >= inverted["asked"]["mean"] > once["asked"]["mean"]
    assert inverted["asked_one"]["low"] > inverted["asked_two"]["high"]
    assert all(abs(row["in_hole"]["mean"] - row["asked"]["mean"]) < 0.05 for row in (inverted, once))
    assert max(abs(row["psnr_outside"]["paired_mean"]) for row in (inverted, once)) < 1
    assert abs(inpaint["both_ways"]["asked"]["paired_mean"]) < 0.05
    assert noised["seam"]["high"] < 0.01
    assert inpaint["filled"]["asked"]["high"] == 0


def test_the_findings_on_upscaling_follow_from_the_numbers():
    """Sentences 11 and 12 of docs/ideas.md.j2. If one fails with a new embedded model, rewrite the sentence."""
    own, beyond = (json.loads(measured.RESULTS.read_text())[name] for name in ("upscale", "upscale_beyond"))
    letters = {name: row["letters"] for name, row in own.items()}  # 11
    assert own["baseline"]["psnr_target"]["n"] == beyond["baseline"]["psnr_target"]["n"] == 64
    assert letters["baseline"]["low"] > letters["bicubic"]["high"]
    assert own["bicubic"]["psnr_target"]["paired_low"] > 0
    assert min(letters["both_ways"]["paired_low"], letters["freed"]["paired_low"]) > 0
    assert letters["baseline"]["low"] < letters["yarn"]["mean"] < letters["baseline"]["high"]
    assert own["half_steps"]["object"]["high"] < 0.9 < own["half_steps_aligned"]["object"]["low"]
    sampled = [row["psnr_target"]["high"] for name, row in own.items() if name not in UNSAMPLED and name != "resized"]
    assert own["resized"]["psnr_target"]["low"] > max(sampled)
    assert own["resized"]["psnr_target"]["mean"] > own["bicubic"]["psnr_target"]["mean"]
    methods = {name: row for name, row in beyond.items() if name not in UNSAMPLED}  # 12
    bicubic = beyond["bicubic"]["psnr_target"]["low"]
    assert max(row["psnr_target"]["high"] for row in methods.values()) < bicubic - 5
    assert beyond["baseline"]["shape"]["low"] > 0.9
    for name in ("spacing", "spacing_yarn", "spacing_dype", "aligned"):
        assert beyond[name]["shape"]["high"] < 0.6
    prompted = [row["letters"]["mean"] for name, row in beyond.items() if name.startswith("prompt")]
    assert max(prompted) < 0.02
    given = {name: row["letters"]["mean"] for name, row in methods.items() if not name.startswith("prompt")}
    assert max(given.values()) == given["enlarged"] < 0.1


UNSAMPLED = ("bicubic", "bicubic_decoded", "drawn")


def test_the_finding_on_conventions_follows_from_the_numbers():
    """Sentence 13 of docs/ideas.md.j2. If it fails with newly trained models, rewrite the sentence."""
    found = measured.of_conventions()
    assert found["cells"] == 128
    edits = {name: model["edits"] for name, model in found["models"].items()}
    assert min(model["unchanged"]["right"][0] for model in edits.values()) > 0.9
    for name in ("flux1", "index", "text_line"):
        model = edits[name]
        assert model["index + 16"]["right"][0] > model["unchanged"]["right"][1]
        assert model["index + 16"]["ssim"][1] > 0.98 > 0.7 > model["another seed"]["ssim"][2]
        assert model["× 0.5"]["right"][2] == 0
        assert model["unchanged"]["shape"][1] < 0.1 < model["unchanged"]["shape"][2]
        for edit in ("unchanged", "× 1.2", "rows + 1"):  # each is within the interval of FLUX.1's
            assert edits["flux1"][edit]["right"][1] < model[edit]["right"][0] < edits["flux1"][edit]["right"][2]


def test_the_text_on_flux2_follows_from_the_numbers():
    """What docs/flux2.md says about the embedded models. If it fails with new weights, rewrite the text."""
    tiny, tiny2 = (json.loads(file.read_text())["edits"] for file in (measured.EMBEDDED, measured.EMBEDDED2))
    assert max(card["all zero"]["object"][2] for card in (tiny, tiny2)) < 0.05
    assert tiny2["× 2"]["object"][1] > 1.5 * tiny["× 2"]["object"][2]
    assert max(card["× 2"]["shape"][2] for card in (tiny, tiny2)) < 0.3
    assert tiny2["× 0.5"]["object"][2] <= tiny["× 0.5"]["object"][1]
    assert tiny2["× 0.5"]["shape"][2] < tiny["× 0.5"]["shape"][1]
    assert min(card["axis 0 = 1"]["ssim"][1] for card in (tiny, tiny2)) > 0.95
    order = json.loads(measured.RESULTS.read_text())["text_order"]
    assert min(row["place"]["mean"] for row in order.values()) > 0.95
    assert order["shuffled"]["shape"]["high"] < 0.4 < 0.7 < order["reversed"]["shape"]["low"]
    assert order["shuffled"]["colour"]["low"] > 0.95
    for name in ("unordered", "moved", "stretched"):
        assert order[name]["letters"]["high"] < 0.5 < 0.8 < order["shuffled"]["letters"]["low"]


def test_the_text_on_the_trace_follows_from_the_numbers():
    """What docs/interventions.md says below its table. If it fails with a new embedded model, rewrite the text."""
    runs = json.loads(measured.RESULTS.read_text())
    transfers, blocks, probe = runs["trace"], range(6), runs["freeflux_probe"]
    for attribute, entry in measured.ENTERED.items():
        by_block = [transfers[f"text → image, block {n}"][attribute] for n in blocks]
        others = [row["mean"] for n, row in enumerate(by_block) if n != entry]
        assert by_block[entry]["low"] > 0.4 > 0.01 > max(others)
        for quadrant in ("text → text", "image → text"):
            places = [f"block {n}" for n in blocks] + ["all blocks"]
            assert all(transfers[f"{quadrant}, {place}"][attribute]["mean"] == 0 for place in places)
        assert transfers["text → image, all blocks"][attribute]["low"] > 0.9
    carry = {n for n in blocks for q in ("text", "image") if transfers[f"{q} → image, block {n}"]["place"]["low"] > 0.4}
    psnr = [probe[f"none_{n}"]["psnr"] for n in blocks]
    assert max(psnr[n]["high"] for n in carry) < min(psnr[n]["low"] for n in blocks if n not in carry)
    assert carry == {0, 1, 3}


PENDING = {"runs.md", "figures.md"}
"""Pages that are being written."""


def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and link[0] != "#"]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve()
        if target.name in PENDING:
            continue
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_glossary_has_at_most_25_terms_and_defines_each_once():
    terms = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    assert 20 <= len(terms) <= 25
    assert len(set(terms)) == len(terms)


def test_the_import_graph_is_current():
    """`make docs` refreshes it."""
    imported = architecture.imports()
    assert json.loads(architecture.DATA.read_text()) == imported, "run make docs"
    with Image.open(architecture.PICTURE) as picture:
        assert picture.text["Description"] == architecture.digest(imported)


def test_arrows_are_the_imports_that_no_chain_implies():
    imported = {"run": ["model", "errors", "files"], "model": ["errors"], "errors": [], "files": []}
    assert architecture.arrows(imported) == [("run", "model"), ("run", "files"), ("model", "errors")]
    assert architecture.levels(imported) == {"run": 2, "model": 1, "errors": 0, "files": 0}
    column = architecture.columns(imported)
    assert abs(column["errors"] - column["files"]) >= architecture.ARROW_GAP
    with pytest.raises(ValueError, match="import cycle: a -> b -> a"):
        architecture.levels({"a": ["b"], "b": ["a"]})


def test_programs_are_valid(page):
    for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        config = OmegaConf.to_container(OmegaConf.create(block))
        programs = config.get("variants") or {"": config}
        for name, program in programs.items():
            if program and all(isinstance(edit, dict) and "op" in edit for edit in program.values()):
                assert Program.from_config(program, name)


def test_every_setting_is_documented():
    text = (ROOT / "docs" / "from-python.md").read_text()
    assert [field.name for field in fields(Sampling) if f"`{field.name}`" not in text] == []


def commands(page: Path) -> list[list[str]]:
    """Return the `python -m` commands of a page's code blocks, fenced or indented, one list of words each."""
    text = re.sub(r"^```(?!sh|bash)\w+\n.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [line.strip() for line in lines if re.match(r"( {4})?python -m ", line)]
    return [shlex.split(line, comments=True)[2:] for line in found]


def test_commands_name_modules_experiments_and_keys_that_exist(page):
    if page.name == "CONTRIBUTING.md":
        pytest.skip("its commands belong to recipes, which tests/integration/test_recipes.py carries out")
    for module, *arguments in commands(page):
        assert importlib.util.find_spec(module), module
        known = {"--config-dir", "-m", "fluxlab.run"} & {*arguments, module}
        if known == {"fluxlab.run"}:
            compose("config", RunConfig, "schema", arguments)
        elif known == {"fluxlab.run", "-m"}:  # one combination
            compose("config", RunConfig, "schema", [word.partition(",")[0] for word in arguments if word != "-m"])


def test_commands_with_mistakes_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```sh\npython -m fluxlab.run +exp=artcle seeds=8   # a comment\n```\n")
    with pytest.raises(Exception, match="artcle"):
        test_commands_name_modules_experiments_and_keys_that_exist(page)
    page.write_text("```sh\npython -m fluxlab.run +exp=article sead=8\n```\n")
    with pytest.raises(Exception, match="sead"):
        test_commands_name_modules_experiments_and_keys_that_exist(page)


def test_the_index_lists_every_page():
    text = (ROOT / "docs" / "index.md").read_text()
    pages = {file.name for file in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert [name for name in sorted(pages) if f"]({name})" not in text] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fluxlab.__version__}\n" in text
    assert f"## {fluxlab.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_continuous_integration_runs_what_developers_run():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: .ci/run\n" in text
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


ODD_WORDS = r"\b(told|tells|hears|beside|hollow)\b"
"""Words of an earlier, odd style: use says, returns or reports, and next to."""

ALLOWED = {"fluxlab/assets/tiny/README.md": "repeats the notes of the training run"}


def test_texts_are_free_of_odd_words():
    texts = [path for folder in ("fluxlab", "docs", "experiments", "configs") for path in (ROOT / folder).rglob("*")]
    texts += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    texts = [path for path in texts if path.suffix in (".py", ".md", ".yaml", ".j2", ".js", ".css")]
    assert len(texts) > 150
    odd = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in texts
        for match in re.finditer(ODD_WORDS, path.read_text(encoding="utf-8"))
        if str(path.relative_to(ROOT)) not in ALLOWED
    ]
    assert not odd
