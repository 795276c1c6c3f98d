"""Candidates among the labels of a classifier: by name, by a synonym, or by words of a caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from erasediff.data.phrases import contains_phrase, normal_form
from erasediff.errors import UserError
from erasediff.verdict.judges.base import UNKNOWN, Candidate


class Labels:
    """Labels of a classifier, each with the synonyms between its commas, as ImageNet's "tench, Tinca tinca".

    Args:
        names: Labels by output of the classifier.
        owner: The classifier in messages.
    """

    def __init__(self, names: Sequence[str], owner: str) -> None:
        self.names, self.owner = tuple(names), owner
        self._outputs: dict[str, set[int]] = {}
        for number, name in enumerate(names):
            for synonym in {normal_form(part) for part in (name, *name.split(","))} - {""}:
                self._outputs.setdefault(synonym, set()).add(number)

    def outputs_of(self, candidate: Candidate) -> frozenset[int]:
        """Outputs that are the candidate: several where the labels repeat a name, such as ImageNet's "crane".

        The candidate's label is looked for among the names and their synonyms, in any case; then the longest of these
        that is in its caption as whole words.

        Raises:
            UserError: There is none; the message names similar labels.
        """
        for text in (candidate.label, candidate.text):
            if found := self._outputs.get(normal_form(text)):
                return frozenset(found)
        caption = normal_form(candidate.text)
        within = [synonym for synonym in self._outputs if contains_phrase(caption, synonym)]
        if not within:
            raise UserError(f'{self.owner} has no label "{candidate.label}"; {self._near(candidate)}.')
        longest = max(map(len, within))
        return frozenset(number for synonym in within if len(synonym) == longest for number in self._outputs[synonym])

    def by_output(self, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Mapping[int, int]:
        """Index in ``[*sought, *others]`` by output; the first of candidates of one side that share an output.

        Raises:
            UserError: A candidate has no label, or a sought one shares its label with one of the others.
        """
        index: dict[int, int] = {}
        for number, candidate in enumerate([*sought, *others]):
            for output in self.outputs_of(candidate):
                first = index.setdefault(output, number)
                if first < len(sought) <= number:
                    raise UserError(
                        f'{self.owner} cannot tell "{sought[first].label}" from "{candidate.label}": both are its '
                        f'label "{self.names[output]}"; choose another judge.'
                    )
        return index

    def _near(self, candidate: Candidate) -> str:
        words = [normal_form(candidate.label), *normal_form(candidate.text).split()]
        near = {
            self.names[number]: None
            for word in words
            for synonym in get_close_matches(word, self._outputs, n=3)
            for number in self._outputs[synonym]
        }
        shown = list(near)[:5] or self.names[:5]
        return f"{'similar labels are' if near else 'its labels begin with'} {', '.join(shown)}"


def indices(outputs: Sequence[int], by_output: Mapping[int, int]) -> list[int]:
    """Candidate of each output; ``UNKNOWN`` for that of no candidate."""
    return [by_output.get(output, UNKNOWN) for output in outputs]
