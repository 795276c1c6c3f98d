"""Concept scores, latents' assignment to concepts, and detection thresholds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erasediff.sae import (
    ActivationCache,
    Features,
    SparseAutoencoder,
    assign_latents,
)
from erasediff.sae.concepts import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_scores_and_assignment() -> None:
    mean = torch.tensor([[[4.0, 1.0, 0.0], [1.0, 1.0, 3.0]]])
    scores = Features(mean, torch.tensor([5])).scores()
    torch.testing.assert_close(scores[0, 0], torch.tensor([4 / 5 - 1 / 5, 1 / 5 - 1 / 5, -3 / 5]))
    torch.testing.assert_close(scores[0, 1], -scores[0, 0])
    same = Features(torch.tensor([[[4.0, 1.0, 0.0], [3.0, 1.5, 0.0], [0.0, 0.0, 9.0]]]), torch.tensor([5]))
    assert sorted(assign_latents(same).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="two"):
        Features(mean[:, :1], torch.tensor([5])).scores()


def test_thresholds_are_where_recall_exceeds_false_positives_most(tmp_path: Path) -> None:
    """Latents that read one number each: the first tells the two concepts apart, the second nothing."""
    autoencoder = SparseAutoencoder(2, 2, 1)
    eye = {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2)}
    autoencoder.load_state_dict(eye)
    first = torch.tensor([[[5.0, 3.0]], [[-1.0, 2.0]], [[4.0, 4.0]], [[0.0, -2.0]]])
    x = torch.stack([first, torch.ones(4, 1, 2)], dim=-1).half()
    concept = torch.tensor([0, 1, 0, 1])
    tensors = {"activations": x, "concept": concept, "drawn": concept.clone(), "timestep": torch.tensor([7])}
    save_file(tensors, tmp_path / "shard.safetensors")
    cache = ActivationCache((tmp_path / "shard.safetensors",))
    thresholds, patches, images = calibrate(autoencoder, torch.tensor([0, 1]), cache, torch.tensor([7]))
    assert thresholds.patch[0, 0] == 2.5
    assert thresholds.image[0, 0] == (4 + 0.5) / 2
    assert patches.of(0) == images.of(0) == {"recall": 1.0, "false_positives": 0.0, "auc": 1.0}
    assert torch.isinf(thresholds.image[0, 1])
    assert images.of(1) == {"recall": 0.0, "false_positives": 0.0, "auc": 0.5}


def test_a_threshold_lets_no_more_through_than_it_may(tmp_path: Path) -> None:
    autoencoder = SparseAutoencoder(1, 1, 1)
    autoencoder.load_state_dict({name: torch.ones_like(tensor) for name, tensor in autoencoder.state_dict().items()})
    scores = torch.tensor([9.0, 6.0, 5.0, 4.0, 8.0, 3.0, 2.0, 1.0, 7.0])
    concept, drawn = torch.tensor([0] * 4 + [1] * 5), torch.tensor([0] * 4 + [1] * 4 + [0])
    tensors = {"activations": scores.view(9, 1, 1, 1).half(), "concept": concept, "drawn": drawn}
    save_file(tensors | {"timestep": torch.tensor([7])}, tmp_path / "shard.safetensors")
    cache = ActivationCache((tmp_path / "shard.safetensors",))
    found = {
        most: calibrate(autoencoder, torch.tensor([0]), cache, torch.tensor([7]), most)[2].of(0) for most in (0.3, 0.2)
    }
    # The last image, of the concept under another's prompt, is no false positive.
    assert (found[0.3]["recall"], found[0.3]["false_positives"]) == (1.0, 0.25)
    assert (found[0.2]["recall"], found[0.2]["false_positives"]) == (0.25, 0.0)
