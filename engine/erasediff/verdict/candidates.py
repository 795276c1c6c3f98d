"""Choice of the candidates of a verdict: what images are asked for, and what judges choose among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.models.base import LatentModel
from erasediff.verdict.examined import ExaminedModel
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.request import Concept, Request

MOST_SOUGHT = 4
"""Forgotten concepts; of more, the most frequent."""
MOST_OTHERS = 12
"""Candidates besides those sought, anchors included."""
POOL = 64
"""Retained concepts that are compared with what is sought, the most frequent."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Candidates of a verdict.

    Attributes:
        sought: Forgotten concepts.
        retained: Retained concepts that images are asked for.
        others: Anchors that are no retained concept, which judges choose among besides.
        anchor: The first anchor, one of the candidates; None without.
        prompts: Captions of each of ``sought`` and ``retained`` by label.
    """

    sought: Sequence[Candidate]
    retained: Sequence[Candidate]
    others: Sequence[Candidate]
    anchor: Candidate | None
    prompts: Mapping[str, Sequence[str]]


def candidates_of(request: Request, before: ExaminedModel, anchors: Sequence[str]) -> Chosen:
    """Choose candidates: the anchors' concepts, those nearest to what is sought, and others far from each other.

    Text encoders tell what is near. Synonyms among the candidates would be answers like any other.
    """
    sought = [before.candidate(concept.prompts[0], concept.label) for concept in request.sought[:MOST_SOUGHT]]
    of_anchors = [concept for concept in request.retained if set(concept.prompts) & set(anchors)]
    known = {prompt for concept in request.retained for prompt in concept.prompts}
    others = [before.candidate(text) for text in dict.fromkeys(anchors) if text not in known]
    rest = [concept for concept in request.retained if concept not in of_anchors]
    room = MOST_OTHERS - len(others) - len(of_anchors)
    retained = [
        before.candidate(concept.prompts[0], concept.label)
        for concept in [*of_anchors, *_spread(before, sought, rest, max(room, 0))][:MOST_OTHERS]
    ]
    prompts = {concept.label: concept.prompts for concept in (*request.sought, *request.retained)}
    anchor = next((retained[number] for number in range(len(of_anchors[:1]))), next(iter(others), None))
    return Chosen(sought, retained, others, anchor, prompts)


def _spread(
    before: ExaminedModel, sought: Sequence[Candidate], concepts: Sequence[Concept], count: int
) -> list[Concept]:
    """At most ``count`` of ``concepts``: a half near to what is sought, the others far from those chosen before."""
    if len(concepts) <= count:
        return list(concepts)
    pool = list(concepts[:POOL])
    if not isinstance(before.model, LatentModel):
        return [pool[number * len(pool) // count] for number in range(count)]
    vectors = {concept: _embedding(before.candidate(concept.prompts[0])) for concept in pool}
    wanted = torch.stack([_embedding(candidate) for candidate in sought])
    pool.sort(key=lambda concept: -float(torch.cosine_similarity(vectors[concept][None], wanted).max()))
    chosen = pool[: count // 2]
    while len(chosen) < count:
        near = torch.stack([vectors[concept] for concept in chosen])
        rest = [concept for concept in pool if concept not in chosen]
        chosen.append(min(rest, key=lambda c: float(torch.cosine_similarity(vectors[c][None], near).max())))
    return chosen


def _embedding(candidate: Candidate) -> Tensor:
    """All tensors of a condition as one vector, each a mean over its tokens."""
    floating = [value[0].float() for value in candidate.condition.values() if value.is_floating_point()]
    return torch.cat([value.reshape(-1, value.shape[-1]).mean(0) for value in floating])
