"""Which text tokens spell a word: whole words of any script, numbers, punctuation, and words that occur twice."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.errors import UserError
from fluxlab.select.words import Prompt, find_word, named_words, split_words


def letters(text: str) -> Prompt:
    """A prompt with one token per character, spaces without one."""
    return Prompt(text, tuple((i, i + 1) if c.strip() else (0, 0) for i, c in enumerate(text)))


def found(text: str, word: str) -> tuple[int, str]:
    """Where a word is found and what its tokens spell."""
    tokens = find_word(letters(text), word, "a.words")
    return tokens[0], "".join(text[i] for i in tokens)


@pytest.mark.parametrize(
    ("text", "word", "start", "spelt"),
    [
        ("a cat on a mat", "cat", 2, "cat"),
        ("a cat on a mat", "CAT", 2, "cat"),
        ("a cat says hello  world", "hello world", 11, "helloworld"),
        ("a cat's tail", "cat", 2, "cat"),
        ("a cat’s tail", "cat's", 2, "cat’s"),
        ("don’t stop", "don't", 0, "don’t"),
        ("a hello-world sign", "hello-world", 2, "hello-world"),
        ("a well\u2011known cat", "well-known", 2, "well\u2011known"),
        ("一只猫坐在垫子上", "猫", 2, "猫"),
        ("一只猫坐在垫子上", "垫子", 5, "垫子"),
        ("赤いカメラと猫", "カメラ", 2, "カメラ"),
        ("iPhone手机", "iPhone", 0, "iPhone"),
        ("고양이가 잔다", "고양이가", 0, "고양이가"),
        ("แมวสีดำ", "แมว", 0, "แมว"),
        ("काली बिल्ली", "बिल्ली", 5, "बिल्ली"),
        ("чёрный кот", "кот", 7, "кот"),
        ("I play C#2 in C++", "C#2", 7, "C#2"),
        ("I play C# in C++", "C#", 7, "C#"),
        ("I play C# in C++", "C++", 13, "C++"),
        ("C and C and C#", "C#2", 6, "C"),
        ("C# or C#", "C#2", 6, "C#"),
        ("C# or C#", "C##2", 6, "C#"),
        ("cat#2 and cat", "cat#2", 0, "cat#2"),
        ("3.5 of 5 cats", "5", 7, "5"),
        ("3.5 of 5 cats", "3.5", 0, "3.5"),
        ("at 12:30, 1,000 cats", "1,000", 10, "1,000"),
        ("50% off, US$5", "50%", 0, "50%"),
        ("50% off, US$5", "$5", 11, "$5"),
        ("hello, world!", "!", 12, "!"),
        ("hello, world!", "hello,", 0, "hello,"),
        ("a “red” cat", "red", 3, "red"),
        ("a cat 🐱 here", "🐱", 6, "🐱"),
        ("ＣＡＴ１２", "cat12", 0, "ＣＡＴ１２"),
        ("cafe\u0301 noir", "café", 0, "cafe\u0301"),
        ("a re\u200bd cat", "red", 2, "re\u200bd"),
        ("snake_case", "snake_case", 0, "snake_case"),
    ],
)
def test_a_word_is_found(text, word, start, spelt):
    assert found(text, word) == (start, spelt)


@pytest.mark.parametrize(
    ("text", "word", "hint"),
    [
        ("a catalogue", "cat", "did you mean catalogue?"),
        ("a hello-world sign", "hello", "did you mean hello-world?"),
        ("I can't", "can", "did you mean can't?"),
        ("I play C++", "C", "did you mean C++?"),
        ("I play C#2", "C", "did you mean C#2?"),
        ("3.5 cats", "3", "3.5"),
        ("1,000 cats", "000", "1,000"),
        ("cafe\u0301", "cafe", "did you mean café?"),
        ("a dog", "cat", "which has: a, dog"),
        ("!", "cat", "which has: no words"),
        ("", "cat", "which has: no words"),
    ],
)
def test_half_a_word_is_not_found(text, word, hint):
    with pytest.raises(UserError) as error:
        find_word(letters(text), word, "a.words")
    assert str(error.value).startswith(f"a.words: {word!r} is not in the prompt")
    assert hint in str(error.value)


def test_of_a_word_that_occurs_twice_one_must_be_named():
    text = "a cat beside a cat"
    with pytest.raises(UserError, match=r"'cat' occurs 2 times .* cat#1 \(…a cat beside a ca…\), cat#2 \(…"):
        found(text, "cat")
    assert found(text, "cat#1") == (2, "cat")
    assert found(text, "cat#2") == (15, "cat")
    for number in ("cat#0", "cat#3", "cat#999999999"):
        with pytest.raises(UserError, match=f"{number!r} occurs 2 times"):
            found(text, number)
    assert found("猫と猫", "猫#2") == (2, "猫")
    assert found("an and an", "an#2") == (7, "an")


def test_a_message_stays_short():
    with pytest.raises(UserError) as error:
        find_word(letters("word " * 500 + "x" * 5000), "y" * 5000, "a.words")
    assert len(str(error.value)) < 600
    with pytest.raises(UserError) as error:
        find_word(letters("word " * 500), "word", "a.words")
    assert len(str(error.value)) < 600


def test_a_word_that_the_encoder_reads_as_part_of_another_token_is_refused():
    text = "一只猫"
    prompt = Prompt(text, ((0, 3), (0, 0)))
    with pytest.raises(UserError, match="'猫' has no token of its own: the text encoder reads '一只猫' as one"):
        find_word(prompt, "猫", "t")
    assert find_word(prompt, text, "t") == [0]


def test_a_word_that_the_encoder_ignores_is_refused():
    with pytest.raises(UserError, match="'!' is ignored by the text encoder: no text token covers it"):
        find_word(Prompt("hi! you", ((0, 2), (4, 7))), "!", "t")
    with pytest.raises(UserError, match="'!' was cut off or is ignored: it lies beyond the last of the 2 text tokens"):
        find_word(Prompt("hi you!", ((0, 2), (3, 6))), "!", "t")


def test_named_words_are_what_find_word_finds():
    prompt = letters("A cat's C++ and a Cat, 猫 and 猫: 3.5!")
    words = named_words(prompt)
    assert [name for name, _ in words] == [
        "A#1", "cat's", "C++", "and#1", "a#2", "Cat", "猫#1", "and#2", "猫#2", "3.5",
    ]  # fmt: skip
    for name, tokens in words:
        if name != "Cat":  # cat's holds another cat
            assert find_word(prompt, name, "t") == tokens


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["a", "B", "9", "e\u0301", "é", "ｓ", "_", "猫", "カ", *" \n.,-'#+!"]), max_size=12))
def test_words_cover_a_text_once_and_each_is_found(characters):
    text = "".join(characters)
    spans = split_words(text)
    assert all(start < end for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    prompt = letters(text)
    for start, end in spans:
        word = text[start:end]
        for n in range(1, len(spans) + 1):
            try:
                tokens = find_word(prompt, f"{word}#{n}", "t")
            except UserError:
                continue
            if tokens[0] == start:
                break
        else:
            pytest.fail(f"{word!r} of {text!r} is not found")
