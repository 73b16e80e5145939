"""Products by oneDNN against torch's own: shapes, layouts, types, and who must never get there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zsplg_ray.label import products
from zsplg_ray.label.products import has_onednn, linear, matmul

ERRORS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.03}
ACTS = [None, nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU()]
SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (64, 112, 128),
    (3, 2, 8, 16),
    (2, 3, 4, 33, 5),
    (0, 4, 3),
    (6, 0, 3),
]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(*rows_inner_out, dtype=torch.float32):
    """x [..., K], weight [N, K], bias [N]."""
    *rows, inner, out = rows_inner_out
    x, weight = random(*rows, inner, dtype=dtype), random(out, inner, dtype=dtype, seed=1)
    return x, weight, random(out, dtype=dtype, seed=2)


def assert_near(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = ERRORS[expected.dtype]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, atol=error * max(1.0, scale), rtol=error)


@pytest.fixture(params=["as it is", "without oneDNN"])
def way(request, monkeypatch):
    if request.param == "without oneDNN":
        monkeypatch.setattr(products, "has_onednn", lambda device, dtype: False)
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)


@pytest.fixture
def torch_alone(monkeypatch):
    """Fails whatever asks for oneDNN."""

    def refuse(*args):
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse, raising=False)


@pytest.fixture
def fresh():
    """Tries oneDNN again, and once more for the tests to come."""
    has_onednn.cache_clear()
    yield
    has_onednn.cache_clear()


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_equals_torch(way, shape, dtype):
    x, weight, bias = operands(*shape, dtype=dtype)
    assert_near(linear(x, weight, bias), F.linear(x, weight, bias))
    assert_near(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_activations(way, act, with_bias):
    x, weight, bias = operands(40, 24, 56)
    bias = bias if with_bias else None
    expected = F.linear(x, weight, bias)
    assert_near(linear(x, weight, bias, act=act), act(expected) if act else expected)


def test_gelu_is_as_exact_as_torch():
    x = torch.linspace(-8, 8, 6400).view(-1, 64)
    truth = F.gelu(x.double())
    error, allowed = (
        (y - truth).abs().max() for y in (linear(x, torch.eye(64), act=nn.GELU()), F.gelu(x))
    )
    assert error <= max(1e-6, 1.1 * float(allowed))
    assert error < 2e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_summand(way, shape):
    x, weight, bias = operands(*shape)
    expected = F.linear(x, weight, bias)
    add = random(*expected.shape, seed=3)
    before = add.clone()
    assert_near(linear(x, weight, bias, add=add), expected + add)
    assert_near(linear(x, weight, add=add.mT.contiguous().mT), F.linear(x, weight) + add)
    assert torch.equal(add, before)


def test_activation_and_summand_together_are_refused():
    x, weight, bias = operands(4, 4, 4)
    with pytest.raises(AssertionError, match="either"):
        linear(x, weight, bias, act=nn.GELU(), add=x)


LAYOUTS = {
    "whole": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "columns apart": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "rows apart": lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
    "part of the rows": lambda t: torch.cat([t + 1, t], -2)[..., t.shape[-2] :, :],
    "same row everywhere": lambda t: t[..., :1, :].expand(t.shape),
    "same column everywhere": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(9, 12, 10), (2, 9, 12, 10), (1, 12, 1), (9, 1, 10)], ids=str)
def test_any_layout(way, x_layout, weight_layout, shape):
    x, weight, bias = operands(*shape)
    x, weight = LAYOUTS[x_layout](x), LAYOUTS[weight_layout](weight)
    before = x.clone(), weight.clone()
    bias = torch.stack([bias, bias + 1], -1)[..., 0]
    assert_near(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("pairs", [0, 1, 3])
@pytest.mark.parametrize("inner", [0, 1, 20])
@pytest.mark.parametrize("with_bias", [True, False])
def test_matmul_equals_torch(way, pairs, inner, with_bias):
    left, right, bias = random(pairs, 6, inner), random(pairs, inner, 8, seed=1), random(8, seed=2)
    expected = left @ right + (bias if with_bias else 0)
    for change in LAYOUTS.values() if inner else [LAYOUTS["whole"]]:
        expected = change(left) @ right + (bias if with_bias else 0)
        assert_near(matmul(change(left), right, bias if with_bias else None), expected)
    assert_near(matmul(left, right.mT.contiguous().mT), left @ right)


def test_inference_mode_and_parameters():
    layer = nn.Linear(12, 10)
    x, _, _ = operands(9, 12, 10)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_near(linear(x, layer.weight, layer.bias), layer(x))
            assert_near(matmul(x[None], layer.weight.T[None], layer.bias)[0], layer(x))


def test_tried_for_the_first_time_in_inference_mode(fresh):
    x, weight, bias = operands(9, 12, 10)
    expected = F.linear(x, weight, bias)
    with torch.inference_mode():
        assert_near(linear(x, weight, bias), expected)
    assert_near(linear(x, weight, bias), expected)


def test_results_are_their_own_in_memory(way):
    x, weight, bias = operands(9, 12, 10)
    first, second = linear(x, weight, bias), linear(x, weight, bias)
    first.zero_()
    assert_near(second, F.linear(x, weight, bias))


@pytest.mark.parametrize("device", ["cuda", "meta", "mps", "xpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_other_device_has_it(fresh, torch_alone, device, dtype):
    assert not has_onednn(device, dtype)


def test_meta_tensors_take_the_way_of_torch(fresh, torch_alone):
    x, weight, bias = (t.to("meta") for t in operands(9, 12, 10))
    for act in ACTS:
        assert linear(x, weight, bias, act=act).shape == (9, 10)
    assert linear(x, weight, add=x.new_empty(9, 10)).device.type == "meta"
    assert matmul(x[None], weight.mT[None], bias).shape == (1, 9, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_take_the_way_of_torch(fresh, torch_alone):
    x, weight, bias = (t.cuda() for t in operands(9, 12, 10))
    assert_near(linear(x, weight, bias, act=nn.GELU()), F.gelu(F.linear(x, weight, bias)))
    assert_near(matmul(x[None], weight.mT[None], bias), F.linear(x, weight, bias)[None])


def test_cpu_tensors_do_reach_it(monkeypatch, torch_alone):
    monkeypatch.setattr(products, "has_onednn", lambda device, dtype: device == "cpu")
    x, weight, bias = operands(9, 12, 10)
    for multiply in (lambda: linear(x, weight, bias), lambda: matmul(x[None], weight.mT[None])):
        with pytest.raises(AssertionError, match="oneDNN was asked"):
            multiply()


class WrongProduct:
    """oneDNN's operator, but for one number."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def __call__(self, x, weight, bias, attr, scalars, algorithm):
        return F.gelu(F.linear(x, weight, bias)) + 1e-3 * (self.wrong == "gelu")

    def binary(self, x, add, weight, bias, attr):
        return F.linear(x, weight, bias) + add + 1e-3 * (self.wrong == "add")


@pytest.mark.parametrize("wrong", ["gelu", "add", "nothing"])
def test_wrong_numbers_are_refused(fresh, monkeypatch, wrong):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", WrongProduct(wrong), raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert has_onednn("cpu", torch.float32) == (wrong == "nothing")


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
def test_a_missing_or_failing_operator_is_done_without(fresh, monkeypatch, error):
    def fail(*args):
        raise error("not in this build")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fail, raising=False)
    x, weight, bias = operands(9, 12, 10)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not has_onednn("cpu", torch.float32)


def test_tried_once_a_dtype(fresh, monkeypatch):
    tries = []
    available = torch.backends.mkldnn.is_available
    monkeypatch.setattr(
        torch.backends.mkldnn, "is_available", lambda: tries.append(1) or available()
    )
    for _ in range(3):
        linear(*operands(9, 12, 10))
        linear(*operands(9, 12, 10, dtype=torch.bfloat16))
    assert len(tries) == 2
