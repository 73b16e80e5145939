"""Lean convolutions: the numbers of torch's own, for any size, kernel and setting."""

import pytest
import torch
from torch import Tensor, nn

from zsplg_ray.config import StudentConfig
from zsplg_ray.student.convolutions import LeanConv2d, make_lean
from zsplg_ray.student.model import DeepLabV3Plus

SETTINGS = [
    {"kernel_size": 3, "padding": 6, "dilation": 6},
    {"kernel_size": 3, "padding": 18, "dilation": 18},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
    {"kernel_size": 3, "padding": 2},  # more padding than centred: nothing may be left out
    {"kernel_size": (5, 3), "padding": (4, 1), "dilation": (2, 1)},
    {"kernel_size": 2, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 4, "dilation": 4, "groups": 2},
]


def outcome(conv: nn.Module, x: Tensor) -> list[Tensor]:
    """What comes out, and the gradients."""
    x = x.clone().requires_grad_()
    y = conv(x)
    weights = list(conv.parameters())
    return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), [x, *weights])]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 4), (7, 6), (13, 19)])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_output_and_gradients(setting: dict, size: tuple[int, int], threads: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **setting).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        expected = outcome(conv, x)
        make_lean(conv)
        assert type(conv) is LeanConv2d
        lean = outcome(conv, x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(lean, expected, rtol=1e-12, atol=1e-12)


def test_taps_that_meet_only_padding_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(2, 2, 3, padding=6, dilation=6)
    make_lean(conv)
    taps = []
    plain = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda x, w, *rest: taps.append(w.shape) or plain(x, w, *rest),
    )
    for size in [(6, 6), (6, 7), (7, 7)]:
        conv(torch.zeros(1, 2, *size))
    assert [tuple(shape[2:]) for shape in taps] == [(1, 1), (1, 3), (3, 3)]


def test_a_model_keeps_its_names_and_its_answers() -> None:
    model = DeepLabV3Plus(StudentConfig(backbone="test_byobnet", pretrained=False), 3).eval()
    image = torch.randn(2, 3, 65, 65)
    names, weights = list(model.state_dict()), {id(p) for p in model.parameters()}
    with torch.no_grad():
        expected = model(image)[0]
        make_lean(model)
        answer = model(image)[0]
    assert list(model.state_dict()) == names
    assert {id(p) for p in model.parameters()} == weights
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


def test_other_convolutions_are_left_alone() -> None:
    class Other(nn.Conv2d):
        pass

    model = nn.Sequential(
        Other(1, 1, 1),
        nn.Conv2d(1, 1, 3, padding="same"),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
    )
    kinds = [type(module) for module in model]
    make_lean(model)
    assert [type(module) for module in model] == kinds
