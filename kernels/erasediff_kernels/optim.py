"""`torch.optim.Optimizer`s over the constrained update: one pass over memory per step, no wait for the device."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from erasediff_kernels._buckets import Bucket
from erasediff_kernels._optimizer import ConstrainedOptimizer
from erasediff_kernels.ops.constrained_adamw import constrained_adamw_
from erasediff_kernels.ops.constrained_sgd import constrained_sgd_


class ConstrainedAdamW(ConstrainedOptimizer):
    """AdamW (Loshchilov & Hutter, ICLR 2019) whose step can be constrained (EraseDiff, arXiv 2401.05779).

    `constrained_step(retain, forget, constraint)` applies delta = clip_scale (retain + multiplier forget) in one pass;
    `step()` is ordinary AdamW. The bias correction counts the applied steps of the group, kept as `group["step"]`.

    Args:
        params: parameters or groups, as for any optimizer.
        lr: a float, or a 0-D tensor (which a CUDA graph may read); schedulers work with both.
        betas, eps, weight_decay: as in `torch.optim.AdamW`; the decay is decoupled.
        ema_decay: keep a running average of the parameters, in fp32 for half types; see `ema_parameters`.
        master_weights: keep fp32 masters of bfloat16 and float16 parameters, which become rounded copies of them.
        stochastic_rounding: round bfloat16 and float16 parameters up or down by chance, so that small updates are not
            lost; no masters needed.
        seed: of the stochastic rounding, 64 bits.
        moments: "float" (fp32, fp64 for fp64 parameters) or "8-bit": 2 bytes per parameter rather than 8, in blocks of
            256 elements (arXiv 2110.02861; kernels/README.md), elsewhere called AdamW8bit. A group may have its own.
            Not for fp64 parameters, nor for distributed tensors, whose shards do not end where blocks do.

    Raises:
        ValueError: for hyperparameters out of range, or masters with stochastic rounding.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        moments: Literal["float", "8-bit"] = "float",
    ) -> None:
        if moments not in ("float", "8-bit"):
            raise ValueError(f"moments is {moments!r}; choose 'float' or '8-bit'")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}; both must lie in [0, 1)")
        if eps < 0.0:
            raise ValueError(f"eps is {eps}; it cannot be negative")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "moments": moments,
        }
        super().__init__(params, defaults)

    def _run(self, group: dict[str, Any], bucket: Bucket, *lists: list[Tensor], **common: Any) -> None:
        params, retain, forget = lists
        beta1, beta2 = group["betas"]
        coded = group["moments"] == "8-bit"
        constrained_adamw_(
            params,
            bucket.state("exp_avg"),
            bucket.state("exp_avg_sq"),
            retain,
            forget,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            exp_avg_absmaxes=bucket.state("exp_avg_absmax") if coded else (),
            exp_avg_sq_absmaxes=bucket.state("exp_avg_sq_absmax") if coded else (),
            **common,
        )


class ConstrainedSGD(ConstrainedOptimizer):
    """SGD with momentum and decoupled weight decay whose step can be constrained; otherwise as `ConstrainedAdamW`.

    Args:
        params, lr: as there.
        momentum: of the buffer b = momentum b + delta; no buffer is kept without.
        nesterov: step along delta + momentum b.
        weight_decay: decoupled, p *= 1 - lr weight_decay, unlike `torch.optim.SGD`.
        ema_decay, master_weights, stochastic_rounding, seed: as there.

    Raises:
        ValueError: for a negative rate, decay or momentum, nesterov without momentum, or masters with stochastic
            rounding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if momentum < 0.0:
            raise ValueError(f"momentum is {momentum}; it cannot be negative")
        if nesterov and momentum == 0.0:
            raise ValueError("nesterov=True needs momentum > 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "moments": "float",
        }
        super().__init__(params, defaults)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0.0 else ()

    def _run(self, group: dict[str, Any], bucket: Bucket, *lists: list[Tensor], **common: Any) -> None:
        params, retain, forget = lists
        constrained_sgd_(
            params,
            bucket.state("momentum_buffer") if group["momentum"] != 0.0 else (),
            retain,
            forget,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            **common,
        )
