"""YAML of configurations: what a text holds, or in one short line why it holds nothing that can be used. Torch-free."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML, SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode

from configs.errors import shortened

MOST_CHARACTERS = 2**17  # of a text: the pure Python parser takes about a second for so many
MOST_BRACKETS = 1000  # of a kind: nested ones take the parser seconds before it gives up
MOST_VALUES = 10_000  # of a text, after its aliases are replaced by what they stand for
LONGEST_MESSAGE = 300


class NotYamlError(Exception):
    """Why a text cannot be used, in one line."""


class _Constructor(SafeConstructor):
    """Numbers are decimal digits: `1_000`, which YAML 1.1 reads as 1000, stays the text that it is in YAML 1.2."""

    def construct_yaml_int(self, node: ScalarNode) -> Any:
        return node.value if "_" in node.value else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: ScalarNode) -> Any:
        return node.value if "_" in node.value else super().construct_yaml_float(node)


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)
_Constructor.add_constructor("tag:yaml.org,2002:float", _Constructor.construct_yaml_float)


def parse(text: str) -> Any:
    """The mappings, lists and scalars of a YAML 1.2 text. NotYamlError for other texts and for those of absurd size."""
    if len(text) > MOST_CHARACTERS:
        raise NotYamlError(f"it has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
    if max(text.count("["), text.count("{")) > MOST_BRACKETS:
        raise NotYamlError(f"it has more than {MOST_BRACKETS:,} brackets")
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        tree = yaml.load(text)
    except (YAMLError, ValueError, IndexError, RecursionError) as error:  # impossible dates, odd escapes, deep nesting
        message = " ".join(str(error).split()) or type(error).__name__
        raise NotYamlError(shortened(message, LONGEST_MESSAGE)) from error
    _count(tree)
    return tree


def _count(tree: Any) -> None:
    """NotYamlError if aliases make more of a short text than fits a configuration, or a value that contains itself."""
    values, count = [tree], 0
    while values:
        value = values.pop()
        count += 1
        if count > MOST_VALUES:
            raise NotYamlError(f"its aliases stand for more than {MOST_VALUES:,} values")
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple | set):
            values += value
