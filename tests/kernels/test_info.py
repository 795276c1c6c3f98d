import json

import pytest

from erasediff_kernels import _dispatch, backend_for, info, use_backend
from erasediff_kernels._library import OPS


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["ops"]) == set(OPS)
    assert report["backends"]["reference"] == ["cpu", "cuda"]
    assert all(choice["cpu"] == backend_for("cpu", op) for op, choice in report["ops"].items())


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    with use_backend("reference"):
        assert info.main([]) == 0
    text = capsys.readouterr().out
    assert "forces reference" in text
    assert all(op in text for op in OPS)


def test_a_forced_backend_that_cannot_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "FROM_ENVIRONMENT", "fastest")
    assert "fastest" in info.choice("add_noise", "cpu")
