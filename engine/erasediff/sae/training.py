"""Training of a sparse autoencoder on cached activations, without and with concepts to tie its latents to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from erasediff.errors import RunFailedError
from erasediff.io.atomic import atomic_file
from erasediff.sae.activations import ActivationCache, Patches
from erasediff.sae.autoencoder import SparseAutoencoder
from erasediff.utils.finite import first_not_finite
from erasediff_kernels import sparse_decode
from erasediff_kernels.ops.topk_encode import LARGEST_K


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """Supervised loss of SAEmnesia's second stage (2509.21379), in our own form: its training code is not published.

    The paper rewards log sigmoid(v_c) on the patches of concept c alone, which a latent that is always on satisfies;
    here all latents in ``assigned`` see positives and negatives, weighted alike.

    Attributes:
        assigned: int64 [concepts], the latent of each concept.
        per_image: Supervise the latent of the mean over an image's patches, for detection per image: most patches of
            most concepts are alike, so that to be right in each is another task than to be right on average.
        weight: beta, of the supervised terms.
        decorrelation: eta, of the mean squared correlation between the activations of two concepts' latents.
        sparsity: lambda_1, of the mean L1 norm of the code.
    """

    assigned: Tensor
    per_image: bool = False
    weight: float = 0.1
    decorrelation: float = 0.1
    sparsity: float = 1e-5

    def loss(self, autoencoder: SparseAutoencoder, batch: Patches, values: Tensor) -> Tensor:
        """Weighted sum of attribution, decorrelation and sparsity; ``values`` [N, k] are those of the batch's code."""
        rows = autoencoder.W_enc[self.assigned]
        x = batch.image_mean if self.per_image else batch.x
        logits = (x - autoencoder.b_dec) @ rows.T + autoencoder.b_enc[self.assigned]
        numbers = torch.arange(len(self.assigned), device=logits.device)
        labels = (batch.concept[:, None] == numbers).to(logits.dtype)
        # An image of the concept that the prompt no longer asks for is neither.
        labelled = ((batch.concept[:, None] == numbers) | (batch.drawn[:, None] != numbers)).to(logits.dtype)
        share = (labels.sum(dim=0) / labelled.sum(dim=0)).clamp(1e-3, 1 - 1e-3)
        balanced = labelled * (labels / (2 * share) + (1 - labels) / (2 * (1 - share)))
        attribution = binary_cross_entropy_with_logits(logits, labels, balanced)
        supervised = attribution + self.decorrelation * squared_correlation(logits.relu())
        loss: Tensor = self.weight * supervised + self.sparsity * values.sum(dim=1).mean()
        return loss


def squared_correlation(activations: Tensor) -> Tensor:
    """Mean squared Pearson correlation over pairs of different columns of [N, C]; 0 for one column."""
    count = activations.shape[1]
    if count < 2:
        return activations.new_zeros(())
    centred = activations - activations.mean(dim=0)
    unit = centred / centred.norm(dim=0).clamp_min(1e-8)
    squares = (unit.T @ unit).square()
    mean: Tensor = (squares.sum() - squares.diagonal().sum()) / (count * (count - 1))
    return mean


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeTraining:
    """Training settings of a sparse autoencoder; defaults of SAeUron's code, with TopK per patch for its BatchTopK.

    Attributes:
        epochs: Passes over the cache.
        batch_size: Patches per step.
        lr: Learning rate of Adam; decays linearly to 0.
        auxiliary: Weight of the dead latents' reconstruction of the residual.
        dead_after: Patches after which a latent that was not active is dead.
        seed: Seed of the order of patches.
        checkpoint_every: Steps between checkpoints.
    """

    epochs: int = 5
    batch_size: int = 4096
    lr: float = 4e-4
    auxiliary: float = 1 / 32
    dead_after: int = 10_000_000
    seed: int = 0
    checkpoint_every: int = 500


