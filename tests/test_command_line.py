"""The help of command lines."""

import argparse

from wsbcn_d2.command_line import HelpFormatter


def test_only_defaults_that_there_are():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--steps", default=5, help="how many")
    text = parser.format_help()
    assert "file to write\n" in text and "how many (default: 5)" in text and "None" not in text
