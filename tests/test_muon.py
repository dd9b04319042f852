"""Muon: its steps in closed form, and that nothing else of a run changes with it."""

import shutil
import signal
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from chaos import differences, kill_and_tear, strike_in_writes
from conftest import TINY, launch, start
from fork_server import environment
from safetensors.torch import load_file
from torch import nn

from ldm_pipeline.models import build_autoencoder
from training.config import DenoiserConfig, parse_config
from training.losses.autoencoder import PatchDiscriminator
from training.losses.denoising import DenoisingLoss
from training.networks import blank_condition, new_denoiser
from training.runtime.muon import COEFFICIENTS, inner_matrices, orthogonalized
from training.runtime.optimization import build_optimizer, optimizer_step
from training.runtime.timing import time_step

MUON = DenoiserConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(32, 288), (48, 48), (64, 16)])
def test_singular_values_become_those_of_the_polynomial_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert torch.allclose(orthogonalized(matrix), left * values @ right, atol=1e-5)
    assert values.max() < 1.25 and values.median() > 0.65


def tiny_denoiser() -> DenoisingLoss:
    config = parse_config(["--config", str(TINY)])
    return DenoisingLoss(new_denoiser(config, None, (32, 8, 8)), config.denoiser)


def test_matrices_inside_of_networks_are_its_and_all_others_adamws():
    autoencoder = build_autoencoder("AutoencoderKL", [16, 32], [1, 1], 32)
    for module, others in (
        (tiny_denoiser(), "unet.conv_in unet.conv_out unet.time_embedding time_emb_proj uncertainty"),
        (autoencoder, "coder.conv_in coder.conv_out quant_conv"),
        (PatchDiscriminator(3), "0.weight 8.weight"),
        (nn.Sequential(nn.Embedding(32, 32), nn.Conv2d(32, 32, 3, groups=2)), "0.weight 1.weight"),
    ):
        own = {id(matrix) for matrix in inner_matrices(module)}
        for name, parameter in module.named_parameters():
            inside = parameter.ndim > 1 and not any(other in name for other in others.split())
            assert (id(parameter) in own) == inside, name


def step_with(
    optimizer: torch.optim.Optimizer, module: nn.Module, size: float, seed: int = 0
) -> torch.Tensor:
    """A step along random gradients of deviation `size`; returns what it adds to the module's weight."""
    generator, before = torch.Generator().manual_seed(seed), module.weight.detach().clone()
    for parameter in module.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return module.weight.detach() - before


def test_a_convolution_is_its_flattened_matrix_and_moves_at_the_learning_rate():
    convolution, linear = nn.Conv2d(32, 64, 3), nn.Linear(288, 64)
    flat = {
        name: value.flatten(1) if value.ndim > 1 else value for name, value in convolution.named_parameters()
    }
    linear.load_state_dict(flat)
    for module in (convolution, linear):
        optimizer, weight = build_optimizer(MUON, module), module.weight
        decay = step_with(optimizer, module, 0.0)
        assert torch.allclose(decay, -MUON.learning_rate * MUON.weight_decay * weight, atol=1e-6)
        for seed, size in enumerate((1e-3, 1e3)):
            change = step_with(optimizer, module, size, seed).square().mean().sqrt()
            assert 0.5 < change / MUON.learning_rate < 0.7
        assert set(optimizer.state[weight]) == {"momentum"}
        assert set(optimizer.state[module.bias]) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(convolution.weight.flatten(1), linear.weight)
    assert torch.equal(convolution.bias, linear.bias)


def trained(bad_steps: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network after three good steps, and steps without finite gradients where there are bad ones."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    optimizer, accelerator = build_optimizer(MUON, module), Accelerator(cpu=True)
    for step in range(3):
        for bad in (True, False) if step in bad_steps else (False,):
            inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            module(inputs).square().sum().backward()
            if bad:
                module[2].weight.grad[0, 0] = torch.inf
            assert optimizer_step(accelerator, optimizer, 1.0)[1] == bad
    return module, optimizer


def test_a_gradient_that_is_not_finite_changes_nothing():
    """From the first step on: neither weights, nor momentum, nor moments, nor counts."""
    (module, optimizer), (other, bad) = trained(()), trained((0, 2))
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        states = optimizer.state[one], bad.state[two]
        assert states[0].keys() == states[1].keys() and states[0]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_planned_memory_has_one_moment_per_matrix():
    kept = {}
    for name in ("adamw", "muon"):
        module = tiny_denoiser()
        noise = torch.randn(2, 32, 8, 8)
        arguments = noise, noise, torch.rand(2), blank_condition(module.unet, 2)
        kept[name] = time_step(module, DenoiserConfig(optimizer=name), arguments, nullcontext)[1]
    matrices = inner_matrices(module)
    # A second moment, and a count of steps.
    assert kept["adamw"] - kept["muon"] == sum(4 * (matrix.numel() + 1) for matrix in matrices)


def test_a_run_that_is_killed_continues_to_the_bit(tiny_run, tmp_path):
    struck, report = {("denoiser/checkpoint-8", "done", 0)}, tmp_path / "struck.json"
    straight, killed = (shutil.copytree(tiny_run, tmp_path / name / "run") for name in ("straight", "killed"))
    options = ("--redo=[denoiser]", "--denoiser.optimizer=muon", "--evaluation.num_samples=0")
    launch("train_ldm.py", "--output_dir", straight, *options)
    strike = partial(strike_in_writes, kill_and_tear, struck.__contains__, set(), report)
    child = start("train_ldm.py", "--output_dir", killed, *options, prepare=strike)
    assert child.wait() == -signal.SIGKILL and report.exists()
    launch("train_ldm.py", "--output_dir", killed, *options)
    assert differences(straight, killed) == []
    moments = load_file(straight / "denoiser" / "checkpoint-12" / "optimizer.safetensors")
    assert any(name.endswith(".momentum") for name in moments) and any(".exp_avg" in name for name in moments)


def test_fsdp_is_refused_before_the_first_step(tmp_path):
    env = environment() | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    options = ("--output_dir", tmp_path / "run", "--denoiser.optimizer=muon")
    refused = launch("train_denoiser.py", *options, env=env, check=False)
    assert refused.returncode == 2 and "--denoiser.optimizer muon" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "run").exists()
