"""Strict YAML: mappings, sequences and scalars that every reader understands alike."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from erasediff.errors import UserError, reason

MAX_CHARACTERS = 1_000_000
MAX_DEPTH, MAX_VALUES = 20, 10_000
MAX_DIGITS = 40

PLAIN, QUOTED, MAPPING, SEQUENCE = "plain", "quoted", "mapping", "sequence"
KINDS = {ScalarNode: QUOTED, MappingNode: MAPPING, SequenceNode: SEQUENCE}

WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
AMBIGUOUS_WORDS = frozenset({"yes", "no", "on", "off", "y", "n"})
"""Booleans of YAML 1.1 and strings of YAML 1.2."""
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
AMBIGUOUS_NUMBER = re.compile(
    r"[-+]?(0[0-9]+|0[xob][0-9a-f_]+|[0-9][0-9_]*_[0-9_]*|[0-9]+(:[0-5]?[0-9])+)", re.IGNORECASE
)
"""Octal, hexadecimal, binary, sexagesimal and grouped numbers, which YAML 1.1 and 1.2 read differently."""


class _Composer(yaml.SafeLoader):
    """Composer of nodes whose tag says how a scalar was written; a tag of the author's own stays as it is."""

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        return PLAIN if kind is ScalarNode and implicit[0] else KINDS[kind]


def read_yaml(text: str) -> Any:
    """Read a YAML document as mappings with string keys, lists, strings, numbers, booleans and None.

    An alias is a copy of its own. Dates are strings.

    Raises:
        UserError: The text is no YAML, has duplicate keys or tags, is too large or too deep, or has a scalar that the
            versions of YAML read differently, such as ``yes`` or ``010``. The message is the end of a sentence that
            names the source.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"is longer than {MAX_CHARACTERS:,} characters: it is no configuration.")
    try:
        node = yaml.compose(text, Loader=_Composer)
    except yaml.YAMLError as error:
        raise UserError(f"is not valid YAML: {reason(error)}.") from None
    except RecursionError:
        raise UserError(f"is nested more than {MAX_DEPTH} deep: it is no configuration.") from None
    return None if node is None else _Reader().value(node, MAX_DEPTH)


class _Reader:
    """Values of nodes, counted, since few aliases can stand for very many."""

    def __init__(self) -> None:
        self.count = 0

    def value(self, node: Node, depth: int) -> Any:
        self.count += 1
        if depth == 0:
            raise UserError(f"is nested more than {MAX_DEPTH} deep: it is no configuration.")
        if self.count > MAX_VALUES:
            raise UserError(f"has more than {MAX_VALUES:,} values: it is no configuration.")
        if node.tag not in (PLAIN, *KINDS.values()):
            raise UserError(f"has the tag {node.tag}{_place(node)}: write the value alone.")
        if isinstance(node, MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, SequenceNode):
            return [self.value(item, depth - 1) for item in node.value]
        assert isinstance(node, ScalarNode)
        _check_characters(node)
        return _plain(node) if node.tag == PLAIN else node.value

    def _mapping(self, node: MappingNode, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, ScalarNode) or key.tag not in (PLAIN, QUOTED):
                raise UserError(f"has a key that is no word{_place(key)}: name a setting or a section.")
            _check_characters(key)
            if key.value in values:
                raise UserError(f'has "{key.value}" twice in one section{_place(key)}: keep one of them.')
            values[key.value] = self.value(item, depth - 1)
        return values


def _check_characters(node: ScalarNode) -> None:
    """UserError for what escapes can write and neither a file's name nor UTF-8 can hold."""
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
        raise UserError(f"has a character that is none of any text, escaped in quotes{_place(node)}: leave it out.")


def _plain(node: ScalarNode) -> Any:
    text: str = node.value
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if text.lower() in AMBIGUOUS_WORDS:
        raise UserError(
            f'has "{text}"{_place(node)}, which readers of YAML take for true or false or for a word: write the '
            f'setting\'s own kind of value, such as true or 5, or "{text}" in quotes for the word.'
        )
    if AMBIGUOUS_NUMBER.fullmatch(text):
        raise UserError(
            f"has {_shortened(text)}{_place(node)}, which readers of YAML take for different numbers: write a plain "
            "decimal number, or quotes around it for text."
        )
    if INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise UserError(f"has a number of {len(text):,} digits{_place(node)}: no setting is that large.")
        return int(text)
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if FLOAT.fullmatch(text) else text


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_DIGITS else f"{text[:MAX_DIGITS]}..."


def _place(node: Node) -> str:
    line = node.start_mark.line + 1
    return f" in line {line}" if line > 1 else ""
