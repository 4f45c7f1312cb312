"""Files with anything in them but what belongs there."""

import json
import os
from pathlib import Path

DEEP = 100_000

MALFORMED = {
    "empty": b"",
    "a space": b" ",
    "half": b'{"base": "b',
    "not UTF-8": b'{"base": "\xff\xfe"}',
    "UTF-16": '{"base": "b"}'.encode("utf-16"),
    "zeros": bytes(100),
    "deep list": b"[" * DEEP + b"]" * DEEP,
    "deep mapping": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a mapping deep inside": b'{"weight_map": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "a number beyond floats": b'{"inner": [[1e999]], "vocab_size": 1e999, "weight_map": 1e999}',
    "a number of many digits": b"9" * 10_000,
    "nothing": b"null",
    "a list": b"[]",
    "a text": b'"text"',
    "a number": b"1",
    "half a character": b'{"base": "\\ud800"}',
    "wrong types": json.dumps(
        {
            "base": 1,
            "contents": 2,
            "inner": "x",
            "weight_map": {"a": 1},
            "result": {"steps": "x"},
            "files": [1],
            "text_config": 1,
            "quantization_config": 1,
            "value": "much",
            "vocab_size": [],
            "hidden_size": "wide",
            "model": 1,
            "added_tokens": 1,
            "auto_map": 1,
            "extra_special_tokens": 1,
            "architectures": 1,
        }
    ).encode(),
    "a folder": None,
    "a pipe": "pipe",
}


def malform(file: Path, kind: str) -> None:
    """Put something in the place of a file."""
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = MALFORMED[kind]
    if content is None:
        file.mkdir()
    elif content == "pipe":
        os.mkfifo(file)
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)
