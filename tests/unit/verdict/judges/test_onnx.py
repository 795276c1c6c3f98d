"""Judge of an ONNX file: a graph whose scores are the mean of each channel."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from erasediff.errors import UserError
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.registry import judge_named

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def save(
    path: Path, shape: list[Any], *, axes: tuple[int, int] = (2, 3), dtype: str = "FLOAT", **metadata: str
) -> Path:
    """Write a graph from images of ``shape`` to their means over ``axes``."""
    kind = getattr(onnx.TensorProto, dtype)
    helper = onnx.helper
    nodes = [
        helper.make_node("Cast", ["images"], ["values"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values"], ["scores"], axes=list(axes), keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


LABELS = json.dumps(["red", "green", "blue"])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (["n", 3, 8, 8], {}),
        (["n", 3, "h", "w"], {}),
        ([2, 3, 8, 8], {}),
        (["n", 8, 8, 3], {"axes": (1, 2)}),
        (["n", 3, 8, 8], {"dtype": "UINT8"}),
        (["n", 3, 8, 8], {"dtype": "FLOAT16", "mean": "0.5", "std": "[0.5, 0.5, 0.5]"}),
    ],
)
def test_layouts_and_types_are_read_from_the_graph(
    shape: list[Any], options: dict[str, Any], candidates: list[Candidate], plain_images: Tensor, tmp_path: Path
) -> None:
    judge = judge_named(f"onnx:{save(tmp_path / 'means.onnx', shape, labels=LABELS, **options)}")
    images = plain_images[[0, 2, 1, 1, 0]]
    assert judge.answers(images, candidates[2:], candidates[:1]).tolist() == [1, 0, -1, -1, 1]


def test_labels_come_from_a_file_or_the_metadata(
    candidates: list[Candidate], plain_images: Tensor, tmp_path: Path
) -> None:
    bare = save(tmp_path / "bare.onnx", ["n", 3, 8, 8])
    (tmp_path / "labels.txt").write_text("blue\ngreen\nred\n")
    judge = judge_named(f"onnx:{bare}:{tmp_path / 'labels.txt'}")
    assert judge.answers(plain_images, candidates[:1], candidates[1:]).tolist() == [2, 1, 0]
    assert judge.description["sha256"].keys() == {"bare.onnx", "labels.txt"}
    for names in ("{0: 'red', 1: 'green', 2: 'blue'}", '{"0": "red", "1": "green", "2": "blue"}', "red, green,blue"):
        named = save(tmp_path / "named.onnx", ["n", 3, 8, 8], names=names)
        answers = judge_named(f"onnx:{named}").answers(plain_images, candidates[:1], candidates[1:])
        assert answers.tolist() == [0, 1, 2]


def test_normalisation_is_imagenets_unless_the_metadata_says_another(
    candidates: list[Candidate], plain_images: Tensor, tmp_path: Path
) -> None:
    default = judge_named(f"onnx:{save(tmp_path / 'a.onnx', ['n', 3, 8, 8], labels=LABELS)}")
    assert default.description["normalisation"]["mean"] == [0.485, 0.456, 0.406]
    # By so large a mean of red that a red image has its least score there.
    other = judge_named(f"onnx:{save(tmp_path / 'b.onnx', ['n', 3, 8, 8], labels=LABELS, mean='9,0,0', std='1')}")
    assert default.answers(plain_images[:1], candidates[:1], candidates[1:]).tolist() == [0]
    assert other.answers(plain_images[:1], candidates[:1], candidates[1:]).tolist() != [0]


@pytest.mark.parametrize(
    ("shape", "metadata", "told"),
    [
        (["n", 3, 8, 8], {}, "does not name its labels"),
        (["n", 3, 8, 8], {"labels": "{1: 'red'}"}, "not numbered from 0"),
        (["n", 3, 8, 8], {"labels": "{1: 'red'"}, "not valid YAML"),
        (["n", 3, 8, 8], {"labels": LABELS, "std": "0"}, "std"),
        (["n", 3, 8, 8], {"labels": LABELS, "mean": "red"}, "mean"),
        (["n", 5, 8, 8], {"labels": LABELS}, "5 channels"),
        (["n", 8], {"labels": LABELS}, "give one of images"),
    ],
)
def test_other_graphs_and_metadata_are_refused(
    shape: list[Any], metadata: dict[str, str], told: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "means.onnx", shape, axes=(0, 1) if len(shape) == 2 else (2, 3), **metadata)
    with pytest.raises(UserError, match=told):
        judge_named(f"onnx:{path}")


def test_the_number_of_labels_must_be_that_of_the_scores(
    candidates: list[Candidate], plain_images: Tensor, tmp_path: Path
) -> None:
    judge = judge_named(f"onnx:{save(tmp_path / 'means.onnx', ['n', 3, 8, 8], labels='red, green')}")
    with pytest.raises(UserError, match="2 labels"):
        judge.answers(plain_images, candidates[:1], candidates[1:2])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "means.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="cannot be read as ONNX"):
        judge_named(f"onnx:{tmp_path / 'means.onnx'}")


def test_the_absent_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "means.onnx", ["n", 3, 8, 8], labels=LABELS)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install"):
        judge_named(f"onnx:{path}")
