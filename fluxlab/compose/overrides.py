"""The words of a command line, made ready for Hydra: one list of alternatives per word.

Hydra's grammar of overrides does not know spaces, parentheses, `=` or umlauts outside quotes, and reads `1_000` as a
number. Values that are text or paths are therefore taken literally here, and Hydra reads all others.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from fluxlab.compose.yaml_source import PATH_KEYS, TEXT_KEYS, encode
from fluxlab.errors import UserError, show

_GROUP = re.compile(r"\+?\+?(exp|model|capture|tracking|train|op)(@[\w.]*)?")
_FUNCTION = re.compile(r"(choice|range|glob|sort|shuffle|interval|tag|int|float|str|bool)\s*\(")


@dataclass(frozen=True)
class Word:
    """One word of a command line. `typed` is what its alternatives look like there, `prepared` what Hydra gets."""

    key: str
    typed: tuple[str, ...]
    prepared: tuple[str, ...]


def read_words(words: Sequence[str], loader: ConfigLoader | None = None, multirun: bool = False) -> list[Word]:
    """Return the words ready for Hydra. With `multirun` a word may have several alternatives.

    Raises UserError for a word that is not `key=value`, a value that cannot be read, several values without -m, and for
    `prompts` together with `prompts_file`.
    """
    parser = OverridesParser.create(config_loader=loader)
    read = [_read(word, parser, multirun) for word in words]
    keys = {word.key: word for word in read}
    if "prompts" in keys and "prompts_file" in keys and keys["prompts_file"].prepared != ("prompts_file=null",):
        raise UserError("prompts and prompts_file: both are given; leave one of them out")
    if "prompts" in keys:
        read.append(Word("prompts_file", (), ("prompts_file=null",)))
    elif "prompts_file" in keys:
        read.append(Word("prompts", (), ("prompts=[]",)))
    return read


def _read(word: str, parser: OverridesParser, multirun: bool) -> Word:
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UserError(f"{word!a}: not valid text in this terminal's encoding; type it as UTF-8") from None
    if word[:1] in "–—−":
        raise UserError(f"{word}: starts with a long dash; a flag starts with -")
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if len(key) > 200:
        raise UserError(f"{show_word(key)}: a key of {len(key)} characters; choose shorter names")
    if not equals and not word.startswith("~"):
        raise UserError(f"{word}: expected key=value, without spaces around =; --help lists the keys")
    if name == "prompts":
        alternatives = list(_prompts(value, parser, multirun))
    elif name in TEXT_KEYS or name in PATH_KEYS or name.startswith("prompts."):
        alternatives = [(text, _literal(name, text, parser)) for text in _values(name, value, multirun)]
    else:
        return _other(word, name, parser, multirun)
    return Word(name, tuple(f"{key}={text}" for text, _ in alternatives), tuple(f"{key}={v}" for _, v in alternatives))


def _values(key: str, value: str, multirun: bool) -> list[str]:
    """Return the alternatives of a text or path. A comma separates them with -m only, and never in `out`."""
    parts = split(value) if multirun and key != "out" and not _FUNCTION.match(value) else [value]
    return parts if len(parts) > 1 else [value]


def _literal(key: str, value: str, parser: OverridesParser) -> str:
    """Return a value of Hydra's grammar that means just the text `value`, or what its quotes enclose."""
    if value == "null":
        return value
    text = _unquoted(value, parser)
    text = value if text is None else text
    return QuotedString(text, Quote.single).with_quotes() if key in PATH_KEYS else encode(text, key)


def _prompts(value: str, parser: OverridesParser, multirun: bool) -> Iterator[tuple[str, str]]:
    parts = split(value)
    if len(parts) > 1 and not multirun:
        quoted = ",".join(f'"{part}"' for part in parts)
        raise UserError(f"prompts={show_word(value)}: write a list: prompts='[{quoted}]'\nWith -m each value is a run.")
    for part in parts:
        if part.startswith("[") and not part.endswith("]"):
            raise UserError(f"prompts={show_word(part)}: the list is not closed with ]")
        inside = part[1:-1].strip() if part.startswith("[") else part
        items = [] if part.startswith("[") and not inside else split(inside) if part.startswith("[") else [part]
        yield part, "[" + ",".join(encode(_prompt(item, parser), "prompts") for item in items) + "]"


