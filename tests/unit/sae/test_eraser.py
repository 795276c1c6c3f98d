"""Erasing planted concepts: which patches change, to what, and what is saved."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from planted import PROMPTS
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from erasediff.errors import UserError
from erasediff.sae import (
    ActivationCache,
    ConceptEraser,
)
from erasediff.sae.concepts import MeanMaps
from erasediff.sae.eraser import Detection, EditReport, Intervention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=itertools.product(get_args(Detection), get_args(Intervention)), ids="-".join)
def eraser_of_each_rule(planted_eraser: ConceptEraser, request: pytest.FixtureRequest) -> ConceptEraser:
    detection, intervention = request.param
    return dataclasses.replace(planted_eraser, detection=detection, intervention=intervention)


def test_only_patches_with_the_concept_change(planted: ActivationCache, eraser_of_each_rule: ConceptEraser) -> None:
    x, concept = at(planted, 100)
    edited = eraser_of_each_rule.edit(x, torch.tensor(101))
    changed = (edited != x).any(dim=2)
    assert changed[concept == 0].float().mean() > 0.95
    assert changed[concept != 0].float().mean() < 0.05


def test_the_host_reads_nothing(planted: ActivationCache, eraser_of_each_rule: ConceptEraser) -> None:
    """On tensors without values whatever the host would have to know of them raises, so on a GPU it never waits."""
    x, _ = at(planted, 100)
    maps = x.transpose(1, 2).unflatten(2, (5, 8))
    for output in (x, maps, torch.nn.functional.interpolate(maps, size=(6, 9))):
        eraser_of_each_rule.edit(output, torch.tensor(100), report := EditReport())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            edited = eraser_of_each_rule.edit(mode.from_tensor(output), mode.from_tensor(torch.tensor(100)), report)
            assert edited.shape == output.shape
            with pytest.raises(DataDependentOutputException):
                report.edited_rate  # noqa: B018


def at(cache: ActivationCache, timestep: int) -> tuple[Tensor, Tensor]:
    """Images [B, patches, d] of the first shard at a timestep, and their concepts."""
    x, concept, timesteps, _ = cache.images(0)
    return x[:, timesteps.tolist().index(timestep)].float(), concept


def test_an_image_is_edited_as_a_whole_or_not_at_all(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    eraser = dataclasses.replace(planted_eraser, intervention="replace")
    x, concept = at(planted, 100)
    # Of an image with the concept in most patches, one patch that has none of it, and the other way about.
    x[concept == 0, 0], x[concept == 1, 0] = x[concept == 1, 0].clone(), x[concept == 0, 0].clone()
    by_image = eraser.edit(x, torch.tensor(100)) != x
    assert by_image[concept == 0].any(dim=2).all()
    assert not by_image[concept != 0].any()
    by_patch = (dataclasses.replace(eraser, detection="patch").edit(x, torch.tensor(100)) != x).any(dim=2)
    assert not by_patch[concept == 0, 0].any()
    assert by_patch[concept == 1, 0].all()


def test_moving_makes_one_concept_of_another(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    eraser = planted_eraser.erasing(PROMPTS[:1], PROMPTS[2:])
    x, concept = at(planted, 100)
    edited = eraser.edit(x, torch.tensor(100))
    code = eraser.autoencoder.encode(edited[concept == 0].flatten(0, 1))
    z = torch.zeros(len(code.values), eraser.autoencoder.latents).scatter(1, code.indices, code.values)
    assert (z[:, eraser.assigned].argmax(dim=1) == 2).float().mean() > 0.95
    place = eraser.features.timesteps.tolist().index(100)
    expected = eraser.maps.mean[place, 2].float() - eraser.maps.mean[place, 0].float()
    torch.testing.assert_close((edited - x)[concept == 0][0], expected)
    # A map of another size is moved by the interpolated means, and a sequence of another length by none.
    maps = x[concept == 0].transpose(1, 2).unflatten(2, (5, 8))
    larger = torch.nn.functional.interpolate(maps, size=(10, 16))
    moved = eraser.edit(larger, torch.tensor(100)) - larger
    assert moved.abs().min() > 0
    torch.testing.assert_close(moved.mean(dim=(2, 3))[0], expected.mean(dim=0), atol=1e-2, rtol=0)
    with pytest.raises(UserError, match="40 patches and this image has 39"):
        eraser.edit(x[:, :39], torch.tensor(100))


def test_gradients_pass_what_is_edited(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    x, concept = at(planted, 100)
    for intervention in ("move", "steer"):
        leaf = x.clone().requires_grad_()
        edited = dataclasses.replace(planted_eraser, intervention=intervention).edit(leaf, torch.tensor(100))
        assert (edited != x)[concept == 0].any()
        (gradient,) = torch.autograd.grad(edited.sum(), leaf)
        assert gradient[concept == 0].abs().max() > 0
        torch.testing.assert_close(gradient[concept != 0], torch.ones_like(x[concept != 0]))


def test_what_takes_the_place(planted_eraser: ConceptEraser) -> None:
    for erased, anchors, expected in (
        (PROMPTS[:2], (), (2, 2)),
        (PROMPTS[:2], PROMPTS[2:], (2, 2)),
        (PROMPTS[:1], PROMPTS[1:2], (1,)),
    ):
        assert planted_eraser.erasing(erased, anchors).anchors == expected
    mean = torch.tensor([[0.0, 5.0, 3.0]])[..., None, None].half()
    assert MeanMaps(mean, ()).nearest((0,)) == (2,)
    assert MeanMaps(mean, ()).nearest((0, 2)) == (1, 1)
    for erased, anchors, said in (
        (PROMPTS[:1], PROMPTS[:1], "cannot be erased"),
        (PROMPTS[:1], PROMPTS[1:], "2 anchors for 1"),
        (PROMPTS[:1], ("a bird",), "No latent"),
    ):
        with pytest.raises(UserError, match=said):
            planted_eraser.erasing(erased, anchors)


def test_the_published_rule_is_the_papers_formula(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    eraser = dataclasses.replace(planted_eraser, detection="published", intervention="published", strength=-2.0)
    x, _ = at(planted, 900)
    autoencoder, place = eraser.autoencoder, eraser.features.timesteps.tolist().index(900)
    latent = int(eraser.assigned[0])
    mu = eraser.features.mean[place, :, latent]
    patches = x.reshape(-1, x.shape[-1])
    code = autoencoder.encode(patches)
    z = torch.zeros(len(patches), autoencoder.latents).scatter(1, code.indices, code.values)
    steered = z.clone()
    steered[:, latent] = torch.where(z[:, latent] > mu.mean(), -2.0 * mu[0] * z[:, latent], z[:, latent])
    expected = steered @ autoencoder.W_dec + autoencoder.b_dec + (patches - autoencoder.decode(code))
    assert (expected - patches).abs().max() > 0.1
    torch.testing.assert_close(eraser.edit(x, torch.tensor(900)), expected.view_as(x))


def test_replaced_patches_are_real_and_no_artifacts(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    x, concept = at(planted, 900)
    x = x[concept == 0]
    rates = {}
    for strength, intervention in ((-1.0, "replace"), (-30.0, "steer")):
        report = EditReport()
        edited = dataclasses.replace(planted_eraser, intervention=intervention, strength=strength).edit(
            x, torch.tensor(900), report
        )
        rates[intervention] = report.artifact_rate
        if intervention == "replace":
            place = planted_eraser.features.timesteps.tolist().index(900)
            others = planted_eraser.bank[place][planted_eraser.bank_concepts[place] != 0].float()
            assert torch.cdist(edited[0], others).min(dim=1).values.max() < 1e-2
    assert rates["replace"] <= 0.05 < rates["steer"]


def test_what_is_put_in_the_place_is_never_of_an_erased_concept(
    planted: ActivationCache, planted_eraser: ConceptEraser
) -> None:
    eraser = dataclasses.replace(planted_eraser.erasing(PROMPTS[:2]), intervention="replace")
    place = eraser.features.timesteps.tolist().index(100)
    x, concept = at(planted, 100)
    edited = eraser.edit(x[concept < 2], torch.tensor(100)).flatten(0, 1)
    source = torch.cdist(edited, eraser.bank[place].float()).argmin(dim=1)
    assert eraser.bank_concepts[place][source].tolist() == [2] * len(edited)


def test_several_concepts_at_once_and_one_after_another(
    planted: ActivationCache, planted_eraser: ConceptEraser
) -> None:
    eraser = dataclasses.replace(planted_eraser, intervention="steer", strength=0.0)
    x, time = at(planted, 100)[0], torch.tensor(100)
    both = eraser.erasing(PROMPTS[:2]).edit(x, time)
    one_by_one = eraser.erasing(PROMPTS[1:2]).edit(eraser.erasing(PROMPTS[:1]).edit(x, time), time)
    before = eraser.autoencoder.encode(x.flatten(0, 1))
    for edited in (both, one_by_one):
        code = eraser.autoencoder.encode(edited.flatten(0, 1))
        left = (code.values * torch.isin(code.indices, eraser.assigned[:2])).sum()
        assert left < 0.05 * (before.values * torch.isin(before.indices, eraser.assigned[:2])).sum()
    with pytest.raises(UserError, match="No latent"):
        eraser.erasing(["a bird"])
    with pytest.raises(UserError, match="leave one"):
        eraser.erasing(PROMPTS)


def test_saved_and_loaded(planted: ActivationCache, planted_eraser: ConceptEraser, tmp_path: Path) -> None:
    eraser = planted_eraser
    eraser.save(tmp_path / "eraser")
    loaded = ConceptEraser.load(tmp_path / "eraser")
    x, _ = at(planted, 900)
    assert torch.equal(loaded.edit(x, torch.tensor(500)), eraser.edit(x, torch.tensor(500)))
    assert (loaded.concepts, loaded.erased, loaded.block) == (eraser.concepts, eraser.erased, eraser.block)
    assert loaded.erasing(PROMPTS[:2]).anchors == (2, 2)
    with pytest.raises(UserError, match="exists"):
        eraser.save(tmp_path / "eraser")
    described = json.loads((tmp_path / "eraser" / "concepts.json").read_text())
    for wrong in ({"erased": ["a bird"]}, {"k": "8"}, {"strength": float("nan")}, {"detection": "x"}, {"concepts": 5}):
        (tmp_path / "eraser" / "concepts.json").write_text(json.dumps({**described, **wrong}))
        with pytest.raises(UserError, match=r"no concept eraser|concepts\.json cannot be read: it is damaged"):
            ConceptEraser.load(tmp_path / "eraser")
    (tmp_path / "eraser" / "concepts.json").write_text(json.dumps(described))
    tensors = load_file(tmp_path / "eraser" / "sae.safetensors")
    tensors["W_dec"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "eraser" / "sae.safetensors")
    with pytest.raises(UserError, match="W_dec holds NaN"):
        ConceptEraser.load(tmp_path / "eraser")
