"""The configs in the files of mmdetection: Python code, of which only the syntax is read."""

import ast
import contextlib
from typing import Any, Dict, Iterator, List, Optional, Tuple


def parts_by_standardization(config: str) -> Tuple[List[str], List[str]]:
    """The parts of a model that have norms: those with standardized convolutions, and others."""
    parts: Dict[bool, Dict[str, None]] = {True: {}, False: {}}
    for node in _nodes(config):
        for name, value in _entries(node):
            for item in value.elts if isinstance(value, ast.List) else [value]:
                keys = dict(_entries(item))
                norm, conv = keys.get("norm_cfg"), keys.get("conv_cfg")
                if norm is None or getattr(norm, "value", norm) is None:
                    continue
                # A name stands for what is set elsewhere in the config.
                named = isinstance(conv, ast.Name)
                parts[named or (conv is not None and "ConvWS" in ast.dump(conv))][name] = None
    return list(parts[True]), list(parts[False])


def inputs(config: str) -> Tuple[Optional[Tuple[str, List[float], List[float]]], bool]:
    """Format of the images, mean and standard deviation of the pixels, if the config has them; and
    whether the stride is in the 1x1 convolutions (the ResNet's ``style``)."""
    found, caffe_style = None, False
    for node in _nodes(config):
        values = {key: _literal(value) for key, value in _entries(node)}
        to_rgb = values.get("to_rgb", values.get("bgr_to_rgb"))
        pixels = [values.get("mean"), values.get("std")]
        if to_rgb is not None and all(p and isinstance(p, (list, tuple)) for p in pixels):
            found = ("RGB" if to_rgb else "BGR", *map(list, pixels))
        caffe_style = caffe_style or values.get("style") == "caffe"
    return found, caffe_style


def _nodes(code: str) -> Iterator[ast.AST]:
    """The syntax of Python code, and of configs in texts within it."""
    with contextlib.suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(code)):
            yield node
            value = getattr(node, "value", None)
            if isinstance(value, str) and "norm_cfg" in value:
                yield from _nodes(value)


def _entries(node: Any) -> List[Tuple[str, Any]]:
    """Keys and values of a dictionary in Python code."""
    if isinstance(node, ast.Call):
        return [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
    if isinstance(node, ast.Dict):
        return [(k.value, v) for k, v in zip(node.keys, node.values) if isinstance(k, ast.Constant)]
    return []


def _literal(node: ast.AST) -> Any:
    """The value of code that is one, otherwise None."""
    with contextlib.suppress(TypeError, ValueError):  # the former of what cannot be hashed
        return ast.literal_eval(node)
    return None
