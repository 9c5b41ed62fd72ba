"""How `--help` looks. By itself, since jsonargparse's part of it is slow to import."""

from __future__ import annotations

import argparse

from jsonargparse import DefaultHelpFormatter

PRINT_CONFIG = "print all options as YAML, ready for --config, and exit"
HELP = "show this text and exit"


class HelpFormatter(DefaultHelpFormatter):
    """Types only where they tell something, in words; "null", as YAML has it, for "None"."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        text = super()._get_type_str(action)
        if text is None or text.startswith("str") or text == "bool":
            return None
        if "list[int]" in text:
            return "list of whole numbers"
        return {"int": "whole number", "float": "number"}.get(text.partition(" ")[0], text)

    def _get_help_string(self, action: argparse.Action) -> str:
        if "-h" in action.option_strings:
            return HELP
        if action.dest == "print_config":
            return PRINT_CONFIG
        if action.nargs == 0:  # A switch: off unless given.
            return action.help or ""
        return super()._get_help_string(action).replace("``", "").replace("None", "null")

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        return text.replace("default: True)", "default: true)").replace(
            "default: False)", "default: false)"
        )
