"""Command lines and config files: text stays as written, and every mistake is reported in one to three lines."""

import sys
import threading
from pathlib import Path

import pytest
import yaml

from fluxlab.compose import combinations, compose, debugging, flags, guarded
from fluxlab.compose.yaml_source import decode, encode
from fluxlab.errors import UserError
from fluxlab.run import RunConfig, main, usage

ODD_FOLDER = "Masterarbeit (März), v=2 [neu]"
TEXTS = [
    "No",
    "yes",
    "1_000",
    "1.50",
    "???",
    "a ${steps} year old cat",
    "null",
    "~",
    "0x1F",
    " a 'b' \"c\" \\ ",
    "ж, 猫",
]


def run_config(*words: str, folder: Path | None = None) -> RunConfig:
    return compose("config", RunConfig, "schema", words, folder)


@pytest.fixture
def configs(tmp_path):
    """Return a function that writes `exp/mine.yaml` into an oddly named folder and composes it."""
    folder = tmp_path / ODD_FOLDER
    (folder / "exp").mkdir(parents=True)

    def composed(content: str | bytes, *words: str, name: str = "mine.yaml") -> RunConfig:
        content = content if isinstance(content, bytes) else content.encode()
        (folder / "exp" / name).write_bytes(content)
        return run_config(f"+exp={Path(name).stem}", *words, folder=folder)

    return composed


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments)
    assert 1 <= len(str(raised.value).splitlines()) <= 3
    return str(raised.value)


# --- text stays as written


@pytest.mark.parametrize("text", [*TEXTS, ""])
def test_text_is_encoded_and_decoded(text):
    assert encode(text, "").isidentifier()
    assert decode({encode(text, ""): [f"in a message: {encode(text, '')}!"]}) == {text: [f"in a message: {text}!"]}


def test_prompts_in_quotes_are_taken_as_written(configs):
    assert configs(yaml.safe_dump({"name": "mine", "prompts": TEXTS}, allow_unicode=True)).prompts == TEXTS
    words = "prompts=[" + ",".join("'" + text.replace("'", "\\'") + "'" for text in TEXTS if "\\" not in text) + "]"
    assert run_config("+exp=hello", words).prompts == [text for text in TEXTS if "\\" not in text]


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("a red fox", ["a red fox"]),
        ("[a red fox, No]", ["a red fox", "No"]),
        ("[a cat's hat, (b), ein Mädchen]", ["a cat's hat", "(b)", "ein Mädchen"]),
        ("['a, b', \"c ] d\"]", ["a, b", "c ] d"]),
        ("[a ${steps} cat]", ["a ${steps} cat"]),
        ('["it\'s \\"new\\""]', ['it\'s "new"']),
        ("[]", []),
    ],
)
def test_prompts_of_a_command_line(value, prompts):
    assert run_config("+exp=hello", f"prompts={value}").prompts == prompts


@pytest.mark.parametrize("spelling", ["No", "yes", "on", "1_000", "1.50", "2024", "true", "null", "0x1F", ""])
def test_other_types_are_refused_where_text_is_expected(spelling, configs):
    said = spelling or "nothing"
    prompts = f"name: mine\nprompts:\n  - a cat\n  - {spelling}\n"
    assert f"exp/mine.yaml, line 4: prompts: YAML reads {said} as" in refusal(configs, prompts)
    words = f"name: mine\nvariants:\n  a:\n    x: {{op: zero, tokens: {{words: [cat, {spelling or '~'}]}}}}\n"
    message = refusal(configs, words)
    assert f"line 4: variants.a.x.tokens.words: YAML reads {spelling or '~'} as" in message
    assert f'write it in quotes: "{spelling or "~"}"' in message
    if spelling not in ("null", ""):
        for key in ("caption", "baseline", "negative_prompt", "out", "prompts_file", "name"):
            assert f"line 1: {key}: YAML reads {spelling} as" in refusal(configs, f"{key}: {spelling}\n")


