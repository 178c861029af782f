"""Prompts from a file."""

import codecs
import json
from os import PathLike
from pathlib import Path

from fluxlab.errors import UserError, show


def read_prompts(path: "str | PathLike[str]") -> list[str]:
    """The prompts of a UTF-8 file, in its order.

    One prompt a line, spaces around it left out, blank lines and lines that open with # skipped. In a file whose name
    ends in .jsonl each line that is not blank is a JSON string, or an object with the key `prompt` (its other keys are
    ignored); such a prompt is taken as it stands, and may open with # or be empty.

    Raises `UserError` naming the file and the line for what cannot be read, a file without a prompt, and a prompt that
    is there twice: its pictures would be the same.
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
                f"{file}, lines {prompts[prompt]} and {number}: {show(prompt)} is there twice; leave one of them out"
            )
        prompts[prompt] = number
    if not prompts:
        raise UserError(f"{file}: no prompt in it; write one a line")
    return list(prompts)


def _lines(file: Path) -> list[str]:
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{file}: a folder; name a file with one prompt a line") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return content.decode().split("\n")  # splitlines would also cut a prompt at U+2028 and the like
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
        raise UserError(f"{where}: no key prompt among {', '.join(value) or 'none'}; {accepted}")
    prompt = value["prompt"] if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError(f"{where}: {show(prompt)} is no prompt, {accepted}")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # "\ud83d" without its other half is valid JSON
        raise UserError(f"{where}: {prompt!a} holds half a character (a lone surrogate)") from None
    return prompt
