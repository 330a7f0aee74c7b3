"""What the command lines of tools, demo and benchmarks have in common."""

import argparse
from typing import Optional


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of the options that have one: required options have none."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return action.help if action.default is None else super()._get_help_string(action)
