"""The constrained step with SGD: combination, clipping, decay, momentum, EMA and low-precision copy in one pass."""

from collections.abc import Sequence

from torch import Tensor

from erasediff_kernels.ops._update import run_update


def constrained_sgd_(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    retain: Sequence[Tensor],
    forget: Sequence[Tensor],
    *,
    multiplier: Tensor,
    clip_scale: Tensor,
    finite: Tensor,
    lr: Tensor,
    step: Tensor,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    ema: Sequence[Tensor] = (),
    ema_decay: float = 0.0,
    copies: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    rounding_key: Tensor | None = None,
) -> None:
    """SGD with momentum and decoupled weight decay on delta, the combination as in `constrained_adamw_`, in place.

    Nothing at all changes where `finite` is False. Otherwise step += 1 and

        p *= 1 - lr weight_decay
        b = momentum b + delta
        p -= lr (delta + momentum b if nesterov else b)
        ema += (1 - ema_decay) (p - ema)

    Args:
        params, retain, forget: as in `constrained_adamw_`.
        momentum_buffers: b, float32 or the parameter's dtype, with the parameter's shape and strides; empty when
            `momentum` is 0.
        multiplier, clip_scale, finite, lr, step: as in `constrained_adamw_`.
        momentum, nesterov: as in `torch.optim.SGD`, without dampening.
        weight_decay: decoupled, unlike `torch.optim.SGD`'s.
        ema, ema_decay, copies, masks, rounding_key: as in `constrained_adamw_`.

    Raises:
        ValueError: for lists, shapes, strides, dtypes or devices that do not match; momentum without buffers, buffers
            without momentum, nesterov without momentum.
    """
    if params and bool(momentum_buffers) != (momentum != 0.0):
        raise ValueError(
            f"momentum is {momentum} and there are {len(momentum_buffers)} momentum_buffers; give one per parameter "
            "with momentum, and none without"
        )
    if nesterov and momentum == 0.0:
        raise ValueError("nesterov=True needs momentum > 0")
    run_update(
        "constrained_sgd_",
        params,
        (momentum_buffers,),
        retain,
        forget,
        (ema, copies),
        masks,
        (multiplier, clip_scale, finite, lr, step),
        (momentum, nesterov, weight_decay, ema_decay),
        rounding_key,
        lambda: {"momentum_buffers": momentum_buffers} if momentum_buffers else {},
    )
