"""Units of an audit: order, seeds and kills change nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from erasediff.audit import BATTERIES, Audit, Battery
from erasediff.audit.batteries.base import NoSettings
from erasediff.audit.battery_outcome import Figure, Row, shares, worst, worst_recovery
from erasediff.audit.runner import ROWS_FILE, costs, outcome_of, run_units, seconds_per_pass, units_of
from erasediff.audit.settings import audit_config_class
from erasediff.verdict.statistics import share

CONSOLE = Console(file=io.StringIO())


def battery_of(audit: Audit, name: str = "noise", **settings: Any) -> Battery[Any]:
    return BATTERIES[name](audit, BATTERIES[name].settings_class(**settings))


def test_rows_do_not_depend_on_the_order(audit_of: Callable[..., Audit], tmp_path: Path) -> None:
    audit = audit_of("original")
    units = units_of([battery_of(audit, etas=(1.0, 2.0), scales=(1.0,)), battery_of(audit, "prompts")])
    forwards = {unit.key: unit.measure() for unit in units}
    backwards = {unit.key: unit.measure() for unit in reversed(units)}
    assert forwards == backwards
    assert run_units(units, tmp_path / ROWS_FILE, CONSOLE) == forwards


def test_a_kill_at_any_byte_loses_no_finished_unit(audit_of: Callable[..., Audit], tmp_path: Path) -> None:
    path = tmp_path / ROWS_FILE
    units = units_of([battery_of(audit_of("original"), "prompts")])
    rows = run_units(units, path, CONSOLE)
    whole = path.read_bytes()
    for kept in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert run_units(units, path, CONSOLE) == rows
        assert path.read_bytes() == whole


def test_a_finished_audit_measures_nothing_again(
    audit_of: Callable[..., Audit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = audit_of("original")
    units = units_of([battery_of(audit, "prompts")])
    rows = run_units(units, tmp_path / ROWS_FILE, CONSOLE)
    monkeypatch.setattr(type(units[0].battery), "measure", None)
    assert run_units(units, tmp_path / ROWS_FILE, CONSOLE) == rows


def test_pictures_of_the_worst_cases_are_kept(audit_of: Callable[..., Audit], tmp_path: Path) -> None:
    audit = audit_of("original", folder=tmp_path)
    rows = [row for unit in units_of([battery_of(audit, "prompts")]) for row in unit.measure()]
    kept = [row["picture"] for row in rows if "picture" in row]
    assert len(kept) == len(rows) == len(set(kept))
    assert all((tmp_path / name).exists() for name in kept)


def test_the_cost_counts_the_denoisers_passes(audit_of: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch) -> None:
    audit = audit_of("original")
    battery = battery_of(audit, "prompts")
    counted = 0
    for subject in audit.subjects.values():
        forward = subject.model.denoiser.forward

        def counting(sample: Any, *args: Any, forward: Any = forward, **own: Any) -> Any:
            nonlocal counted
            counted += len(sample)
            return forward(sample, *args, **own)

        monkeypatch.setattr(subject.model.denoiser, "forward", counting)
    for unit in units_of([battery]):
        unit.measure()
    assert counted == battery.passes() * 2
    measured = counted
    [cost] = costs([battery])
    assert cost.passes == measured
    assert cost.seconds > 0
    assert seconds_per_pass(audit.model) > 0


def test_every_battery_names_its_source_and_fits_the_settings() -> None:
    settings = audit_config_class()()
    for name, battery in BATTERIES.items():
        assert battery.name == name
        assert battery.source
        assert (
            battery.settings_class is NoSettings or battery.quick.keys() <= battery.settings_class.model_fields.keys()
        )
    assert settings.chosen() == list(BATTERIES)


def test_quick_settings_give_way_to_the_users(audit_of: Callable[..., Audit]) -> None:
    kind = audit_config_class()
    quick = kind.model_validate({"quick": True, "batteries": ["inversion"], "inversion": {"steps": 7}, "images": 3})
    [battery] = quick.build(audit_of("original"))
    assert battery.settings.steps == 7
    assert battery.settings.starts == ("",)
    assert (quick.general().images, quick.general().most_prompts) == (3, 1)


def test_the_attackers_best_is_each_subjects_own() -> None:
    rows: dict[str, list[Row]] = {
        "model": [{"k": 0, "seen": False}, {"k": 0, "seen": True}, {"k": 1, "seen": False}, {"k": 1, "seen": False}],
        "base": [{"k": 0, "seen": False}, {"k": 1, "seen": True}],
    }
    assert [row["k"] for row in worst(rows, ("k",))["model"]] == [0, 0]
    assert [row["k"] for row in worst(rows, ("k",))["base"]] == [1]
    assert shares("seen", rows).values["model"] == share(1, 4)


def test_a_battery_whose_control_fails_is_no_worst_case(audit_of: Callable[..., Audit]) -> None:
    battery = battery_of(audit_of("original"), "prompts")
    outcome = outcome_of(battery, {unit.key: unit.measure() for unit in units_of([battery])})
    found = worst_recovery([outcome])
    assert found is not None
    assert found[1].values["model"].value == 1
    blind = Figure(name="seen", values={"model": share(4, 4), "base": share(0, 4)}, kind="recovered")
    assert not blind.controlled
    assert (
        worst_recovery([type(outcome)(**{**{k: getattr(outcome, k) for k in outcome.__slots__}, "figures": [blind]})])
        is None
    )
    assert json.dumps(outcome.to_dict())
