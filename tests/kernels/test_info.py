import json

import pytest

from erasediff_kernels import _dispatch, info, use_backend
from erasediff_kernels._library import OPS


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["ops"]) == set(OPS)
    assert report["backends"]["reference"] == ["cpu", "cuda"]
    assert all(choice["cpu"] == _dispatch.selected("cpu") for choice in report["ops"].values())


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    with use_backend("reference"):
        assert info.main([]) == 0
    text = capsys.readouterr().out
    assert "forces reference" in text
    assert all(op in text for op in OPS)


def test_a_forced_backend_that_cannot_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_forced", "fastest")
    assert "fastest" in info.runs("cpu")
