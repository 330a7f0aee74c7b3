"""The JSON files of this package say what they are."""

import json
from typing import Any, Dict, Sequence


def load_kind(path: str, kind: str, lists: Sequence[str]) -> Dict[str, Any]:
    """Reads a JSON file whose "kind" must be ``kind``, and which must have these lists.

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
    for key in lists:
        if not isinstance(content.get(key), list) or not content[key]:
            raise ValueError(f'{path} is not complete: it has no list "{key}", or an empty one')
    return content
