"""Tokenizers read without transformers give what transformers gives."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.checkpoints.fast_tokenizer import CLASSES, FastTokenizer, class_name, read_fast_tokenizer
from fluxlab.checkpoints.random import tokenizers
from fluxlab.checkpoints.tokenizer_files import load_tokenizer
from fluxlab.config import PACKAGE
from fluxlab.model.text import unknown_parts, words_cut
from fluxlab.scenes import VOCABULARY

TINY = PACKAGE / "assets" / "tiny"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(ours, transformers') of the embedded model and of a T5 whose tokens are parts of words."""
    from transformers import PreTrainedTokenizerFast

    unigram = tmp_path_factory.mktemp("t5")
    tokenizers(("cat", "holding"))[1].save_pretrained(unigram)
    folders = [TINY / "tokenizer", TINY / "tokenizer_2", unigram]
    made = [
        (read_fast_tokenizer(folder, CLASSES[0]), PreTrainedTokenizerFast.from_pretrained(folder)) for folder in folders
    ]
    assert all(isinstance(ours, FastTokenizer) for ours, _ in made)
    return made


words = st.sampled_from(
    [*VOCABULARY, "<pad>", "<unk>", "<eos>", "<bos>", "</s>", "zebra", "é", "😀", "\n", ",", " ", "▁"]
)
texts = st.one_of(st.lists(words, max_size=40).map(" ".join), st.text(max_size=40))


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(2, 60))
def test_equal_tokens(pairs, text, length):
    for ours, theirs in pairs:
        one, other = (t(text, return_offsets_mapping=True, truncation=False, verbose=False) for t in (ours, theirs))
        assert one.input_ids == other.input_ids
        assert list(map(tuple, one.offset_mapping)) == list(map(tuple, other.offset_mapping))
        cut = {"truncation": True, "max_length": length, "return_offsets_mapping": True}
        assert ours(text, **cut).input_ids == theirs(text, **cut).input_ids
        padded = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        one, other = ours([text, "a cat"], **padded).input_ids, theirs([text, "a cat"], **padded).input_ids
        assert one.equal(other)
        assert one.dtype == other.dtype
        assert words_cut(ours, text, length) == words_cut(theirs, text, length)
        assert unknown_parts(ours, text) == unknown_parts(theirs, text)


def test_equal_vocabularies(pairs):
    for ours, theirs in pairs:
        assert ours.get_vocab() == theirs.get_vocab()
        assert len(ours) == len(theirs)
        assert set(ours.all_special_tokens) == set(theirs.all_special_tokens)
        assert set(ours.all_special_ids) == set(theirs.all_special_ids)
        assert ours.model_max_length == theirs.model_max_length


def test_everything_else_is_transformers(pairs, tmp_path):
    ours, theirs = pairs[0]
    assert ours.convert_tokens_to_ids("<pad>") == theirs.convert_tokens_to_ids("<pad>")
    ours.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "tokenizer.json").read_text())["model"]
        == json.loads((TINY / "tokenizer" / "tokenizer.json").read_text())["model"]
    )
    assert class_name(ours) == CLASSES[0]
    assert class_name(theirs) == type(theirs).__name__
    assert copy.deepcopy(ours) is ours
    with pytest.raises(AttributeError):
        _ = ours.no_such_name


@pytest.mark.parametrize("change", ["a key", "a file", "no pad", "an unlisted mark", "no config", "damaged", "class"])
def test_what_only_transformers_knows_is_left_to_it(tmp_path, change):
    folder = Path(shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer"))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    assert read_fast_tokenizer(folder, CLASSES[1])
    if change == "a key":
        config["add_bos_token"] = True
    elif change == "a file":
        (folder / "special_tokens_map.json").write_text("{}")
    elif change == "no pad":
        del config["pad_token"]
    elif change == "an unlisted mark":
        config["mask_token"] = "<mask>"
    elif change == "damaged":
        (folder / "tokenizer.json").write_text("{")
    file.write_text(json.dumps(config))
    if change == "no config":
        file.unlink()
    assert read_fast_tokenizer(folder, "CLIPTokenizer" if change == "class" else CLASSES[1]) is None


def test_the_random_model_has_one_of_each_kind(tmp_path):
    from fluxlab.checkpoints.random import write_random

    folder = write_random(tmp_path)
    assert not isinstance(load_tokenizer(folder, "clip"), FastTokenizer)
    assert isinstance(load_tokenizer(folder, "t5"), FastTokenizer)
