"""Cross-entropy by slices of the vocabulary: the losses and gradients of the whole, and never all logits."""

import pytest
import torch
import torch.nn.functional as F

from emu3_vla import cross_entropy
from emu3_vla.cross_entropy import sliced_cross_entropy


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(cross_entropy, "SLICE_LOGITS", 70)
    monkeypatch.setattr(cross_entropy, "SMALLEST_SLICE", 3)


def _inputs(dtype=torch.float64):
    torch.manual_seed(0)
    states, weight = torch.randn(9, 5, dtype=dtype), torch.randn(31, 5, dtype=dtype)
    return states.requires_grad_(), weight.requires_grad_(), torch.randint(0, 31, (9,))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_and_gradients_are_those_of_all_logits(smoothing):
    states, weight, targets = _inputs()
    each = torch.linspace(-1, 2, 9)
    logits = states @ weight.T
    whole = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    expected = torch.autograd.grad((whole * each).sum(), (states, weight))
    losses, right = sliced_cross_entropy(states, weight, targets, smoothing)
    found = torch.autograd.grad((losses * each).sum(), (states, weight))
    torch.testing.assert_close(losses, whole.float(), atol=1e-6, rtol=1e-6)
    assert torch.equal(right, logits.argmax(1) == targets)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_head_that_does_not_learn_gets_no_gradient():
    states, weight, targets = _inputs(torch.float32)
    losses, _ = sliced_cross_entropy(states, weight.detach(), targets)
    losses.sum().backward()
    assert states.grad is not None and weight.grad is None


def test_no_tensor_holds_all_logits():
    """Every tensor that the operation makes is smaller than positions × ids."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.seen = max(self.seen, out.numel())
            return out

    states, weight, targets = _inputs(torch.float32)
    with Largest() as largest:
        losses, _ = sliced_cross_entropy(states, weight, targets)
        losses.sum().backward()
    assert largest.seen <= weight.numel() < len(states) * len(weight)
    with Largest() as largest:
        F.cross_entropy(states @ weight.T, targets).backward()
    assert largest.seen >= len(states) * len(weight), "the test would see them"


@pytest.mark.parametrize("wrong", [31, -1])
def test_a_target_outside_the_vocabulary_is_named(wrong):
    states, weight, targets = _inputs()
    targets[4] = wrong
    with pytest.raises(ValueError, match=rf"target 4 of 9 is id {wrong}, expected one in \[0, 31\)"):
        sliced_cross_entropy(states, weight, targets)
