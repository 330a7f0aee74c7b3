"""The help of command lines."""

import argparse

import pytest

from wsbcn_d2.command_line import HelpFormatter, file_name, seed


def test_only_defaults_that_there_are():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--steps", default=5, help="how many")
    text = parser.format_help()
    assert "file to write\n" in text and "how many (default: 5)" in text and "None" not in text


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (file_name, "", "'' must be a name without a folder"),
        (file_name, "a/b", "'a/b' must be a name without a folder"),
        (seed, "-1", "'-1' must be an integer from 0 to"),
        (seed, str(2**32), "must be an integer from 0 to"),
        (seed, "x", "'x' must be an integer"),
    ],
)
def test_arguments_that_are_refused(kind, text, message, capsys):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--option", type=kind)
    with pytest.raises(argparse.ArgumentError, match=message):
        parser.parse_args([f"--option={text}"])
    assert parser.parse_args(["--option", "7"]).option == kind("7")
