"""The constrained step against other ways to do it, in one process and in turns: a busy machine slows all alike."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Problem, problem
from record import append, environment
from shapes import SHAPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {
    "cpu": (("sd15", "float32"), ("equal", "float32"), ("sd15", "bfloat16"), ("small", "float32")),
    "cuda": (("sd15_whole", "float32"), ("sd15_whole", "bfloat16"), ("sd15", "float32"), ("small", "float32")),
}


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def triads(elements: int, device: str) -> dict[str, tuple[Callable[[], object], int]]:
    """STREAM's triad, a = b + s c, and the same in place, with the bytes that they move.

    A store to memory that is not in the cache reads it first, so the first one moves 16 bytes per element on a CPU and
    12 on a GPU. The faster of the two is the floor's bandwidth, which is the harder floor.
    """
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))
    bytes_per_element = 12 if device == "cuda" else 16
    return {
        "triad": (lambda: torch.add(b, c, alpha=1e-9, out=a), bytes_per_element * elements),
        "triad_in_place": (lambda: a.add_(b, alpha=1e-9), 12 * elements),
    }


def peak_extra_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most memory that one run takes beyond what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")
    except OSError:
        return None

    def resident(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) << 10

    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before)


def prepare(names: list[str], p: Problem) -> dict[str, Callable[[], object]]:
    """The contenders that run here, warmed up; one that torch cannot compile is left out, with its reason."""
    ready: dict[str, Callable[[], object]] = {}
    for name in names:
        print(f"  warming up {name} ...", flush=True)
        try:
            run = CONTENDERS[name](p)
            run()
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"  {name} does not run here: {str(error).splitlines()[0]}")
            continue
        run()
        ready[name] = run
    return ready


def measure(shape: str, dtype: str, names: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    p = problem(SHAPES[shape](), DTYPES[dtype], device)
    case = {"benchmark": "step", "shape": shape, "dtype": dtype, "tensors": len(p.params), "numel": p.numel}
    print(f"{shape} {dtype}: {len(p.params)} tensors, {p.numel / 1e6:.1f} M parameters", flush=True)
    ready = prepare(names, p)
    # The triad runs on arrays of the step's own size: small problems live in the caches, and so does their floor.
    floors = triads(max(1, p.moved_bytes() // 5 // 12), device)
    times: dict[str, list[float]] = {name: [] for name in (*ready, *floors)}
    for _ in range(rounds):
        for name, run in ready.items():
            times[name].append(seconds(run, device))
        for name, (run, _moved) in floors.items():
            times[name].append(seconds(run, device))
        print(".", end="", flush=True)
    print()
    bandwidth = max(moved / min(times[name]) for name, (_, moved) in floors.items())
    # Turn by turn as well: what the machine gave at that moment.
    moments = [max(moved / times[name][i] for name, (_, moved) in floors.items()) for i in range(rounds)]
    lines = []
    for name, run in ready.items():
        ratios = [mine / ours for mine, ours in zip(times[name], times.get("erasediff", times[name]), strict=True)]
        floor = [p.moved_bytes() / moment / mine for moment, mine in zip(moments, times[name], strict=True)]
        lines.append(
            case
            | {
                "contender": name,
                "seconds": statistics.median(times[name]),
                "best_seconds": min(times[name]),
                "rounds": rounds,
                "moved_bytes": p.moved_bytes(),
                "floor_bandwidth": bandwidth,
                "of_floor": p.moved_bytes() / bandwidth / min(times[name]),
                "of_floor_in_turns": statistics.median(floor),
                "times_erasediff": statistics.median(ratios),
                "peak_extra_bytes": peak_extra_bytes(run, device),
            }
        )
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    rows = [f"{'case':16} {'contender':16} {'ms':>9} {'best':>9} {'x ours':>7} {'of floor':>9} {'extra MB':>9}"]
    for line in lines:
        extra = line["peak_extra_bytes"]
        rows.append(
            f"{line['shape'] + ' ' + line['dtype'][:8]:16} {line['contender']:16} {line['seconds'] * 1e3:9.2f} "
            f"{line['best_seconds'] * 1e3:9.2f} {line['times_erasediff']:7.2f} {line['of_floor']:9.0%} "
            f"{'?' if extra is None else f'{extra / 1e6:.1f}':>9}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", action="append", help="shape:dtype, e.g. sd15:float32; repeat for more")
    parser.add_argument("--contenders", help="With commas between them.")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well: minutes of compilation")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [tuple(case.split(":")) for case in args.case] if args.case else CASES[device]
    usual = [*(["erasediff_graph"] if device == "cuda" else []), "erasediff_8bit", "published", "torch_foreach"]
    names = args.contenders.split(",") if args.contenders else ["erasediff", *usual]
    names += ["torch_compile"] if args.compile else []
    lines = []
    for shape, dtype in cases:
        new = [environment(device) | line for line in measure(shape, dtype, names, args.rounds, device)]
        append("kernels", new)
        lines += new
    print(table(lines))


if __name__ == "__main__":
    main()