@pytest.mark.parametrize("spelling", ["0.5", "1", "on", "1_000", "No"])
def test_names_that_are_not_text_are_refused_and_run_in_quotes(spelling, configs):
    body = "name: mine\nvariants:\n  {}: {{a: {{op: zero}}}}\n"
    assert f"mine.yaml, line 3: variants: YAML reads {spelling} as" in refusal(configs, body.format(spelling))
    assert list(configs(body.format(f'"{spelling}"')).variants) == ["baseline", spelling]
    assert f'write it in quotes: "{spelling}"' in refusal(
        configs, f"name: mine\nvariants: {{m: {{{spelling}: {{}}}}}}\n"
    )
    assert f'write it in quotes: "{spelling}"' in refusal(configs, f"name: mine\ncapture: {{{spelling}: {{}}}}\n")


@pytest.mark.parametrize("value", ["1_000", "1.50", "no", "2024", "a, b (c)", "März = 3", "${steps}", "???", "it's"])
def test_text_of_a_command_line_is_literal(value):
    config = run_config("+exp=hello", f"name={value}", f"caption={value}", f"negative_prompt={value}")
    assert (config.name, config.caption, config.negative_prompt) == (value, value, value)
    if value == "???":  # as a path it is a missing value
        return
    config = run_config("+exp=hello", f"out=/tmp/{value}/o", f"prompts_file={value}", "steps=3")
    assert config.out == f"/tmp/{value}/o".replace("${steps}", "3")
    assert config.prompts_file == value.replace("${steps}", "3")
    assert config.prompts == []


def test_quotes_around_text_of_a_command_line_are_not_part_of_it():
    config = run_config("+exp=hello", "caption='a, b'", 'out="c d"', "negative_prompt=null")
    assert (config.caption, config.out, config.negative_prompt) == ("a, b", "c d", None)


def test_the_composed_config_reads_back(configs):
    body = yaml.safe_dump({"name": "mine", "prompts": TEXTS}, allow_unicode=True)
    configs(body)
    shown = compose("config", RunConfig, "schema", ["+exp=mine"], Path(_folder(configs)), show=True)
    assert yaml.safe_load(shown)["prompts"] == TEXTS


def _folder(configs) -> Path:
    return next(cell.cell_contents for cell in configs.__closure__ if isinstance(cell.cell_contents, Path))


# --- prompts and prompts_file


def test_prompts_and_a_file_of_prompts_replace_each_other(configs):
    assert configs("name: mine\nprompts_file: p.txt\n").prompts == []
    assert configs("name: mine\nprompts_file: p.txt\n", "prompts=[a]").prompts_file is None
    assert configs("name: mine\nprompts: [a]\n", "prompts_file=p.txt").prompts == []
    assert configs("name: mine\nprompts: [a]\n").prompts_file is None
    assert "both" in refusal(configs, "name: mine\nprompts: [a]\nprompts_file: p.txt\n")
    assert "prompts and prompts_file" in refusal(run_config, "+exp=hello", "prompts=[a]", "prompts_file=p.txt")


