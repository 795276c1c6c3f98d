"""Scan captions for those that make a model reproduce training images, without the training set."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from erasediff.config import Config, for_text_to_image
from erasediff.errors import UserError
from erasediff.evaluation.control_captions import CONTROL_CAPTIONS
from erasediff.evaluation.prompt_magnitude import (
    FALSE_POSITIVES,
    Calibration,
    PromptMagnitude,
    auc_above,
    check_has_null_prediction,
)
from erasediff.io.atomic import atomic_write, check_new, storage_errors
from erasediff.io.jsonl import MetricsFile, dumps
from erasediff.io.temporary_names import is_temporary
from erasediff.training.job import set_up_device, thread_scope
from erasediff.utils.progress import progress_bar
from erasediff.workflows.load_model import load_checkpoint, read_denoiser
from erasediff.workflows.sample import erasing

NUM_INFERENCE_STEPS = 50
LARGEST_CONTROL = 500
"""Control prompts of a longer list are drawn by the run's seed."""


@dataclass(frozen=True, slots=True)
class ScannedPrompt:
    """Prompt with its score.

    Attributes:
        prompt: The prompt.
        score: Magnitude of its conditional prediction, see ``PromptMagnitude``; the mean over draws.
        z: Standard deviations above the control's mean.
        flagged: Above the score that 1% of the control exceed.
    """

    prompt: str
    score: float
    z: float
    flagged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Result of a scan.

    Attributes:
        rows: File of JSON lines: the settings, then a line for each prompt with the score of each draw.
        written: File of the flagged prompts, the highest score first, for ``--forget-prompts``.
        ranked: Prompts that were asked about, the highest score first.
        control: Calibration by the control prompts.
        auc: Probability that a prompt scores above a control prompt: 0.5 if the list is like the control.
    """

    rows: Path
    written: Path
    ranked: tuple[ScannedPrompt, ...]
    control: Calibration
    auc: float

    @property
    def flagged(self) -> tuple[ScannedPrompt, ...]:
        return tuple(row for row in self.ranked if row.flagged)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return {
            "rows": str(self.rows),
            "list": str(self.written),
            "prompts": len(self.ranked),
            "flagged": len(self.flagged),
            "expected_by_chance": FALSE_POSITIVES * len(self.ranked),
            "auc": self.auc,
            "control": asdict(self.control),
            "ranked": [asdict(row) for row in self.ranked],
        }


@thread_scope()
def scan(
    config: Config,
    source: Path,
    out: Path,
    console: Console,
    *,
    prompts: Sequence[str],
    control: Sequence[str] | None,
    draws: int,
    steps: int,
) -> Scan:
    """Score ``prompts`` and the control list; what ``out`` holds already is not measured again.

    Args:
        config: Configuration; ``sample`` and ``images`` hold guidance, batch size and size of the image.
        source: See ``load_text_to_image``.
        out: A folder for ``scores.jsonl`` and ``memorised.txt``, or the path of the latter with scores beside it.
        console: Console for progress.
        prompts: Prompts to ask about; each counts once.
        control: Prompts taken for not memorised; None for ``CONTROL_CAPTIONS``. Those among ``prompts`` do not count,
            and of more than 500, as many are drawn.
        draws: Draws of the initial noise per prompt.
        steps: Sampling steps that are averaged.

    Raises:
        UserError: The model has no prompts or no unconditional prediction, the control list has fewer than two prompts,
            ``steps`` is more than the sampler's, or ``out`` holds a scan of another model or with other settings.
    """
    is_set = "num_inference_steps" in config.sample.model_fields_set
    config = for_text_to_image(config)
    sampler_steps = config.sample.num_inference_steps if is_set else NUM_INFERENCE_STEPS
    if steps > sampler_steps:
        raise UserError(
            f"--steps {steps} is more than the {sampler_steps} of the sampler (sample.num_inference_steps)."
        )
    asked = list(dict.fromkeys(prompts))
    plain = _control(control, asked, config.seed)
    model = load_checkpoint(config, source, set_up_device(config), empty=True)
    check_has_null_prediction(model)
    height, width = model.default_size
    guidance = config.sample.guidance_scale
    settings: dict[str, Any] = {
        "draws": draws,
        "steps": steps,
        "num_inference_steps": sampler_steps,
        "guidance_scale": model.default_guidance if guidance is None else guidance,
        "size": (config.images.height or height, config.images.width or width),
        "seed": config.seed,
    }
    rows, written = _places(out)
    read_denoiser(config, model)
    measure = PromptMagnitude(model=model, **settings)
    facts = {"model": model.hash, "denoiser": model.denoiser_hash(), **settings, "dtype": config.text_to_image.weights}
    with erasing(config, model):
        scores = _measured(measure, rows, [*asked, *plain], facts, config.sample.batch_size, console)
    calibration = Calibration.of([scores[prompt] for prompt in plain])
    ranked = [
        ScannedPrompt(prompt, scores[prompt], calibration.z(scores[prompt]), scores[prompt] > calibration.threshold)
        for prompt in asked
    ]
    result = Scan(
        rows=rows,
        written=written,
        ranked=tuple(sorted(ranked, key=lambda row: -row.score)),
        control=calibration,
        auc=auc_above([scores[prompt] for prompt in asked], [scores[prompt] for prompt in plain]),
    )
    atomic_write(written, "".join(f"{row.prompt}\n" for row in result.flagged))
    return result


def _control(control: Sequence[str] | None, asked: Sequence[str], seed: int) -> list[str]:
    """Control prompts without those that are asked about."""
    excluded = set(asked)
    plain = [prompt for prompt in dict.fromkeys(control or CONTROL_CAPTIONS) if prompt not in excluded]
    if len(plain) < 2:
        raise UserError(
            "The control list needs at least two prompts that are not among --prompts: give --control more."
        )
    return plain if len(plain) <= LARGEST_CONTROL else random.Random(seed).sample(plain, LARGEST_CONTROL)


def _places(out: Path) -> tuple[Path, Path]:
    """Files of the rows and of the list. UserError where there is anything but a scan."""
    if out.suffix == ".txt":
        rows = out.with_suffix(".jsonl")
        if not rows.exists():
            check_new(out)
        return rows, out
    rows = out / "scores.jsonl"
    if not rows.exists() and out.exists() and not (out.is_dir() and all(is_temporary(p.name) for p in out.iterdir())):
        raise UserError(f"{out} is there already, and holds no scan: choose another --out.")
    return rows, out / "memorised.txt"


def _measured(
    measure: PromptMagnitude,
    path: Path,
    prompts: Sequence[str],
    facts: Mapping[str, Any],
    batch_size: int,
    console: Console,
) -> dict[str, float]:
    """Score of each prompt; appended to ``path`` where it is not there yet."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    file, header = MetricsFile(path), {"step": 0, **facts}
    lines = list(file.read())
    _check_same(path, lines, header)
    # A line that a kill tore apart goes.
    file.continue_after(len(prompts))
    scores: dict[str, float] = {line["prompt"]: line["score"] for line in lines[1:]}
    if not lines:
        file.append([header])
    size = max(1, batch_size // measure.draws)
    number = max(len(lines), 1)
    with progress_bar(console, "Scanning", len(prompts)) as bar:
        for first in range(0, len(prompts), size):
            # A chunk that a kill has cut is measured as a whole again: what shares a batch changes the rounding.
            chunk = prompts[first : first + size]
            if missing := [prompt for prompt in chunk if prompt not in scores]:
                found = dict(zip(chunk, measure(chunk).tolist(), strict=True))
                scores |= {prompt: sum(found[prompt]) / measure.draws for prompt in missing}
                rows = [{"prompt": prompt, "score": scores[prompt], "scores": found[prompt]} for prompt in missing]
                file.append({"step": step, **row} for step, row in enumerate(rows, start=number))
                number += len(rows)
            bar.advance(len(chunk))
    return scores


def _check_same(path: Path, lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Raise UserError unless the file's first line has the settings ``facts``, and the others are scores."""
    if not lines:
        if path.exists() and not f"{dumps(facts)}\n".startswith(path.read_text(encoding="utf-8", errors="replace")):
            raise UserError(f"{path} holds no scan: choose another --out, or remove the file.")
        return
    for name, value in facts.items():
        found = lines[0].get(name)
        if found != (list(value) if isinstance(value, tuple) else value):
            raise UserError(
                f"{path} holds no scan with the same {name.replace('_', ' ')} ({found} instead of {value}): choose "
                "another --out, or remove the file."
            )
    for number, line in enumerate(lines[1:], start=2):
        if not isinstance(line.get("prompt"), str) or not isinstance(line.get("score"), int | float):
            raise UserError(f"{path}, line {number} has no prompt and score: remove that line.")
