"""Audit of a checkpoint against the model that it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from erasediff.audit import Audit, Battery, BatteryOutcome, Subject
from erasediff.audit.asks import Request
from erasediff.audit.battery_outcome import BASE, MODEL, REFERENCE, worst_recovery
from erasediff.audit.features import features_named
from erasediff.audit.protocol_file import ProtocolFile
from erasediff.audit.runner import ROWS_FILE, Cost, costs, outcome_of, run_units, units_of
from erasediff.audit.settings import AuditConfig
from erasediff.audit.subject import Model
from erasediff.config import Config, for_text_to_image
from erasediff.errors import UserError
from erasediff.evaluation.diffusion_classifier import DiffusionClassifier
from erasediff.io.atomic import atomic_write
from erasediff.io.jsonl import dumps
from erasediff.io.temporary_names import is_temporary
from erasediff.methods.sparse_autoencoder import ERASER, SaemnesiaConfig
from erasediff.models.base import LatentModel
from erasediff.parallel.control_plane import ControlPlane
from erasediff.provenance.run_files import output_model
from erasediff.report.audit_page import AuditContents, write_audit_page
from erasediff.sae import ConceptEraser
from erasediff.training.job import set_up_device, thread_scope
from erasediff.training.run_dir import CONFIG
from erasediff.training.run_lock import run_lock
from erasediff.utils.versions import library_versions
from erasediff.verdict.judges.base import Judge
from erasediff.verdict.judges.original import OriginalJudge
from erasediff.verdict.judges.registry import judge_named
from erasediff.workflows.audit_request import labelled_request, prompted_request
from erasediff.workflows.labelled_data import for_data, open_data
from erasediff.workflows.latent_data import image_size
from erasediff.workflows.load_model import is_text_to_image, load_checkpoint, load_unprompted
from erasediff.workflows.sample import latent_defaults

SETTINGS_FILE, FIGURES_FILE, PAGE = "audit.yaml", "audit.json", "audit.html"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a subject is read from: a checkpoint, a LoRA to merge, an eraser to attach."""

    path: Path
    lora: Path | None = None
    eraser: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """Result of an audit.

    Attributes:
        folder: Where its files are.
        outcomes: Of each battery.
    """

    folder: Path
    outcomes: Sequence[BatteryOutcome]

    def exceeds(self, limit: float) -> str | None:
        """Sentence on the figure that shows a larger share than ``limit`` of what should be forgotten; None if none."""
        worst = worst_recovery(self.outcomes)
        if worst is None or worst[1].values[MODEL].value <= limit:
            return None
        battery, figure = worst
        return f"{battery}: {figure.name} in {figure.values[MODEL].value:.1%} of images, more than {limit:.1%}."


def run_folder_settings(path: Path) -> Path | None:
    """The configuration of the unlearning run in the folder ``path``; None where there is no run."""
    file = path / CONFIG
    return file if file.is_file() and not (path / "model_index.json").exists() else None


def sources(config: Config, settings: AuditConfig) -> dict[str, Source]:
    """Where model, base and reference are read from.

    Raises:
        UserError: The model or its base is not named, or the run has no model.
    """
    if settings.model is None:
        raise UserError("There is no model to audit: name one, or the folder of an unlearning run.")
    lora, eraser = config.text_to_image.lora, config.section(SaemnesiaConfig).eraser
    if run_folder_settings(settings.model) is not None:
        base = settings.base or config.unlearn.model
        assert base is not None
        # The run's LoRA was merged before its first step; its own model holds it.
        found = {MODEL: _model_of_run(settings.model, base, lora), BASE: Source(base, lora)}
    elif settings.base is None:
        raise UserError("There is no model to compare with: name the one that it was made from with --base.")
    else:
        found = {MODEL: Source(settings.model, lora, eraser), BASE: Source(settings.base)}
    return found | ({} if settings.reference is None else {REFERENCE: Source(settings.reference)})


def _model_of_run(run: Path, base: Path, lora: Path | None) -> Source:
    model = output_model(run)
    if model is not None:
        return Source(model)
    if (run / ERASER).is_dir():
        return Source(base, lora, run / ERASER)
    raise UserError(f"The run in {run} has no model yet: finish it with unlearn --resume latest.")


def prepared(config: Config, settings: AuditConfig) -> Config:
    """``config`` with the defaults of the audited kind of model. UserError as ``sources``."""
    if not is_text_to_image(sources(config, settings)[BASE].path):
        return for_data(config)
    return for_text_to_image(config)


