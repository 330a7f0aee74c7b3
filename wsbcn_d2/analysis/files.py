"""The JSON files of this package say what they are."""

import json
from typing import Any, Dict


def load_kind(path: str, kind: str) -> Dict[str, Any]:
    """Reads a JSON file whose "kind" must be ``kind``.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it holds something else.
    """
    with open(path) as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f'{path} is not the JSON file of a {kind}: its "kind" is not {kind!r}')
    return content