def _prompt(item: str, parser: OverridesParser) -> str:
    """Return the text of one element of the list. Raises UserError for what Hydra reads as another type."""
    if not item:
        raise UserError('prompts: one is empty; write an empty prompt as ""')
    if item[0] in "“”„«‘‚":
        raise UserError(f"prompts: {show_word(item)} starts with a typographic quote; use straight quotes, \" or '")
    if item[0] in "'\"":
        text = _unquoted(item, parser)
        if text is None:
            raise UserError(
                f"prompts: {show_word(item)}: quotes must enclose a whole prompt; write a quote inside as \\{item[0]}"
            )
        return text
    value = _parse(item, parser)
    if isinstance(value, str):
        return value
    if value is _UNREADABLE:
        return item
    raise UserError(f"prompts: {item} is not text; write it in quotes: prompts='[\"{item}\"]'")


_UNREADABLE = object()


def _parse(text: str, parser: OverridesParser) -> Any:
    """Return a primitive value of Hydra's grammar, or `_UNREADABLE`."""
    try:
        return parser.parse_override(f"x={text}")._value
    except (HydraException, ValueError, RecursionError):
        return _UNREADABLE


def _unquoted(text: str, parser: OverridesParser) -> str | None:
    """Return what quotes enclose; None where `text` as a whole is not in quotes."""
    if text[:1] in ("'", '"') and text[-1:] == text[0] and len(text) > 1:
        value = _parse(text, parser)
        return value.text if isinstance(value, QuotedString) else None
    return None


def _other(word: str, name: str, parser: OverridesParser, multirun: bool) -> Word:
    try:
        override = parser.parse_override(word)
        override.config_loader = parser.config_loader
    except (HydraException, ValueError, RecursionError) as error:
        key, _, value = word.partition("=")
        if _GROUP.fullmatch(key):  # the name of a file, such as März
            return Word(name, (word,), (f"{key}={QuotedString(value, Quote.single).with_quotes()}",))
        raise UserError(f"{show_word(word)}: {_reason(error, word)}") from None
    if not override.is_sweep_override():
        return Word(name, (word,), (word,))
    if not multirun:
        point = "; a decimal comma is written as a point" if re.fullmatch(r"[^=]+=[-+]?\d+,\d+", word) else ""
        raise UserError(
            f"{show_word(word)}: several values; write one, or a list as [3,5]; -m runs each of them{point}"
        )
    if not override.is_discrete_sweep():
        raise UserError(f"{show_word(word)}: an interval has no list of values; write them out, as a,b,c")
    values = tuple(f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator())
    if not values:
        raise UserError(f"{show_word(word)}: no value matches")
    return Word(name, values, values)


def _reason(error: Exception, word: str) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, HydraException):
        return "a number of too many digits"
    key, _, value = word.partition("=")
    if not re.fullmatch(r"[+~]{0,2}[\w.$/@:-]*", key, re.ASCII):
        return f"{key} cannot be a key on the command line; use letters, digits and _, or set it in a YAML file"
    counts = [(value.count(a), value.count(b), a) for a, b in ("[]", "{}", "()")]
    open_ones = [bracket for opened, closed, bracket in counts if opened != closed]
    if open_ones:
        return f"brackets do not match ({open_ones[0]})"
    return f"cannot be read; put text with spaces, commas or signs in quotes, as in {key}='\"…\"'"


def split(text: str) -> list[str]:
    """Return the parts of `text` between commas outside quotes and brackets, without surrounding spaces."""
    parts, depth, quote, start, i = [], 0, "", 0, 0
    while i < len(text):
        c = text[i]
        if c == "\\":
            i += 1
        elif quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and (text[:i].rstrip()[-1:] or ",") in ",[{:":  # where a value starts
            quote = c
        elif c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth <= 0:
            parts.append(text[start:i].strip())
            start = i + 1
        i += 1
    return [*parts, text[start:].strip()]


def show_word(word: str, most: int = 80) -> str:
    """Return a word of the command line, shortened in its middle."""
    return word if len(word) <= most else show(word, most)[1:-1]