@contextmanager
def opened(config: Config, settings: AuditConfig, console: Console, folder: Path | None) -> Iterator[Audit]:
    """Load what is audited, and attach its eraser within the block.

    Raises:
        UserError: For files that cannot be read, models that cannot be compared, and a request that fits none.
    """
    device = set_up_device(config)
    places = sources(config, settings)
    protocol = None
    if settings.protocol is not None:
        if settings.protocol_prompts is None:
            raise UserError(f"The protocol {settings.protocol} needs its prompts: give a file with --prompts.")
        protocol = ProtocolFile.read(settings.protocol, settings.protocol_prompts)
    judge = None if settings.judge is None else judge_named(settings.judge, device)
    is_prompted = {name: is_text_to_image(place.path) for name, place in places.items()}
    if len(set(is_prompted.values())) > 1:
        raise UserError("Model and base are of different kinds: one takes prompts, the other does not.")
    models: dict[str, Model] = {}
    with ExitStack() as stack:
        if is_prompted[BASE]:
            for name, place in places.items():
                own = config.text_to_image.model_copy(update={"lora": place.lora})
                models[name] = load_checkpoint(config.model_copy(update={"text_to_image": own}), place.path, device)
            base = models[BASE]
            assert isinstance(base, LatentModel)
            size = image_size(config, base)
            request = prompted_request(config, settings, base, size, console)
            sampling, shape = config.sample, size
        else:
            data = open_data(config)
            for name, place in places.items():
                loaded: Any = load_unprompted(place.path, device, console, lora_file=place.lora)
                models[name] = data.fit(loaded, place.path)
            base = models[BASE]
            assert not isinstance(base, LatentModel)
            request = labelled_request(config, settings, base, data, console)
            sampling = latent_defaults(config.sample) if base.space == "latent" else config.sample
            shape = None
        _check_comparable(models, places)
        for name, place in places.items():
            if place.eraser is not None:
                stack.enter_context(ConceptEraser.load(place.eraser).attached(models[name].denoiser))
        subjects = {
            name: Subject(name, model, sampling, size=shape, is_edited=places[name].eraser is not None)
            for name, model in models.items()
        }
        judge = judge or _original_judge(subjects[BASE], request, seed=config.seed)
        features = features_named(settings.features, subjects[BASE])
        yield Audit(
            subjects,
            request,
            judge,
            settings.general(),
            seed=config.seed,
            folder=folder,
            features=features,
            protocol=protocol,
        )


def _original_judge(base: Subject, request: Request, *, seed: int) -> Judge | None:
    """The base as the judge of what all subjects draw; None where it has no conditions to choose among."""
    model = base.model
    if model.condition == "none" or not request.forgotten or not request.retained:
        return None
    classifier = DiffusionClassifier(
        model.denoiser, model.process, model.predict, seed=seed, batch_size=max(base.settings.batch_size, 16)
    )
    return OriginalJudge(model, classifier)


def _check_comparable(models: dict[str, Model], places: dict[str, Source]) -> None:
    """Raise UserError for models of which one cannot have been made from the other."""
    base = models[BASE]
    for name, model in models.items():
        if type(model) is not type(base) or model.condition != base.condition:
            raise UserError(
                f"{places[name].path} is another kind of model than {places[BASE].path}: name its own base."
            )


def _check_judge(judge: Judge | None, batteries: Sequence[Battery[Any]]) -> None:
    """Raise UserError where batteries need a judge and there is none."""
    needing = [battery.name for battery in batteries if battery.is_judged and battery.refusal() is None]
    if judge is None and needing:
        raise UserError(
            f"A judge has to say what images show ({', '.join(needing)}), and the base cannot without retained prompts "
            "or classes: give --retain-prompts, --judge, such as clip:FOLDER or module:function, or --batteries "
            "without these."
        )


@thread_scope()
def estimate(config: Config, settings: AuditConfig, console: Console) -> list[Cost]:
    """Estimate of each battery's cost, from one timed pass of each model. UserError as ``audit``."""
    with opened(prepared(config, settings), settings, console, None) as context:
        return costs(settings.build(context))


