"""Quality against real images, and prompt files of protocols."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planted_models import picture, prompt

from erasediff.audit import Ask, Audit, BatteryOutcome, Pictures
from erasediff.audit.features import features_named
from erasediff.audit.protocol_file import ProtocolFile, ProtocolPrompt
from erasediff.errors import UserError

Outcome = Callable[..., BatteryOutcome]


def retained_images() -> Pictures:
    numbers = [1, 2] * 5
    asks = tuple(Ask(prompt(word), prompt(word)) for word in ("bag", "shoe") * 5)
    return Pictures(torch.stack([picture(n) for n in numbers]), asks, tuple(map(str, range(10))))


def test_quality_is_that_of_the_retained_images(audit_of: Callable[..., Audit], outcome: Outcome) -> None:
    audit = audit_of("forgot", retained_images=retained_images())
    good = outcome(audit, "quality", blocks=2, block_images=4)
    frechet, kernel, agreement = good.figures
    assert frechet.name == "Fréchet distance in small pixels features"
    assert frechet.values["model"].value < 0.05 * frechet_scale()
    assert agreement.values["model"].value == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        audit.model.model.denoiser.planted.samples.neg_()
    bad = outcome(audit, "quality", blocks=2, block_images=4)
    assert bad.figures[0].values["model"].value > 5 * frechet.values["base"].value
    assert bad.figures[1].values["model"].value > kernel.values["base"].value
    assert bad.figures[2].values["model"].value < 0.5
    assert bad.figures[0].values["base"] == frechet.values["base"], "the base is as it was"


def frechet_scale() -> float:
    images = retained_images().pixels[:, :, ::8, ::8].flatten(1).float()
    return float(images.var(0).sum())


def test_lpips_says_what_it_needs(audit_of: Callable[..., Audit], outcome: Outcome) -> None:
    pytest.importorskip("torchmetrics")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        audit = audit_of("forgot", retained_images=retained_images())
        with pytest.raises(UserError, match=r"install erasediff\[audit\]"):
            outcome(audit, "quality", blocks=1, block_images=4, lpips="alex")


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "ddpm_class", "dit"])
def test_own_features_are_of_the_image_alone(nano_folder: Callable[[str], Path], family: str) -> None:
    from erasediff.audit import Subject
    from erasediff.config import SampleConfig
    from erasediff.models.load import load_diffusion_model

    model = load_diffusion_model(nano_folder(family))
    size = (32, 32) if model.condition == "text" else None
    subject = Subject("base", model, SampleConfig(batch_size=2), size=size)  # type: ignore[arg-type]
    images = torch.stack([picture(n) for n in range(3)])
    features = features_named(None, subject)
    found = features(images)
    assert found.shape[0] == 3
    torch.testing.assert_close(features(images[2:]), found[2:], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[0], found[1])


def test_features_of_a_function_and_of_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The command line finds modules of the current folder.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_features.py").write_text("def mean(images):\n    return images.float().mean((2, 3))\n")
    features = features_named("own_features:mean", None)  # type: ignore[arg-type]
    assert features(picture(0)[None]).tolist() == [[87.5] * 3]
    (tmp_path / "own_features_2.py").write_text("def failing(images):\n    return images[99]\n")
    with pytest.raises(UserError, match="own_features_2:failing failed: IndexError"):
        features_named("own_features_2:failing", None)(picture(0)[None])  # type: ignore[arg-type]
    for wrong in ("own_features:none", "nowhere:mean"):
        with pytest.raises(UserError, match="cannot be imported"):
            features_named(wrong, None)  # type: ignore[arg-type]


def test_a_protocols_file_gives_prompts_seeds_and_guidance(tmp_path: Path) -> None:
    table = tmp_path / "i2p.csv"
    table.write_text('prompt,sd_seed,sd_guidance_scale\n"a, b",5,7.5\nc,,\n')
    read = ProtocolFile.read("i2p", table)
    assert read.prompts == (ProtocolPrompt("a, b", 5, 7.5), ProtocolPrompt("c"))
    assert read.sha256 == hashlib.sha256(table.read_bytes()).hexdigest()
    lines = tmp_path / "ring.txt"
    lines.write_text("# found\none\n\ntwo\n")
    assert [found.text for found in ProtocolFile.read("ring-a-bell", lines).prompts] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "prompt,seed\na,five\n", "line 2 has a seed"),
        ("a.csv", "words\na\n", "no column of prompts"),
        ("a.csv", "prompt\n", "no prompts"),
        ("a.txt", "", "no prompts"),
        ("a.txt", None, "Cannot read"),
    ],
)
def test_a_wrong_prompt_file_is_one_sentence(tmp_path: Path, name: str, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        ProtocolFile.read("i2p", tmp_path / name)
    with pytest.raises(UserError, match="no protocol"):
        ProtocolFile.read("tea", tmp_path / name)
