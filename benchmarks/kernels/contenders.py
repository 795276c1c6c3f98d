"""Ways to do the constrained step on the same parameters, moments and gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from erasediff_kernels import constraint_multiplier, gradient_gram
from erasediff_kernels.optim import ConstrainedAdamW

ETA, MAX_NORM, LR, WEIGHT_DECAY = 0.1, 1.0, 1e-6, 0.01


@dataclass(kw_only=True, slots=True)
class Problem:
    params: list[torch.nn.Parameter]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    retain: list[Tensor]
    forget: list[Tensor]
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.numel = sum(p.numel() for p in self.params)

    def moved_bytes(self) -> int:
        """Bytes that every implementation must move: r and g for the multiplier; p, m, v, r, g in and p, m, v out."""
        return sum(t.numel() * t.element_size() for t in self.retain + self.forget) * 2 + 2 * sum(
            t.numel() * t.element_size() for t in [*self.params, *self.exp_avgs, *self.exp_avg_sqs]
        )


def problem(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> Problem:
    def random(scale: float) -> list[Tensor]:
        return [torch.randn(shape, device=device).mul_(scale).to(dtype) for shape in shapes]

    return Problem(
        params=[torch.nn.Parameter(t) for t in random(1.0)],
        exp_avgs=random(1e-3),
        exp_avg_sqs=[t.square_() for t in random(1e-3)],
        retain=random(1e-3),
        forget=random(1e-3),
    )


def adam_state(optimizer: torch.optim.Optimizer, p: Problem) -> None:
    """Let torch's optimizer work on the problem's own moments, so that all contenders share their memory."""
    on_device = p.params[0].is_cuda
    for param, exp_avg, exp_avg_sq in zip(p.params, p.exp_avgs, p.exp_avg_sqs, strict=True):
        step = torch.tensor(0.0, device=param.device if on_device else "cpu")
        optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def erasediff(p: Problem) -> Callable[[], object]:
    """This package: two operators and the optimizer."""
    optimizer = ConstrainedAdamW(p.params, lr=LR, weight_decay=WEIGHT_DECAY)
    for param, exp_avg, exp_avg_sq in zip(p.params, p.exp_avgs, p.exp_avg_sqs, strict=True):
        optimizer.state[param].update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    def step() -> None:
        constraint = constraint_multiplier(gradient_gram(p.retain, p.forget), "norm", ETA, max_norm=MAX_NORM)
        optimizer.constrained_step(p.retain, p.forget, constraint)

    return step


def erasediff_graph(p: Problem) -> Callable[[], object]:
    """The same step captured in a CUDA graph, for loops whose gradients keep their addresses: no work on the host."""
    eager = erasediff(p)
    if not p.params[0].is_cuda:
        raise RuntimeError("a CUDA graph needs a CUDA device")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        eager()
    return graph.replay


def erasediff_8bit(p: Problem) -> Callable[[], object]:
    """The same with moments of 8 bits: 12 bytes per fp32 parameter less to move than the problem's own count."""
    optimizer = ConstrainedAdamW(p.params, lr=LR, weight_decay=WEIGHT_DECAY, moments="8-bit")

    def step() -> None:
        constraint = constraint_multiplier(gradient_gram(p.retain, p.forget), "norm", ETA, max_norm=MAX_NORM)
        optimizer.constrained_step(p.retain, p.forget, constraint)

    return step


def published(p: Problem) -> Callable[[], object]:
    """The sequence of public EraseDiff code: both gradients flattened, then norm, product, combination, clip, Adam."""
    optimizer = torch.optim.Adam(p.params, lr=LR)
    adam_state(optimizer, p)

    def step() -> None:
        retain = torch.cat([r.reshape(-1) for r in p.retain])
        forget = torch.cat([g.reshape(-1) for g in p.forget])
        multiplier = max(0.0, (ETA - torch.dot(retain, forget) / torch.norm(forget).square()).item())
        combined = retain + multiplier * forget
        first = 0
        for param in p.params:
            param.grad = combined[first : first + param.numel()].view_as(param)
            first += param.numel()
        torch.nn.utils.clip_grad_norm_(p.params, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_foreach(p: Problem) -> Callable[[], object]:
    """The least work that torch's own operators allow: products per tensor, combination in place, fused AdamW."""
    optimizer = torch.optim.AdamW(p.params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    adam_state(optimizer, p)

    def step() -> None:
        products = torch.stack([torch.dot(r.view(-1), g.view(-1)) for r, g in zip(p.retain, p.forget, strict=True)])
        squares = torch.stack(torch._foreach_norm(p.forget)).square().sum()
        multiplier = (ETA - products.sum() / squares).clamp_min(0.0)
        if multiplier.is_cuda:
            torch._foreach_add_(p.retain, torch._foreach_mul(p.forget, multiplier))
        else:
            torch._foreach_add_(p.retain, p.forget, alpha=multiplier.item())
        for param, r in zip(p.params, p.retain, strict=True):
            param.grad = r
        torch.nn.utils.clip_grad_norm_(p.params, MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_compile(p: Problem) -> Callable[[], object]:
    """The same arithmetic, written plainly and compiled by torch."""
    params = [param.detach() for param in p.params]

    @torch.compile(fullgraph=True)
    @torch.no_grad()
    def step() -> None:
        products = [(r * g).sum() for r, g in zip(p.retain, p.forget, strict=True)]
        squares = [(g * g).sum() for g in p.forget]
        retains = [(r * r).sum() for r in p.retain]
        rr, rf, ff = (torch.stack(values).sum() for values in (retains, products, squares))
        multiplier = (ETA - rf / ff).clamp_min(0.0)
        norm = (rr + 2.0 * multiplier * rf + multiplier * multiplier * ff).sqrt()
        scale = (MAX_NORM / (norm + 1e-6)).clamp_max(1.0)
        for param, m, v, r, g in zip(params, p.exp_avgs, p.exp_avg_sqs, p.retain, p.forget, strict=True):
            delta = scale * (r + multiplier * g)
            m.lerp_(delta, 0.1)
            v.mul_(0.999).addcmul_(delta, delta, value=0.001)
            param.mul_(1.0 - LR * WEIGHT_DECAY).sub_(LR * m / (v.sqrt() + 1e-8))

    return step


CONTENDERS = {
    "erasediff": erasediff,
    "erasediff_graph": erasediff_graph,
    "erasediff_8bit": erasediff_8bit,
    "published": published,
    "torch_foreach": torch_foreach,
    "torch_compile": torch_compile,
}