def train_autoencoder(
    autoencoder: SparseAutoencoder,
    cache: ActivationCache,
    settings: SaeTraining,
    *,
    supervision: Supervision | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train an autoencoder in place: minimise FVU + auxiliary loss (+ supervision) over ``cache``.

    Args:
        autoencoder: On the device to train on.
        cache: Activations.
        settings: Hyper-parameters.
        supervision: Supervised loss, for the second stage.
        checkpoint: File of the training state, written every ``checkpoint_every`` steps. If it exists, training
            continues from it, to the same weights.
        progress: Called with 1 after each step.

    Returns:
        Fraction of variance unexplained ("fvu") of the last batch and number of dead latents ("dead").

    Raises:
        RunFailedError: The training diverged: a weight is not finite. No checkpoint is written of it.
        ValueError: No pool of shards has as many patches as a batch.
    """
    steps = cache.batch_count(settings.batch_size, settings.epochs)
    if steps == 0:
        raise ValueError(f"no shard holds {settings.batch_size} patches: use a smaller batch")
    device = autoencoder.W_enc.device
    names, parameters = zip(*autoencoder.named_parameters(), strict=True)
    optimizer = torch.optim.Adam(parameters, settings.lr, eps=6.25e-10)
    idle = torch.zeros(autoencoder.latents, dtype=torch.int64, device=device)
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = _restore(checkpoint, autoencoder, optimizer, names, idle)
    fvu = torch.zeros((), device=device)
    for step, batch in enumerate(cache.batches(settings.batch_size, settings.seed, settings.epochs, start), start):
        batch = batch.to(device)
        if step == 0 and supervision is None:
            autoencoder.b_dec.data.copy_(geometric_median(batch.x))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / steps)
        fvu, auxiliary, values = _losses(autoencoder, batch.x, idle, settings.dead_after)
        loss = fvu + settings.auxiliary * auxiliary
        if supervision is not None:
            loss = loss + supervision.loss(autoencoder, batch, values)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        autoencoder.project_gradient()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        autoencoder.normalize_decoder()
        if checkpoint is not None and (step + 1) % settings.checkpoint_every == 0:
            _check_finite(autoencoder, step + 1)
            _store(checkpoint, autoencoder, optimizer, names, idle, step + 1)
        if progress is not None:
            progress(1)
    _check_finite(autoencoder, steps)
    return {"fvu": fvu.item(), "dead": float((idle >= settings.dead_after).sum())}


def _check_finite(autoencoder: SparseAutoencoder, step: int) -> None:
    if (name := first_not_finite(autoencoder.state_dict().items())) is not None:
        raise RunFailedError(
            f"The autoencoder diverged within {step} steps: {name} is not finite, so it was not saved; lower "
            "saemnesia.lr and saemnesia.supervised_lr."
        )


def _losses(autoencoder: SparseAutoencoder, x: Tensor, idle: Tensor, dead_after: int) -> tuple[Tensor, Tensor, Tensor]:
    """(FVU, auxiliary loss, values of the code); updates ``idle``, the patches since each latent was active."""
    code = autoencoder.encode(x)
    reconstruction = autoencoder.decode(code)
    variance = (x - x.mean(dim=0)).square().sum()
    fvu = (x - reconstruction).square().sum() / variance
    dead = idle >= dead_after
    width = min(LARGEST_K, max(1, x.shape[1] // 2), autoencoder.latents)
    residual = (x - reconstruction).detach()
    others = autoencoder.encode(x, among=dead, k=width)
    guess = sparse_decode(others.values, others.indices, autoencoder.W_dec)
    scale = (dead.sum() / width).clamp_max(1.0)
    auxiliary = scale * (guess - residual).square().sum() / variance
    active = torch.zeros_like(idle).index_add_(0, code.indices.reshape(-1), (code.values > 0).reshape(-1).long())
    idle.copy_(torch.where(active > 0, 0, idle + len(x)))
    return fvu, auxiliary, code.values


@torch.no_grad()
def geometric_median(x: Tensor, iterations: int = 50) -> Tensor:
    """Geometric median: the point [d] that minimises the sum of distances to the rows of x [N, d] (Weiszfeld)."""
    median = x.mean(dim=0)
    for _ in range(iterations):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-8)
        median = (weight * x).sum(dim=0) / weight.sum()
    return median


def _store(
    path: Path,
    autoencoder: SparseAutoencoder,
    optimizer: torch.optim.Adam,
    names: tuple[str, ...],
    idle: Tensor,
    step: int,
) -> None:
    tensors = {name: tensor.detach() for name, tensor in autoencoder.state_dict().items()}
    for name, parameter in zip(names, autoencoder.parameters(), strict=True):
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    with atomic_file(path) as partial:
        save_file({**tensors, "idle": idle, "taken": torch.tensor(step)}, partial)


def _restore(
    path: Path, autoencoder: SparseAutoencoder, optimizer: torch.optim.Adam, names: tuple[str, ...], idle: Tensor
) -> int:
    tensors = load_file(path, device=str(idle.device))
    autoencoder.load_state_dict({name: tensors[name] for name in names})
    for name, parameter in zip(names, autoencoder.parameters(), strict=True):
        optimizer.state[parameter] = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].cpu()
    idle.copy_(tensors["idle"])
    return int(tensors["taken"])
