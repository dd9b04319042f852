"""Objectives, timesteps and weights against their closed forms."""

import pytest
import torch
from torch import nn

from ldm_pipeline import build_unet
from ldm_pipeline.pipeline import Condition, Objective
from training.config import DenoiserConfig, objective_of
from training.data.order import batch_slices
from training.losses.denoising import (
    DenoisingLoss,
    denoising_errors,
    min_snr_weight,
    sample_timesteps,
    stratified,
)
from training.runtime.distributed import seed_dropout, use_global_dropout

TYPES = ("epsilon", "v_prediction", "flow_prediction")


class Knowing(nn.Module):
    """A denoiser that knows the clean latents, so its prediction has no error."""

    def __init__(self, prediction_type, objective, clean):
        super().__init__()
        self.prediction_type, self.objective, self.clean = prediction_type, objective, clean

    def forward(self, noisy, timesteps, return_dict):
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in self.objective.alpha_sigma(timesteps))
        noise = (noisy - alpha * self.clean) / sigma
        by_type = {"epsilon": noise, "v_prediction": alpha * noise - sigma * self.clean}
        return (by_type.get(self.prediction_type, noise - self.clean),)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_denoiser_that_knows_the_image_has_no_error(prediction_type):
    objective = Objective(objective_of(DenoiserConfig(prediction_type=prediction_type)))
    clean, noise = torch.randn(2, 64, 2, 4, 4)
    timesteps = sample_timesteps(
        DenoiserConfig(prediction_type=prediction_type), stratified(torch.rand(64)) * 0.9 + 0.05
    )
    errors, _ = denoising_errors(
        Knowing(prediction_type, objective, clean), objective, clean, noise, timesteps, Condition()
    )
    assert errors.max() < 1e-5


def test_logit_normal_timesteps_have_their_mean_and_deviation():
    config = DenoiserConfig(logit_mean=-0.4, logit_std=1.2)
    logits = torch.logit(
        sample_timesteps(config, torch.rand(100_000, generator=torch.Generator().manual_seed(0))) / 1000
    )
    assert abs(logits.mean() + 0.4) < 0.02 and abs(logits.std() - 1.2) < 0.02


@pytest.mark.parametrize("prediction_type", TYPES)
def test_uniform_timesteps_reach_the_whole_range_and_no_further(prediction_type):
    config = DenoiserConfig(prediction_type=prediction_type, timestep_density="uniform")
    timesteps = sample_timesteps(config, stratified(torch.rand(4000)))
    assert 0 <= timesteps.min() < 1 and 998 < timesteps.max() <= 1000
    Objective(objective_of(config)).alpha_sigma(timesteps)  # every index exists


@pytest.mark.parametrize("prediction_type", TYPES)
def test_min_snr_weighs_the_error_of_the_clean_latents_alike_under_every_prediction(prediction_type):
    """The same wrong guess of the clean latents costs min(SNR, gamma) times its square, in any terms."""
    alpha, sigma = torch.tensor([0.9, 0.6, 0.2]), torch.tensor([0.1, 0.8, 0.7])
    to_prediction = {"epsilon": alpha / sigma, "v_prediction": 1 / sigma, "flow_prediction": 1 / sigma}
    cost = min_snr_weight(prediction_type, alpha, sigma, 5.0) * to_prediction[prediction_type] ** 2
    assert torch.allclose(cost, ((alpha / sigma) ** 2).clamp(max=5.0))


def test_learned_uncertainty_finds_the_log_of_the_loss():
    """At the minimum of loss / exp(u) + u, u is the log of the mean loss (EDM2, section 2.4)."""
    loss = DenoisingLoss(
        build_unet(4, 2, [8], norm_groups=4, attention_head_dim=8), DenoiserConfig(loss_weight="uncertainty")
    )
    optimizer = torch.optim.Adam(loss.uncertainty.parameters(), lr=0.03)
    timesteps = torch.linspace(0, 1000, 64)
    errors = 0.1 + timesteps / 1000
    for _ in range(400):
        log_variance = loss.uncertainty(timesteps)
        (errors / log_variance.exp() + log_variance).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (loss.uncertainty(timesteps) - errors.log()).abs().mean() < 0.1


@pytest.mark.parametrize("weight", ["none", "min_snr", "uncertainty"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_every_parameter_gets_a_gradient(prediction_type, weight):
    torch.manual_seed(0)
    config = DenoiserConfig(prediction_type=prediction_type, loss_weight=weight)
    unet = build_unet(4, 2, [8, 16], 1, [False, True], attention_head_dim=8, norm_groups=4, num_classes=3)
    trained = DenoisingLoss(unet, config)
    timesteps = sample_timesteps(config, stratified(torch.rand(8)))
    labels = Condition(class_labels=torch.tensor([0, 1, 2, 3] * 2))
    loss, _ = trained(torch.randn(8, 2, 4, 4), torch.randn(8, 2, 4, 4), timesteps, labels)
    loss.backward()
    assert [
        name for name, p in trained.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


def test_dropped_labels_are_the_null_class_k():
    unet = build_unet(4, 2, [8], norm_groups=4, attention_head_dim=8, num_classes=10)
    dropped = torch.tensor([True, False, True])
    condition = Condition(class_labels=torch.tensor([0, 5, 9])).drop(dropped, Condition.null(unet, 3))
    assert condition.class_labels.tolist() == [10, 5, 10]
    assert unet.class_embedding.weight.shape[0] == 11


@pytest.mark.parametrize("parts", [2, 5])
def test_dropout_masks_depend_on_seed_step_layer_and_row_alone(parts):
    """Whatever process or accumulation part computes a row of the global batch; blocks end inside parts."""
    network = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout(0))
    dropouts = use_global_dropout(network)
    values = torch.ones(40, 3, 8, 8)

    def dropped(step, rows, layer=0, seed=0):
        seed_dropout(dropouts, seed, step, rows)
        return dropouts[layer](values[rows])

    whole = dropped(1, slice(0, 40))
    assert torch.equal(whole, torch.cat([dropped(1, rows) for rows in batch_slices(40, 0, 1, parts)]))
    assert whole.unique().tolist() == [0, 2] and 0.9 < whole.mean() < 1.1
    others = [dropped(2, slice(0, 40)), dropped(1, slice(0, 40), layer=1), dropped(1, slice(0, 40), seed=1)]
    assert not any(torch.equal(whole, other) for other in others)
    assert not torch.equal(whole[:16], whole[16:32])
    assert torch.equal(network.eval()(values), values) and len(dropouts) == 2