# --- files as editors and people write them


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf# @package _global_\r\n", b"# a comment\n"])
@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml", "März 2.yaml"])
def test_an_experiment_needs_no_header(start, name, configs):
    assert configs(start + b"name: mine\r\nprompts: [a]\r\nsteps: 3\r\n", name=name).steps == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nvariants:\n\thalf: {}\n", "line 3: a tab; indent with spaces"),
        ("name: a\nvariants:\n  x: {a: {op: zero}\nseeds: 2\n", "line 4: .*is the { of line 3 closed"),
        ("name: a\nseeds: [1\n", "line 3: "),
        ("name: a\nprompts: ['a\n", "line 3: "),
        ("name: a\nname: b\n", "line 2: the key name was set in line 1 already"),
        ("name: a\nvariants: {m: {}, m: {}}\n", "line 2: the key m was set in line 2 already"),
        ("name: a\ncaption: a: b\n", "line 2: a second colon; write a value that contains one in quotes"),
        ("name: a\ncaption: \x07\n", r"line 2: the character '\\x07' is not allowed"),
        (b"name: a\ncaption: caf\xe9\n", "line 2: not UTF-8 .*save the file as UTF-8"),
        ("name: a\n".encode("utf-16"), "line 1: not UTF-8"),
        ("- name: a\n", r"holds \[\{'name': 'a'\}\], expected keys with values"),
        ("just words", "holds 'just words', expected keys"),
        ("name: a\nsteps: " + "9" * 5000, "mine.yaml: Exceeds the limit"),
        ("name: a\nx: " + "[" * 1500, "nested too deeply|line 2"),
        ("? [a, b]\n: c\n", "line 1: a key must be a single word"),
        ('name: "\\ud83d"\n', "line 1: .* half a character"),
        ("name: a\ndefaults: 3\n", "defaults"),
        ("name: a\nstepz: 3\n", "exp/mine: stepz: there is no such key; did you mean steps"),
        ("name: a\nseeds: [010]\n", "line 2: YAML reads 010 as an octal number; write it in decimal digits"),
        ("name: a\nsteps: 1:30\n", "line 2: YAML reads 1:30 as a number of base 60"),
        ("name: a\nsteps: many\n", "steps: 'many', expected a whole number"),
        ("name: a\nplan: maybe\n", "plan: 'maybe', expected true or false"),
        ("name: a\nout: runs/${seedz}\n", r"\$\{seedz\}: there is no key seedz to fill in; did you mean seeds"),
        ("caption: none\n", "name is missing"),
    ],
)
def test_mistakes_in_a_file_are_reported_with_their_line(content, message, configs):
    import re

    assert re.search(message, refusal(configs, content))


def test_the_help_lists_experiments_that_cannot_be_read(configs):
    with pytest.raises(UserError):
        configs("name: a\nvariants:\n\thalf: {}\n")
    (line,) = [line for line in usage(_folder(configs)).splitlines() if line.startswith("  mine ")]
    assert "(cannot be read: line 3: a tab" in line


# --- mistakes on the command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=4,20"], "steps=4,20: several values; .* -m runs each"),
        (["seeds=range(3)"], "several values"),
        (["guidance=3,5"], "a decimal comma is written as a point"),
        (["prompts=a cat, a dog"], r"""prompts='\["a cat","a dog"\]'"""),
        (["prompts=[a, 1.50]"], r"""prompts: 1.50 is not text; write it in quotes: prompts='\["1.50"\]'"""),
        (["prompts=1_000"], "1_000 is not text"),
        (["prompts=[a"], "the list is not closed"),
        (["prompts=[a,,b]"], 'an empty prompt as ""'),
        (["prompts=[“a cat”]"], "typographic quote"),
        (["prompts=['a' b]"], "quotes must enclose a whole prompt"),
        (["prompts=[caf\udce9]"], "not valid text"),
        (["seedz=3"], "seedz: there is no such key; did you mean seeds"),
        (["+seedz=3"], "seedz: there is no such key; did you mean seeds"),
        (["variants.hlaf.a.factor=1"], "variants has no key hlaf; did you mean half"),
        (["variants.half.b.factor=1"], "variants.half has no key b; known: a; .*'.variants.half.b=…'"),
        (["~variants.zro"], "variants has no key zro; did you mean zero.$"),
        (["variants." + "x" * 300 + "=1"], "a key of 309 characters"),
        (["half", "double"], "half: expected key=value"),
        (["steps", "=", "4"], "steps: expected key=value"),
        (["–cfg"], "starts with a long dash"),
        (["steps=[1"], "brackets do not match"),
        (["+variants.größe={}"], "cannot be a key on the command line"),
        (["+variants={0.5: {}}"], "a name is text"),
        (["seeds=[" + "1" * 5000 + "]"], "too many digits"),
        (["seeds=" + "[" * 2000], "brackets|nested"),
        (["steps=1e400"], "steps: 'inf', expected a whole number"),
        (["device=a b, c!"], "in quotes, as in device="),
        (["model=dve"], "model=dve: there is none; did you mean dev.; available: "),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    import re

    assert re.search(message, refusal(run_config, "+exp=article", *words))


