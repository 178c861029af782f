"""Prompts from a file."""

import codecs
import json
from os import PathLike
from pathlib import Path

from fluxlab.errors import UserError, show


def read_prompts(path: "str | PathLike[str]") -> list[str]:
    """Return the prompts of a UTF-8 file, in order.

    A text file has one prompt per line. Spaces around a prompt, blank lines and lines that start with # are ignored. In
    a .jsonl file each line is a JSON string, or an object with the key `prompt` (other keys are ignored). Such a prompt
    is used as it is: it may start with # or be empty.

    Raises UserError naming file and line if the file cannot be read, has no prompt, or has a prompt twice.
    """
    file = Path(path).expanduser()
    jsonl = file.suffix.lower() == ".jsonl"
    prompts: dict[str, int] = {}
    for number, line in enumerate(_lines(file), 1):
        line = line.strip()
        if not line or (line.startswith("#") and not jsonl):
            continue
        prompt = _from_json(line, f"{file}, line {number}") if jsonl else line
        if prompt in prompts:
            raise UserError(
                f"{file}, lines {prompts[prompt]} and {number}: {show(prompt)} occurs twice; remove one of them"
            )
        prompts[prompt] = number
    if not prompts:
        raise UserError(f"{file}: no prompt found; write one per line")
    return list(prompts)


def _lines(file: Path) -> list[str]:
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{file}: a folder; expected a file with one prompt per line") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return content.decode().split("\n")  # splitlines would also split at U+2028
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _from_json(line: str, where: str) -> str:
    accepted = 'expected {"prompt": "…"} or a JSON string'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {show(line)}, {accepted} ({error})") from None
    if isinstance(value, dict) and "prompt" not in value:
        raise UserError(f"{where}: no key prompt, only {', '.join(value) or 'none'}; {accepted}")
    prompt = value["prompt"] if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError(f"{where}: {show(prompt)}, {accepted}")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # a lone "\ud83d" is valid JSON
        raise UserError(f"{where}: {prompt!a} contains half a character (a lone surrogate)") from None
    return prompt
