"""Draw the step's times from benchmarks/results/kernels.jsonl, and from nothing else."""

import matplotlib.pyplot as plt
from record import RESULTS, read


def main() -> None:
    lines = [line for line in read(RESULTS / "kernels.jsonl") if line["benchmark"] == "step"]
    latest = {(line["device"], line["shape"], line["dtype"], line["contender"]): line for line in lines}
    cases = sorted({key[:3] for key in latest})
    figure, axes = plt.subplots(1, len(cases), figsize=(3.2 * len(cases), 3.2), squeeze=False, layout="constrained")
    for axis, case in zip(axes[0], cases, strict=True):
        mine = {key[3]: line for key, line in latest.items() if key[:3] == case}
        axis.bar(mine.keys(), [line["seconds"] * 1e3 for line in mine.values()])
        floor = next(iter(mine.values()))
        axis.axhline(
            floor["moved_bytes"] / floor["floor_bandwidth"] * 1e3, linestyle="--", color="black", label="floor"
        )
        axis.set(title="\n".join(case), ylabel="ms per step", yscale="log")
        axis.tick_params(axis="x", rotation=30)
        axis.legend()
    path = RESULTS / "kernels.svg"
    figure.savefig(path)
    print(path)


if __name__ == "__main__":
    main()