@pytest.mark.parametrize("words", [["--variants", "half", "double"], ["--steps=3"], ["--verbose"]])
def test_keys_with_dashes(words):
    message = refusal(flags, ["+exp=article", *words])
    assert f"Keys have no dashes: {words[0].strip('-').partition('=')[0]}=<value>" in message


# --- several runs


def test_combinations_name_their_settings_and_their_own_command():
    every = combinations("config", RunConfig, "schema", ["+exp=hello", "steps=2,3", "prompts=[a],['b, c']", "seeds=1"])
    assert [c.settings for c in every] == [f"steps={n}  prompts={p}" for n in (2, 3) for p in ("[a]", "['b, c']")]
    assert every[1].words == ["+exp=hello", "steps=2", "prompts=['b, c']", "seeds=1"]
    assert [(c.config.steps, c.config.prompts) for c in every] == [(n, [p]) for n in (2, 3) for p in ("a", "b, c")]
    (alone,) = combinations("config", RunConfig, "schema", ["+exp=hello", "out=runs/a, b/${steps}", "steps=7"])
    assert (alone.config.out, alone.settings) == ("runs/a, b/7", "")
    every = combinations("config", RunConfig, "schema", ["+exp=hello,article", "name=1_0", "seeds=range(1,3)"])
    assert [(len(c.config.variants), c.config.name, c.config.seeds) for c in every] == [
        (n, "1_0", seeds) for n in (1, 6) for seeds in (1, 2)
    ]
    assert len(combinations("config", RunConfig, "schema", ["+exp=hello", "tracking=glob(*)"])) == 2


def test_combinations_that_share_a_folder_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for shared in (["out=o", "steps=2,3"], ["batch_tokens=600,700"], ["capture=words,full"]):
        assert main(["-m", "+exp=hello", "tracking=none", *shared]) == 2
        message = capsys.readouterr().err
        assert "would both be written into" in message
        assert f"/${{{shared[-1].partition('=')[0]}}}'" in message
    assert not list(tmp_path.iterdir())


# --- other programs in the same process


def test_another_hydra_in_the_process_is_left_alone(tmp_path):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir, version
    from hydra.core.config_store import ConfigStore

    (tmp_path / "config.yaml").write_text("a: 1\n")
    node = {"mine": 1}
    ConfigStore.instance().store(name="schema", node=node)
    with initialize_config_dir(str(tmp_path), version_base="1.1"):
        assert run_config("+exp=hello").name == "hello"
        assert hydra_compose("config").a == 1
        assert str(version.getbase()) == "1.1"
    assert ConfigStore.instance().repo["schema.yaml"].node == node
    del ConfigStore.instance().repo["schema.yaml"]


def test_threads_compose_at_the_same_time():
    made: dict[int, str] = {}

    def work(i: int) -> None:
        made[i] = run_config("+exp=hello", f"steps={i}").steps

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {i: i for i in range(1, 9)}


def test_a_kernel_s_arguments_are_not_read(monkeypatch, capsys):
    kernel = ["ipykernel_launcher.py", "-f", "/home/x/kernel-1.json"]
    monkeypatch.setattr(sys, "argv", kernel)
    assert main([]) == 0
    assert main(["-m", "+exp=hello", "steps=0,-1"]) == 2
    assert sys.argv is kernel
    assert "2 of the 2 combinations failed" in capsys.readouterr().err


# --- exit codes


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


def test_exit_codes(capsys, monkeypatch):
    assert guarded(lambda: None, "") == 0
    assert guarded(raising(KeyboardInterrupt()), "interrupted") == 130
    assert guarded(raising(UserError("a\n\nb\nc\nd")), "") == 2
    assert capsys.readouterr().err == "interrupted\na\nb\nc\n"
    assert guarded(raising(FileNotFoundError(2, "No such file", "x.txt")), "") == 2
    for bug in (ValueError("ours"), OSError("no file named"), KeyError("k"), RuntimeError("op")):
        with pytest.raises(type(bug)):
            guarded(raising(bug), "")
    monkeypatch.setenv("FLUXLAB_DEBUG", "1")
    with pytest.raises(UserError):
        guarded(raising(UserError("shown with its traceback")), "")
    assert debugging()
