"""Train a diffusion model from scratch: the base model, or one that never saw the excluded classes."""

from functools import partial

import torch
from rich.console import Console

from erasediff.config import Config
from erasediff.data import GlobalBatches, forget_retain_split, load_digits
from erasediff.distributed.joining import share_of
from erasediff.methods import FineTune
from erasediff.models import PixelModel
from erasediff.process import Process
from erasediff.runs.folder import RunPlace
from erasediff.runs.schedule import LearningRate
from erasediff.stages.session import RunResult, Session, precision_of, set_up_device, shared_by_ranks
from erasediff_kernels import ConstrainedAdamW


def train_base(config: Config, place: RunPlace, console: Console, title: str = "Training") -> RunResult:
    """Train the model that ``config`` describes on its data; see ``RunResult`` for what is left behind."""
    return training_session(config, title).run(place, console)


def untrained_model(config: Config, device: torch.device) -> PixelModel:
    """The model that ``config`` describes, as training begins with it."""
    shape = config.model.model_dump(exclude={"conditional"})
    classes = load_digits().num_classes if config.model.conditional else None
    return PixelModel.build(num_classes=classes, seed=config.seed, **shape).to(device)


def training_session(config: Config, title: str = "Training") -> Session:
    """The run of ``train_base``, built but not begun. UserError for excluded classes that do not exist."""
    settings = config.train
    device = set_up_device(config)
    images = load_digits().train
    if config.data.exclude:
        _, images = forget_retain_split(images, config.data.exclude)
    model = untrained_model(config, device)
    trained, optimizer = shared_by_ranks(
        config,
        settings,
        model.unet,
        model.unet.parameters(),
        partial(ConstrainedAdamW, lr=settings.lr, weight_decay=settings.weight_decay, ema_decay=settings.ema_decay),
    )
    return Session(
        title=title,
        config=config,
        network=model.unet,
        save=partial(model.save, replace=True),
        optimizer=optimizer,
        method=FineTune(
            trained,
            optimizer,
            process=Process.from_scheduler(model.scheduler),
            min_snr_gamma=settings.min_snr_gamma,
            max_grad_norm=settings.max_grad_norm,
            accumulation_steps=settings.accumulation_steps,
            autocast=precision_of(config),
            seed=config.seed,
        ),
        rate=LearningRate(settings.lr, settings.steps, settings.warmup_steps, settings.lr_schedule),
        retain=GlobalBatches(
            images.to(device),
            settings.batch_size,
            seed=config.seed,
            conditional=config.model.conditional,
            label_dropout=settings.label_dropout,
            null_label=model.null_label,
            **share_of(settings.batch_size, "train.batch_size"),
        ),
    )
