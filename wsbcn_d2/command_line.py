"""What the command lines of tools, demo and benchmarks have in common."""

import argparse
import os
from typing import Optional


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of the options that have one: required options have none."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return action.help if action.default is None else super()._get_help_string(action)


def file_name(text: str) -> str:
    """An argument that names a file in a folder given elsewhere, for ``type`` of an option."""
    if not text or os.path.basename(text) != text:
        raise argparse.ArgumentTypeError(f"{text!r} must be a name without a folder")
    return text


def seed(text: str) -> int:
    """A seed that PyTorch and NumPy take, for ``type`` of an option."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer from 0 to 2**32 - 1")
    return int(text)