@thread_scope()
def audit(
    config: Config,
    settings: AuditConfig,
    folder: Path,
    console: Console,
    *,
    resume: bool = False,
    limit: float | None = None,
    command: str = "",
) -> AuditResult:
    """Measure all batteries, and write rows, figures and page to ``folder``.

    Args:
        config: Images, sampling, loading and parallelism.
        settings: Section "audit".
        folder: Folder of the audit: empty, or with one of the same settings to resume.
        console: Console for notes and progress.
        resume: Continue what is in ``folder``.
        limit: Share of what should be forgotten that may come back, which the page says; None for none.
        command: Command that is printed on the page.

    Raises:
        UserError: For mistakes in the request, before anything is written, and as ``run_lock``.
    """
    peers = ControlPlane.current()
    config = prepared(config, settings)
    described = config.to_yaml(exclude={"distributed": set(type(config.distributed).model_fields)})
    described += yaml.safe_dump({"audit": settings.model_dump(mode="json")}, sort_keys=False)
    with peers.main_process_first():
        if peers.is_main:
            _check_folder(folder, described, resume=resume)
    with opened(config, settings, console, folder) as context:
        batteries = settings.build(context)
        _check_judge(context.judge, batteries)
        _print_costs(costs(batteries), batteries, console)
        units = units_of(batteries)
        with ExitStack() as stack:
            with peers.main_process_first():
                if peers.is_main:
                    stack.enter_context(run_lock(folder, console))
                    atomic_write(folder / SETTINGS_FILE, described)
            rows = run_units(units, folder / ROWS_FILE, console)
            if not peers.is_main:
                return AuditResult(folder=folder, outcomes=())
            outcomes = [outcome_of(battery, rows) for battery in batteries]
            facts = {**_facts(config, settings, context), "limit": limit}
            _write(folder, outcomes, facts, command)
        return AuditResult(folder=folder, outcomes=outcomes)


def _check_folder(folder: Path, described: str, *, resume: bool) -> None:
    """Raise UserError for a folder with something else than the audit to resume."""
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(not is_temporary(path.name) for path in folder.iterdir())):
            raise UserError(f"{folder} is not empty: choose another --out, or continue its audit with --resume.")
        return
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise UserError(f"There is no audit in {folder} to resume: omit --resume.")
    if file.read_text(encoding="utf-8") != described:
        raise UserError(f"The audit in {folder} was begun with other settings: repeat its command, or begin a new one.")


def _print_costs(found: Sequence[Cost], batteries: Sequence[Battery[Any]], console: Console) -> None:
    for battery in batteries:
        if (reason := battery.refusal()) is not None:
            console.print(f"{battery.name}: not applicable: {reason}.", markup=False, highlight=False, soft_wrap=True)
    for cost in found:
        passes = f"{cost.passes:,.0f} passes of one sample"
        console.print(f"{cost.battery}: {passes}, about {_time(cost.seconds)}.", markup=False, highlight=False)
    total = sum(cost.seconds for cost in found)
    size = ControlPlane.current().size
    shared = f", shared by {size} processes" if size > 1 else ""
    console.print(f"In all about {_time(total / size)}{shared}.", markup=False, highlight=False)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _facts(config: Config, settings: AuditConfig, context: Audit) -> dict[str, Any]:
    """What a reader needs in order to repeat the audit."""
    request, base = context.request, context.base
    judge = context.judge
    return {
        "models": {name: str(place.path) for name, place in sources(config, settings).items()},
        "judge": None if judge is None else {"name": judge.name, **judge.description},
        "concepts": list(dict.fromkeys(ask.label for ask in request.forgotten)),
        "forgotten": [ask.text for ask in request.forgotten],
        "retained": [ask.text for ask in request.retained],
        "words": list(request.words),
        "images": {name: len(context.pictures_of(name)) for name in ("forgotten", "retained", "unseen")},
        "sampler": type(base.model.scheduler).__name__,
        "steps": base.steps,
        "guidance": base.guidance,
        "seed": config.seed,
        "features": context.features.name,
    }


def _write(folder: Path, outcomes: Sequence[BatteryOutcome], facts: dict[str, Any], command: str) -> None:
    worst = worst_recovery(outcomes)
    summary = None if worst is None else {"battery": worst[0], **worst[1].to_dict()}
    content = {**facts, "worst": summary, "batteries": [outcome.to_dict() for outcome in outcomes]}
    atomic_write(folder / FIGURES_FILE, dumps(content, indent=2) + os.linesep)
    contents = AuditContents(
        outcomes=outcomes, facts=facts, command=command, versions=library_versions("transformers"), folder=folder
    )
    write_audit_page(folder / PAGE, contents)
