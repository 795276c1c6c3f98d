"""Draw the step's times from benchmarks/results/kernels.jsonl, and from nothing else: the last line of each case."""

import matplotlib.pyplot as plt
from contenders import CONTENDERS
from record import RESULTS, read

from erasediff.report.figures import save_figure

OURS, THEIRS = "#2563eb", "#9ca3af"


def main() -> None:
    lines = [line for line in read(RESULTS / "kernels.jsonl") if line["benchmark"] == "step"]
    latest = {(line["device"], line["shape"], line["dtype"], line["contender"]): line for line in lines}
    devices: dict[str, list[tuple[str, str, str]]] = {}
    for case in dict.fromkeys(key[:3] for key in latest):
        devices.setdefault(case[0], []).append(case)
    columns = max(map(len, devices.values()))
    size = (3.6 * columns, 2.4 * len(devices))
    figure, axes = plt.subplots(len(devices), columns, figsize=size, squeeze=False, layout="constrained")
    for row, (device, cases) in zip(axes, devices.items(), strict=True):
        for axis in row[len(cases) :]:
            axis.set_axis_off()
        for axis, case in zip(row, cases, strict=False):
            mine = {name: latest[*case, name] for name in CONTENDERS if (*case, name) in latest}
            times = [line["seconds"] * 1e3 for line in mine.values()]
            colours = [OURS if name.startswith("erasediff") else THEIRS for name in mine]
            bars = axis.barh(list(mine), times, color=colours)
            axis.bar_label(bars, [f"{time:,.2f}" if time < 10 else f"{time:,.0f}" for time in times], padding=2)
            floor = max(line["moved_bytes"] / line["floor_bandwidth"] * 1e3 for line in mine.values())
            axis.axvline(floor, linestyle="--", color="black", label="floor")
            axis.set(title=f"{device}: {case[1]}, {case[2]}", xlabel="ms per step", xscale="log")
            axis.set_xlim(min(floor, *times) / 2, max(times) * 4)
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(loc="lower right")
    path = RESULTS / "kernels.svg"
    save_figure(figure, path)
    print(path)


if __name__ == "__main__":
    main()
