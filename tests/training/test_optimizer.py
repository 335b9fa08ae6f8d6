"""Flat AdamW does what torch's does parameter by parameter."""

import copy

import pytest
import torch
from torch import nn

from emu3_vla.training.optimizer import FlatAdamW, OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, gradient_clip=0.5, ema_decay=0.0, beta1=0.9, beta2=0.99)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.RMSNorm(3))


def _loss(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(5)).float().pow(3).sum() * 10


def test_steps_as_torch_adamw_does():
    model, reference = _model(), _model()
    flat = FlatAdamW(model, CONFIG, torch.float32)
    decayed = [reference[1].weight]
    others = [parameter for parameter in reference.parameters() if parameter is not reference[1].weight]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.99)
    )
    for step in range(5):
        flat.zero_gradient()
        _loss(model).backward()
        norm = flat.step(step, 0.01)
        adamw.zero_grad()
        _loss(reference).backward()
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item(), rel=1e-4)
        adamw.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_low_precision_steps_do_not_vanish():
    """Steps far below bfloat16's resolution add up in the float32 master weights."""
    model = _model()
    flat = FlatAdamW(model, CONFIG, torch.bfloat16)
    before = flat.master.clone()
    for step in range(10):
        flat.zero_gradient()
        _loss(model).backward()
        flat.step(step, 1e-6)
    assert model[1].weight.dtype == torch.bfloat16
    assert (flat.master - before).abs().max() > 5e-6


def test_average_follows_and_can_be_borrowed():
    model = _model()
    flat = FlatAdamW(model, OptimizerConfig(ema_decay=0.9), torch.float32)
    average = flat.master.clone()
    for step in range(20):
        flat.zero_gradient()
        _loss(model).backward()
        flat.step(step, 0.01)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * flat.master
    torch.testing.assert_close(flat.average, average)
    current = copy.deepcopy(model.state_dict())
    with flat.averaged():
        assert not torch.equal(model[1].weight, current["1.weight"])
        torch.testing.assert_close(model[1].weight, flat.averaged_state()["1.weight"])
    assert all(torch.equal(value, current[name]) for name, value in model.state_dict().items())


def test_nan_changes_nothing():
    model = _model()
    flat = FlatAdamW(model, CONFIG, torch.float32)
    before = flat.master.clone()
    flat.zero_gradient()
    (_loss(model) * torch.nan).backward()
    assert not torch.isfinite(torch.tensor(flat.step(0, 0.01)))
    assert torch.equal(flat.master, before)


def test_muon_moves_matrices_of_layers_by_orthogonal_steps_and_leaves_heads_to_adamw():
    config = OptimizerConfig(learning_rate=0.01, muon_learning_rate=0.1, weight_decay=0.0, gradient_clip=100.0, ema_decay=0.0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "layer": nn.Linear(8, 8, bias=False), "head": nn.Linear(8, 3, bias=False)})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flat = FlatAdamW(model, config, torch.float32)
    flat.zero_gradient()
    model["head"](model["layer"](model["embed"](torch.arange(5)))).pow(3).sum().backward()
    flat.step(0, 0.005)  # half of the highest rate
    moved = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    turned = torch.linalg.svdvals(moved["layer.weight"]) / 0.05
    rank = 3  # of what the head lets through
    assert (turned[:rank] > 0.6).all() and (turned[:rank] < 1.3).all()
    assert moved["head.weight"].abs().max() <= 0.005 * 1.001, "AdamW's first step is the rate itself"


def test_muon_goes_on_from_its_state():
    config = OptimizerConfig(learning_rate=0.01, muon_learning_rate=0.02, gradient_clip=0.5)
    unbroken, model = _model(), _model()
    whole, flat = FlatAdamW(unbroken, config, torch.float32), FlatAdamW(model, config, torch.float32)
    for step in range(6):
        if step == 3:  # the same weights and state in a new optimiser
            model = _model()
            state = flat.state()
            flat = FlatAdamW(model, config, torch.float32)
            flat.load_state({name: tensor.clone() for name, tensor in state.items()})
        for optimizer, of in ((whole, unbroken), (flat, model)):
            optimizer.zero_gradient()
            _loss(of).backward()
            optimizer.step(step, 0.01)
    assert torch.equal(whole.master, flat.master)
