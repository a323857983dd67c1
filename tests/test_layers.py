"""conv2d, linear and convert: PyTorch's layers, but for the order in which a weight gradient's samples are added."""

import contextlib
import copy
import itertools
import shutil

import numpy as np
import ordered_reduce
import pytest
import reference
import torch
from conftest import GPU
from torch import nn
from torch.nn import functional as F

ORDERS = ["fixed", "shuffled", "atomic", "exact", "arrival", "native"]


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular", bias=False),
        nn.Conv2d(8, 16, 2, stride=2, groups=4, dilation=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [16, 13, 3, 1])
def test_converted_model_computes_the_same(device, order, batch):
    torch.manual_seed(0)
    model = network().double().to(device)
    converted = copy.deepcopy(model)
    policy = ordered_reduce.convert(converted, order=order)
    assert policy.layers == ["0", "2", "3", "7"]
    assert list(converted.state_dict()) == list(model.state_dict())
    x = torch.randn(batch, 3, 9, 9, dtype=torch.float64, device=device)
    assert torch.equal(model(x), converted(x))
    expected, got = gradients(model, x), gradients(converted, x)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_same_padding_has_pytorchs_bits(device):
    """Also where a convolution of padded images would have others."""
    torch.manual_seed(0)
    for kernel, dilation in (((7, 7), 2), ((3, 3), 1), ((4, 3), 1), ((2, 5), (2, 1)), ((2, 2), 1)):
        x, weight = torch.randn(4, 17, 4, 2, device=device), torch.randn(3, 17, *kernel, device=device)
        expected = F.conv2d(x, weight, padding="same", dilation=dilation)
        assert torch.equal(ordered_reduce.conv2d(x, weight, padding="same", dilation=dilation), expected), (kernel, dilation)


@pytest.mark.parametrize("case", [
    dict(shape=(3, 2, 4, 4), weight=(2, 2, 3, 3), stride=2, padding=1), dict(shape=(3, 4, 3, 2), weight=(2, 2, 3, 1), groups=2),
    dict(shape=(4, 1, 5, 4), weight=(2, 1, 3, 2), dilation=(2, 1), padding=(0, 2)),
    dict(shape=(3, 2, 4, 5), weight=(2, 2, 2, 3), padding="same", dilation=(1, 2)),
    dict(shape=(3, 2, 4, 5), weight=(2, 2, 2, 3), padding="valid", stride=2), dict(shape=(2, 3, 3), weight=(3, 2, 1, 1)),
], ids=str)
def test_conv2d_gradients(device, case):
    case = dict(case)
    x = torch.randn(case.pop("shape"), dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(case.pop("weight"), dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(len(weight), dtype=torch.float64, device=device, requires_grad=True)

    def f(*tensors):
        return ordered_reduce.conv2d(*tensors, **case, order="shuffled", splits=3)

    assert torch.equal(f(x, weight, bias), F.conv2d(x, weight, bias, **case))
    assert torch.autograd.gradcheck(f, (x, weight, bias)) and torch.autograd.gradgradcheck(f, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 4), (4,)])
def test_linear_gradients(device, shape):
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)

    def f(*tensors):
        return ordered_reduce.linear(*tensors, order="shuffled", splits=3)

    assert torch.equal(f(x, weight, bias), F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(f, (x, weight, bias)) and torch.autograd.gradgradcheck(f, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("order", ["fixed", "shuffled"])
@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_the_order_of_a_weight_gradient_is_the_definitions(device, layer, order):
    """With a sample in each group, and one product of two short numbers in each partial gradient, which no kernel has
    to round, the bits are those of the ordered sum of these products."""
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(shape).bfloat16().float() for shape in ((12, 7), (5, 7), (12, 5)))
    terms = (grad[:, :, None] * x[:, None]).flatten(1)
    f, shape = (ordered_reduce.linear, ()) if layer == "linear" else (ordered_reduce.conv2d, (1, 1))
    x, weight, grad = (t.view(*t.shape, *shape).to(device) for t in (x, weight, grad))
    out = f(x, weight.requires_grad_(), order=order, splits=12, seed=1, step=2, op=3)
    got, = torch.autograd.grad(out, weight, grad)
    expected = reference.ordered_sum(terms, 12, order, seed=1, step=2, op=3)
    assert torch.equal(got.cpu().flatten(), expected)
    assert not torch.equal(expected, reference.ordered_sum(terms, 12, "shuffled", seed=9, step=2, op=3))


def weight_gradient(x, weight, grad, **arguments):
    return torch.autograd.grad(ordered_reduce.linear(x, weight, **arguments), weight, grad)[0]


@pytest.mark.parametrize("order", ["fixed", "shuffled", "exact"])
def test_a_large_linear_layer_row_by_row(order):
    """Its partial gradients are never there together. As above; 1201 inputs and 37 outputs fill no block."""
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(shape).bfloat16().float() for shape in ((12, 1201), (37, 1201), (12, 37)))
    terms = (grad[:, :, None] * x[:, None]).flatten(1)
    assert terms.numel() * 4 > ordered_reduce.layers.BLOCK
    arguments = dict(splits=12, order=order, seed=1, step=2, op=3)
    got = weight_gradient(x, weight.requires_grad_(), grad, **arguments)
    assert torch.equal(got.flatten(), ordered_reduce.sum(terms, 0, **arguments))
    assert order == "fixed" or not torch.equal(got.flatten(), ordered_reduce.sum(terms, 0, splits=12))
    # The same as a convolution to one pixel.
    x, grad, weight = x[:, :1200].view(12, 75, 4, 4), grad[:, :, None, None], torch.randn(37, 75, 4, 4, requires_grad=True)
    got, = torch.autograd.grad(ordered_reduce.conv2d(x, weight, **arguments), weight, grad)
    terms = (grad[..., None] * x[:, None]).flatten(1)
    assert terms.numel() * 4 > ordered_reduce.layers.BLOCK
    assert torch.equal(got.flatten(), ordered_reduce.sum(terms, 0, **arguments))


@pytest.mark.parametrize("shape, out", [((64, 512), 1000), ((13, 3, 700), 210), ((5, 4096), 48)])
def test_a_large_linear_layer_is_like_a_small_one(shape, out):
    """Equal channels stay equal, threads do not matter, and all dtypes are PyTorch's."""
    torch.manual_seed(0)
    weight, found, threads = torch.randn(out, shape[-1], requires_grad=True), [], torch.get_num_threads()
    x, grad = torch.randn(*shape[:-1], 1).expand(shape), torch.randn(*shape[:-1], 1).expand(*shape[:-1], out)
    assert weight.numel() * 4 * min(8, len(x)) > ordered_reduce.layers.BLOCK
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(weight_gradient(x, weight, grad))
            found.append(weight_gradient(x, weight, grad, order="shuffled", scope="tensor"))
    finally:
        torch.set_num_threads(threads)
    for number in (0, 1):
        assert torch.equal(found[number], found[number + 2])
        assert torch.equal(found[number], found[number][:1, :1].expand_as(weight))
    x, grad = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], out, dtype=torch.float64)
    expected = torch.einsum("ni,no->oi", x.flatten(0, -2), grad.flatten(0, -2))
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 5e-3)):
        leaf = weight.detach().to(dtype).requires_grad_()
        got = weight_gradient(x.to(dtype), leaf, grad.to(dtype), order="shuffled")
        assert got.dtype == dtype and (got - expected).abs().max() < error * expected.abs().max()


@pytest.mark.parametrize("options", [dict(padding=1), dict(padding=2, stride=2, dilation=2)])
def test_a_convolution_of_many_weights_to_few_pixels(options):
    torch.manual_seed(0)
    x, weight = torch.randn(16, 130, 2, 2, requires_grad=True), torch.randn(144, 130, 3, 3, requires_grad=True)
    assert weight.numel() * 4 * 8 > ordered_reduce.layers.BLOCK
    grads = [torch.autograd.grad(f(x, weight, **options).square().sum(), (x, weight)) for f in (F.conv2d, ordered_reduce.conv2d)]
    for expected, got in zip(*grads, strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    frozen = torch.autograd.grad(ordered_reduce.conv2d(x.detach(), weight, **options).square().sum(), weight)[0]
    assert torch.equal(frozen, grads[1][1])
    equal = torch.randn(16, 1, 2, 2).expand(-1, 130, -1, -1).contiguous()
    weight = torch.full((144, 130, 3, 3), 0.1, requires_grad=True)
    got, = torch.autograd.grad(ordered_reduce.conv2d(equal, weight, **options).square().sum(), weight)
    assert torch.equal(got, got[:1, :1].expand_as(got))


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_equal_channels_stay_equal_unless_every_weight_has_its_own_order(device, layer):
    """The heart of the matter. 16 equal channels in, 16 equal channels out: their gradients agree bit for bit."""
    torch.manual_seed(0)
    if layer == "conv":
        x, weight = torch.randn(16, 1, 6, 6).expand(-1, 16, -1, -1), torch.full((16, 16, 3, 3), 0.1)
        seed = torch.randn(16, 1, 4, 4).expand(-1, 16, -1, -1)
    else:
        x, weight, seed = torch.randn(16, 1).expand(-1, 16), torch.full((16, 16), 0.1), torch.randn(16, 1).expand(-1, 16)
    x, seed, weight = x.contiguous().to(device), seed.contiguous().to(device), weight.to(device).requires_grad_()
    f = getattr(ordered_reduce, "conv2d" if layer == "conv" else "linear")

    def symmetric(**arguments):
        g, = torch.autograd.grad(f(x, weight, **arguments), weight, seed)
        return torch.equal(g, g[:1].expand_as(g)) and torch.equal(g, g[:, :1].expand_as(g))

    assert symmetric(order="fixed") and symmetric(order="shuffled", scope="tensor")
    assert symmetric(order="shuffled", splits=2)
    assert not symmetric(order="shuffled")


@pytest.mark.parametrize("samples, size", [(64, 2), (64, 4), (64, 7), (64, 28), (4, 9), (4, 17), (12, 21)])   # 4: alone in a group
@pytest.mark.parametrize("channels", [(1, 16), (3, 13), (13, 50), (16, 16), (27, 32), (64, 64)], ids=str)
def test_equal_channels_stay_equal_at_any_number_and_with_any_threads(device, channels, samples, size):
    torch.manual_seed(0)
    x, seed = (torch.randn(samples, 1, size, size, device=device).expand(-1, n, -1, -1).contiguous() for n in channels)
    weight, found, threads = torch.full((*channels[::-1], 3, 3), 0.1, device=device), [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            leaf = weight.clone().requires_grad_()
            found += torch.autograd.grad(ordered_reduce.conv2d(x, leaf, padding=1), leaf, seed)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found) and torch.equal(found[0], found[0][:1, :1].expand_as(found[0]))


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [(1, 16), (3, 13), (16, 16), (16, 160), (32, 32), (27, 50), (64, 64), (160, 160)], ids=str)
@pytest.mark.parametrize("kernel, stride, size", [(3, 1, 32), (3, 2, 16), (1, 2, 8), (5, 1, 7)])
def test_equal_channels_stay_equal_on_cuda(monkeypatch, channels, kernel, stride, size):
    """In both memory formats, of float32 as it is and rounded to tf32, of float64 and half types; and all this repeats."""
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False),
                        (torch.float64, False)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
        for formats in itertools.combinations_with_replacement((torch.channels_last, torch.contiguous_format), 2):
            torch.manual_seed(0)
            x = torch.randn(64, 1, size, size, dtype=dtype).expand(-1, channels[0], -1, -1).cuda()
            seed = torch.randn(64, 1, -(-size // stride), -(-size // stride), dtype=dtype).expand(-1, channels[1], -1, -1).cuda()
            x, seed = (t.contiguous(memory_format=formats[0]) for t in (x, seed))
            leaf = torch.full((*channels[::-1], kernel, kernel), 0.1, dtype=dtype, device="cuda")
            leaf = leaf.contiguous(memory_format=formats[1]).requires_grad_()   # the gradient may be written in its format
            found = [torch.autograd.grad(ordered_reduce.conv2d(x, leaf, padding=kernel // 2, stride=stride), leaf, seed)[0]
                     for _ in range(2)]
            assert torch.equal(*found), (dtype, tf32, formats)
            # cuDNN's partial gradients are channels-last where x is: not in float64, nor where channels are filled up.
            if dtype != torch.float64 and kernel > 1 and channels[0] % 16 == channels[1] % 16 == 0:
                assert formats[0] != formats[1] or found[0].is_contiguous(memory_format=formats[1]), (dtype, tf32, formats)
            assert torch.equal(found[0], found[0][:1, :1].expand_as(leaf)), (dtype, tf32, formats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels,kernel,stride,padding,dilation,channel_groups", [
    ((4, 6), (3, 3), 2, 1, 1, 1), ((16, 32), (3, 3), 2, 1, 1, 1), ((4, 6), (3, 2), 2, (1, 0), (1, 2), 1),
    ((3, 6), (2, 5), 2, (0, 2), 1, 1), ((5, 6), (1, 1), 1, 0, 1, 1), ((5, 16), (1, 1), 2, 1, 1, 1),   # matrix products, then convolutions
    ((4, 6), (3, 3), 1, 1, 1, 1), ((4, 6), (2, 3), 1, (0, 2), 2, 2), ((6, 6), (3, 3), 1, 1, 1, 6)], ids=str)
def test_weight_partials_of_the_cpu(dtype, channels, kernel, stride, padding, dilation, channel_groups):
    """The operator's gradients are the library's, group by group, whatever the strides of the tensors."""
    torch.manual_seed(0)
    pair = [[n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
    x, weight = torch.randn(10, channels[0], 9, 8, dtype=dtype), torch.randn(channels[1], channels[0] // channel_groups, *kernel, dtype=dtype)
    grad = torch.randn_like(F.conv2d(x, weight, None, *pair, channel_groups))
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (grad, x)]
    product = stride == 2 or kernel == (1, 1)
    rounds = dtype == torch.float16 or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    wide = dtype if rounds and not product else torch.float64   # that convolution rounds on its way
    for arguments in ((grad, x, weight, *pair, channel_groups, 4), (*strided, weight, *pair, channel_groups, 4)):
        partials = torch.ops.ordered_reduce.conv2d_weight_partials(*arguments)
        torch.library.opcheck(torch.ops.ordered_reduce.conv2d_weight_partials.default, arguments)
        for partial, some, their in zip(partials, x.tensor_split(4), grad.tensor_split(4), strict=True):
            leaf = weight.to(wide).requires_grad_()
            expected, = torch.autograd.grad(F.conv2d(some.to(wide), leaf, None, *pair, channel_groups), leaf, their.to(wide))
            torch.testing.assert_close(partial, expected.to(dtype))
    assert len(torch.ops.ordered_reduce.conv2d_weight_partials(*arguments[:-1], 11)) == 10
    for wrong in ((grad, x[..., 4:]), (grad[:, 1:], x), (grad, x[1:])):
        with pytest.raises(RuntimeError, match="conv2d_weight_partials"):
            torch.ops.ordered_reduce.conv2d_weight_partials(*wrong, weight, *pair, channel_groups, 4)


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("order", ["fixed", "shuffled", "exact"])
def test_a_gradient_with_a_graph_has_the_same_bits(device, size, order):
    """Without one, the CPU computes both gradients in one operator."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 4, size, size, device=device), torch.randn(6, 2, 3, 3, device=device, requires_grad=True)
    for wanted in ((weight,), (weight, x.requires_grad_())):
        plain, graph = (torch.autograd.grad(
            ordered_reduce.conv2d(x, weight, None, 2, (1, 2), groups=2, order=order, seed=3, step=2, op=1).square().sum(),
            wanted, create_graph=create) for create in (False, True))
        assert all(map(torch.equal, plain, graph))


def test_backward_of_the_cpu():
    x, weight, grad = torch.randn(4, 3, 5, 5), torch.randn(2, 3, 3, 3), torch.randn(4, 2, 3, 3)
    for of_x in (True, False):
        for order in ((8,), (8, 1, True, 5, torch.tensor(3), 2)):
            arguments = (grad, x, weight, [1, 1, 0, 0, 1, 1, 1], of_x, *order)
            torch.library.opcheck(torch.ops.ordered_reduce.conv2d_backward.default, arguments)
    with pytest.raises(RuntimeError, match="conv2d_backward"):
        torch.ops.ordered_reduce.conv2d_backward(grad, x, weight, [1, 1], True, 8)
    grad, x = torch.randn(4, 2, 5), torch.randn(4, 2, 7)
    torch.library.opcheck(torch.ops.ordered_reduce.linear_weight.default, (grad, x, 3, 1, True, 5, torch.tensor(3), 2))
    with pytest.raises(RuntimeError, match="linear_weight"):
        torch.ops.ordered_reduce.linear_weight(grad, x[:3], 8)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("order", ["fixed", "shuffled", "exact"])
def test_second_derivatives_of_batched_gradients(device, order):
    """Where autograd runs several backward passes at once, no tensor says that it wants a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double().to(device)
    converted, x, found = copy.deepcopy(model), torch.randn(5, 2, 3, 3, dtype=torch.float64, device=device), []
    ordered_reduce.convert(converted, order)
    for m in (model, converted):
        first = torch.autograd.grad(m(x).sum(0), list(m.parameters()), torch.eye(2, dtype=torch.float64, device=device),
                                    is_grads_batched=True, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, [m[0].weight, m[0].bias, m[3].weight]))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_arms_share_their_partial_sums(device):
    """With integers, whose sums are exact in any order, all orders agree: nothing but the order differs."""
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (16, 3, 6, 6), device=device).float()
    weight = torch.randint(-3, 4, (8, 3, 3, 3), device=device).float().requires_grad_()
    results = [torch.autograd.grad(ordered_reduce.conv2d(x, weight, order=order).sum(), weight)[0] for order in ORDERS]
    assert all(torch.equal(result, results[0]) for result in results)


def test_policy_places_the_noise(device):
    torch.manual_seed(0)
    model = network().to(device)
    x = torch.randn(16, 3, 9, 9, device=device)
    ordered_reduce.convert(model)
    quiet = gradients(model, x)
    policy = ordered_reduce.convert(model, order="shuffled", layers=["2", "7"], steps=(1, 3))
    assert policy.layers == ["2", "7"]
    seen = []
    for step in range(4):
        got = gradients(model, x)
        differ = {name for name in got if not torch.equal(got[name], quiet[name])}
        assert differ == ({"2.weight", "7.weight"} if 1 <= step < 3 else set()), step
        seen.append(got["2.weight"])
        policy.step()
    assert not torch.equal(seen[1], seen[2])                # another step, another draw
    policy.load_state_dict({"step": 1})
    assert torch.equal(gradients(model, x)["2.weight"], seen[1])   # and the same step the same


def test_choosing_layers_does_not_change_their_draws(device):
    x = torch.randn(16, 3, 9, 9, device=device)
    torch.manual_seed(0)
    everywhere, alone = network().to(device), network().to(device)
    alone.load_state_dict(everywhere.state_dict())
    ordered_reduce.convert(everywhere, order="shuffled")
    ordered_reduce.convert(alone, order="shuffled", layers="7")
    assert torch.equal(gradients(everywhere, x)["7.weight"], gradients(alone, x)["7.weight"])


def test_compiles_once_for_all_steps(device):
    torch.manual_seed(0)
    model = network().to(device)
    policy = ordered_reduce.convert(model, order="shuffled")
    x = torch.randn(16, 3, 9, 9, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        expected = gradients(model, x)
        model.zero_grad()
        compiled(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])
        policy.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("noise", [None, "gaussian"])
def test_compiled_for_any_batch(device, noise):
    """Channels are filled up to 16, and groups of one sample are products over one term: see _opaque_products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 10), nn.Linear(10, 7)).to(device)
    ordered_reduce.convert(model, order="shuffled", noise=noise, ulps=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (5, 64, 8, 13):
        x = torch.randn(batch, 32, device=device)
        expected = gradients(model, x)
        model.zero_grad()
        compiled(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    torch.manual_seed(0)
    model = network().to(device)
    converted = copy.deepcopy(model)
    ordered_reduce.convert(converted, order="shuffled")
    x = torch.randn(16, 3, 9, 9, device=device)
    for m in (model, converted):
        with torch.autocast(device, dtype):
            out = m(x)
        assert out.dtype == dtype
        m.zero_grad()
        out.float().square().sum().backward()
    for parameter, other in zip(model.parameters(), converted.parameters(), strict=True):
        assert other.grad.dtype == torch.float32
        torch.testing.assert_close(other.grad, parameter.grad, rtol=0.05, atol=0.05 * float(parameter.grad.abs().max()))


def test_empty_batch_and_frozen_weights(device):
    model = network().to(device)
    ordered_reduce.convert(model)
    model[0].weight.requires_grad_(False)
    for batch in (0, 4):
        x = torch.randn(batch, 3, 9, 9, device=device, requires_grad=True)
        model.zero_grad()
        model(x).sum().backward()
        assert model[0].weight.grad is None and model[2].weight.grad is not None and x.grad.shape == x.shape


def test_subclasses_are_left_alone_and_copies_are_independent():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Mine(2, 2))
    policy = ordered_reduce.convert(model, order="shuffled")
    assert policy.layers == ["0"] and type(model[1]) is Mine
    twin = copy.deepcopy(model)
    policy.step()
    assert model[0].policy.count == 1 and twin[0].policy.count == 0


def test_a_converted_layer_that_has_become_another_class_follows_the_new_policy():
    model = nn.Sequential(nn.Linear(20, 5), nn.Conv2d(2, 2, 1))
    ordered_reduce.convert(model, order="shuffled")
    nn.utils.parametrizations.weight_norm(model[0])
    policy = ordered_reduce.convert(model, order="native")
    assert policy.layers == ["0", "1"] and model[0].policy is policy and model[1].policy is policy
    assert nn.utils.parametrize.is_parametrized(model[0])


def test_a_layer_with_two_names_and_a_model_made_elsewhere():
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    model.b, model.c = model.a, nn.Linear(2, 2)
    assert ordered_reduce.convert(model, layers="b").layers == ["a"]
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2))
        ordered_reduce.convert(model, order="shuffled")
        assert model(torch.ones(4, 3)).shape == (4, 2)
    model.to_empty(device="cpu")
    model(torch.randn(4, 3)).sum().backward()


def test_the_last_of_several_gives_the_choice_of_kernels_back():
    cudnn, repeating = torch.backends.cudnn, ordered_reduce.layers._repeating
    chosen = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = False, True
    try:
        first, second = contextlib.ExitStack(), contextlib.ExitStack()
        first.enter_context(repeating), second.enter_context(repeating), first.close()
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
        second.close()
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    finally:
        cudnn.deterministic, cudnn.benchmark = chosen


def test_linear_keeps_what_its_backward_needs():
    """As PyTorch's does: what is not needed may be changed in place, and takes no memory."""
    weight, x = torch.randn(4, 3), torch.randn(5, 3)
    grads = []
    for f in (F.linear, ordered_reduce.linear):
        y, w, bias = x.clone().requires_grad_() * 1, weight.clone(), torch.zeros(4, requires_grad=True)
        out = f(y, w, bias)
        with torch.no_grad():
            y.add_(1), bias.add_(1)
        grads.append(torch.autograd.grad(out.sum(), (y, bias)))
        out = f(x, w.requires_grad_() * 1)
        w.data.add_(1)
        out.sum().backward()
        grads[-1] += (w.grad,)
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4, bias=False), lambda: nn.Conv2d(3, 4, 1, bias=False)])
@pytest.mark.parametrize("of, given", [(torch.float32, torch.int64), (torch.float32, torch.uint8),
                                       (torch.bfloat16, torch.float32), (torch.float32, torch.float64),
                                       (torch.float64, torch.float32), (torch.float64, torch.int64)], ids=str)
def test_a_wrong_dtype_raises_as_pytorch_does(make, of, given):
    layer = make()
    x = torch.ones(2, 3, *[1] * (layer.weight.ndim - 2)).to(given)
    model = nn.Sequential(layer.to(of))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(x)
        ordered_reduce.convert(model)


def test_autocast_leaves_float64_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)).double()
    ordered_reduce.convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(2, 3, 1, 1).double()).dtype == torch.float64


def test_shapes_that_pytorch_takes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=(2,), padding=(1,), dilation=(1,)))
    ordered_reduce.convert(model)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    for x, weight in (((5, 0), (3, 0)), ((5, 3), (0, 3)), ((5, 0, 4, 4), (2, 0, 3, 3))):
        f = ordered_reduce.linear if len(x) == 2 else ordered_reduce.conv2d
        weight = torch.randn(weight, requires_grad=True)
        f(torch.randn(x), weight, splits=3).sum().backward()
        assert weight.grad.shape == weight.shape
    out = ordered_reduce.embedding(torch.tensor([0, 1]), weight := torch.randn(3, 0, requires_grad=True))
    out.sum().backward()
    assert weight.grad.shape == (3, 0)


@pytest.mark.parametrize("layer,shape", [
    (nn.Linear(4, 6), (5, 4)), (nn.Linear(4, 6), (5, 3, 4)), (nn.Linear(4, 6), (4,)), (nn.Linear(4, 6, bias=False), (5, 3, 4)),
    (nn.Conv2d(4, 6, 3), (5, 4, 7, 7)), (nn.Conv2d(4, 6, 1, bias=False), (4, 7, 7)), (nn.Embedding(4, 6), (5, 3))], ids=str)
def test_an_output_can_be_changed_in_place(layer, shape):
    gradients, x = [], torch.randint(4, shape) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    for order in ("native", "fixed"):
        ordered_reduce.convert(layer, order)
        out = layer(x)
        out += 0.5
        gradients.append(torch.autograd.grad(out.relu_().square().sum(), tuple(layer.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("arguments,named", [
    (dict(order="sorted"), "order.*'sorted'"), (dict(splits=0), "splits.*0"), (dict(scope="all"), "scope.*'all'"),
    (dict(layers="conv*"), r"'conv\*'.*0, 2, 3, 7"), (dict(layers=[]), "layers.*empty"), (dict(steps=(3, 3)), r"steps.*\(3, 3\)"),
    (dict(steps=(-1, 3)), "steps"), (dict(steps=(1,)), r"steps.*\(1,\)"), (dict(steps=5), "steps.*5"),
    (dict(layers=["0", "head"]), "'head'.*0, 2, 3, 7"), (dict(seed=1 << 63), "seed"),
], ids=str)
def test_convert_errors(arguments, named):
    with pytest.raises(ValueError, match=named):
        ordered_reduce.convert(network(), **arguments)


@pytest.mark.parametrize("layers", [None, 3, ["0", 3]])
def test_layers_are_strings(layers):
    with pytest.raises(TypeError, match="layers must be"):
        ordered_reduce.convert(network(), layers=layers)


def test_numbers_of_numpy_and_a_bias_to_broadcast():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    assert torch.equal(ordered_reduce.conv2d(x, weight, padding=np.int64(1)), F.conv2d(x, weight, padding=1))
    assert torch.equal(ordered_reduce.sum(x, np.int64(1)), ordered_reduce.sum(x, 1))
    assert torch.equal(ordered_reduce.sum(x, (np.int64(-1), 0)), ordered_reduce.sum(x, (3, 0)))
    weight, bias = torch.randn(4, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    found = [torch.autograd.grad(f(x, weight, bias).square().sum(), (weight, bias)) for f in (F.linear, ordered_reduce.linear)]
    torch.testing.assert_close(*found)
    with torch.autocast("cpu", torch.bfloat16):
        assert ordered_reduce.linear(x, weight, bias).dtype == torch.bfloat16
    grad = torch.randn(5, 4)
    for arguments in (dict(splits=5), dict(seed=1), dict(step=1), dict(op=1), dict(scope="tensor")):
        arguments = dict(order="shuffled", splits=4, **arguments) if "splits" not in arguments else arguments
        got, = torch.autograd.grad(ordered_reduce.linear(x[0, 0], weight, bias, **arguments), weight, grad)
        assert torch.equal(got, weight_gradient(x[0, 0], weight, grad, **arguments))


def test_functional_errors_are_pytorchs():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 2, 3, 3)
    for f in (F.conv2d, ordered_reduce.conv2d):
        with pytest.raises(RuntimeError, match="expected input"):
            f(x, weight)
        with pytest.raises(RuntimeError, match=r"Expected 3D \(unbatched\) or 4D \(batched\) input"):
            f(torch.randn(5, 5), torch.randn(1, 1, 3, 3))
        for wrong, said in ((dict(padding=(1, 2, 3)), r"padding=\[1, 2, 3\]"), (dict(padding="all"), "padding string: 'all'"),
                            (dict(padding="same", stride=2), "strided"), (dict(padding="same", dilation=(1, 2, 3)), "dilation")):
            with pytest.raises(RuntimeError, match=said):
                f(x, weight.repeat(1, 2, 1, 1)[:, :3], **wrong)
    for f in (F.linear, ordered_reduce.linear):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            f(torch.randn(2, 3), torch.randn(4, 5))
        with pytest.raises(RuntimeError, match="at least 1D"):
            f(torch.tensor(1.0), torch.randn(3, 1))
    for f, shape in ((ordered_reduce.linear, (2, 3)), (ordered_reduce.conv2d, (2, 3, 1, 1))):
        x = torch.randn(shape, dtype=torch.complex64)
        with pytest.raises(NotImplementedError, match="complex64"):
            f(x, x)
        assert f(x, x, order="native").dtype == x.dtype
    for step, error in ((1 << 70, ValueError), (1.5, TypeError)):
        x = torch.ones(2, 3, requires_grad=True)
        with pytest.raises(error):
            ordered_reduce.linear(x, torch.ones(4, 3, requires_grad=True), order="arrival", step=step).sum().backward()
    for wrong in (dict(splits=2.5), dict(seed=1.5)):
        with pytest.raises(TypeError, match="(splits|seed) must be an integer"):
            ordered_reduce.convert(network(), **wrong)
    with pytest.raises(ValueError, match="step.*-5"):
        ordered_reduce.convert(network()).load_state_dict({"step": -5})
    with pytest.raises(TypeError, match="step.*2.5"):
        ordered_reduce.convert(network()).load_state_dict({"step": 2.5})
    with pytest.raises(ValueError, match="order.*'x'"):
        ordered_reduce.linear(torch.randn(2, 3), torch.randn(4, 3), order="x")


def test_linear_by_keyword_and_what_has_no_batch_to_cut():
    plain, x = nn.Linear(6, 4), torch.eye(6).to_sparse()
    layer = copy.deepcopy(plain)
    ordered_reduce.convert(layer, "shuffled")
    for one in (plain, layer):
        one(input=x).square().sum().backward()
    assert torch.equal(plain.weight.grad, layer.weight.grad)
    plain, x = nn.Embedding(5, 4), torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)
    layer = copy.deepcopy(plain)
    ordered_reduce.convert(layer, "shuffled")
    for one in (plain, layer):
        one(x).values().square().sum().backward()
    assert torch.equal(plain.weight.grad, layer.weight.grad)


# ------------------------------------------------------------------------------------------- what must not go unnoticed


@pytest.mark.parametrize("shape, batch, splits", [((256, 20, 1, 1, 0, 1, 4), 1, 8), ((256, 20, 1, 1, 0, 1, 4), 4, 1)])
def test_a_group_alone_does_not_depend_on_the_threads_of_mkl(shape, batch, splits):
    """Which torch.set_num_threads sets beside OpenMP's."""
    torch.manual_seed(0)
    conv, before, found = nn.Conv2d(*shape), torch.get_num_threads(), []
    ordered_reduce.convert(conv, splits=splits)
    out = conv(torch.randn(batch, shape[0], 56, 56))
    grad = torch.randn_like(out)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(out, conv.weight, grad, retain_graph=True)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_long_sample_alone_does_not_depend_on_the_threads():
    torch.manual_seed(0)
    x, weight, before = torch.randn(1, 1 << 14, 64), torch.randn(256, 64, requires_grad=True), torch.get_num_threads()
    grad = torch.randn(1, 1 << 14, 256).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = ordered_reduce.linear(x, weight)
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(out, weight, grad, retain_graph=True)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], grad[0].double().T @ x[0].bfloat16().double(), rtol=1e-2, atol=1e-2 * 128,
                               check_dtype=False)


def test_an_exported_program_has_pytorchs_gradients():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.a.weight + self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    plain, x = Residual(), torch.randn(16, 8)
    ordered = copy.deepcopy(plain)
    ordered_reduce.convert(ordered)
    for model in (plain, ordered):
        torch.export.export(model, (x,)).module()(x).square().sum().backward()
    for expected, got in zip(plain.parameters(), ordered.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_what_would_be_converted_to_no_effect_or_harm_is_left_alone():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Embedding.from_pretrained(torch.arange(6).view(3, 2)), nn.Linear(3, 2),
                           nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2, scale_grad_by_freq=True),
                           nn.Embedding(3, 2, sparse=True), nn.Embedding(3, 2)])
    model[0].forward = model[0].forward   # as libraries wrap it
    assert ordered_reduce.convert(model).layers == ["2", "6"] and type(model[0]) is nn.Linear
    assert model[1](torch.tensor([1])).tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="none .subclasses"):
        ordered_reduce.convert(model[0])
    model[2].forward = model[2].forward   # of the converted layer: it follows its policy
    policy = ordered_reduce.convert(model, "shuffled")
    assert policy.layers == ["2", "6"] and model[2].policy is policy


def test_a_policy_made_in_inference_mode_steps():
    with torch.inference_mode():
        policy = ordered_reduce.convert(network(), "shuffled")
    policy.step()
    assert policy.count == policy._step.item() == 1


def test_integers_are_refused():
    x = torch.ones(2, 3, dtype=torch.int64)
    for f in (F.linear, ordered_reduce.linear):
        with pytest.raises(RuntimeError):
            f(x, torch.ones(4, 3, dtype=torch.float64))
        with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
            f(x, torch.ones(4, 3))


@pytest.mark.parametrize("samples", [3, 0])
def test_operators_of_fewer_samples_than_splits(samples):
    x, grad = torch.randn(samples, 6), torch.randn(samples, 4)
    torch.library.opcheck(torch.ops.ordered_reduce.products.default, (grad, x, 8))
    if samples:
        images = torch.randn(samples, 4, 3, 3), torch.randn(samples, 2, 5, 5), torch.randn(4, 2, 3, 3)
        torch.library.opcheck(torch.ops.ordered_reduce.conv2d_weight_partials.default, (*images, [1, 1], [0, 0], [1, 1], 1, 8))


def test_a_large_convolution_in_channel_groups_to_few_pixels():
    torch.manual_seed(0)
    x, weight = torch.randn(16, 256, 2, 2), torch.randn(256, 128, 3, 3, requires_grad=True)
    assert weight.numel() * 4 * 8 > ordered_reduce.layers.BLOCK
    expected, got = (torch.autograd.grad(f(x, weight, padding=1, groups=2).square().sum(), weight)[0]
                     for f in (F.conv2d, ordered_reduce.conv2d))
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_bias_gradients_are_in_fixed_order():
    torch.manual_seed(0)
    grad, bias = torch.randn(1000, 13), torch.zeros(13, requires_grad=True)
    for order in ("fixed", "shuffled"):
        for f, pixel in ((ordered_reduce.linear, ()), (ordered_reduce.conv2d, (1, 1))):
            out = f(torch.randn(1000, 5, *pixel), torch.randn(13, 5, *pixel), bias, order=order)
            assert torch.equal(torch.autograd.grad(out, bias, grad.view_as(out))[0], ordered_reduce.sum(grad, 0))


def test_a_large_linear_layer_under_autocast():
    torch.manual_seed(0)
    x, weight, grad = torch.randn(12, 2501), torch.randn(37, 2501, requires_grad=True), torch.randn(12, 37).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = ordered_reduce.linear(x, weight, order="shuffled", splits=12)
    got, = torch.autograd.grad(out, weight, grad)
    terms = (grad[:, :, None] * x.bfloat16()[:, None]).float().flatten(1)
    assert terms.numel() * 4 > 2 * ordered_reduce.layers.BLOCK
    assert torch.equal(got.flatten(), ordered_reduce.sum(terms, 0, order="shuffled", splits=12))


def test_a_large_linear_layer_of_no_rows():
    x, weight = torch.randn(16, 0, 700), torch.randn(900, 700, requires_grad=True)
    ordered_reduce.linear(x, weight).sum().backward()
    assert not weight.grad.any()


def test_every_layer_checks_its_order_arguments():
    for f, x, weight in ((ordered_reduce.conv2d, torch.ones(2, 3, 4, 4), torch.ones(4, 3, 1, 1)),
                         (ordered_reduce.linear, torch.ones(2, 3), torch.ones(4, 3)),
                         (ordered_reduce.embedding, torch.tensor([0]), torch.ones(4, 3))):
        for wrong in (dict(order="x"), dict(splits=0), dict(scope="all"), dict(seed=1 << 63), dict(op=-1)):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                f(x, weight, **wrong)


def test_weights_of_odd_dimensions_are_pytorchs():
    for f in (F.conv2d, ordered_reduce.conv2d):
        with pytest.raises(RuntimeError):
            f(torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3), padding="same")
    x, weight = torch.randn(6, 5), torch.randn(5, requires_grad=True)
    assert torch.equal(*(torch.autograd.grad(f(x, weight).sum(), weight)[0] for f in (F.linear, ordered_reduce.linear)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_linear():
    plain, x = nn.Linear(6, 4), torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])   # strided
    layer = copy.deepcopy(plain)
    ordered_reduce.convert(layer, "shuffled")
    for one in (plain, layer):
        torch.nested.to_padded_tensor(one(x), 0.0).square().sum().backward()
    assert torch.equal(plain.weight.grad, layer.weight.grad)


@pytest.mark.parametrize("arguments", [dict(order="shuffled"), dict(noise="gaussian"), dict(noise="flip", flips=20)], ids=str)
@pytest.mark.parametrize("make, x", [
    (lambda: nn.Linear(20, 9), torch.ones(64, 20)), (lambda: nn.Conv2d(4, 9, 3), torch.ones(64, 4, 5, 5)),
    (lambda: nn.Embedding(9, 20), torch.arange(500) % 9)], ids=["linear", "conv", "embedding"])
def test_equal_layers_have_draws_of_their_own(make, x, arguments):
    torch.manual_seed(0)
    x, model = x * torch.rand(x.shape) if x.is_floating_point() else x, nn.ModuleList([make(), make()])
    model[1].load_state_dict(model[0].state_dict())
    for chosen in ({}, arguments):
        ordered_reduce.convert(model, **chosen)
        grad = torch.randn(model[0](x).shape, generator=torch.Generator().manual_seed(0))
        first, second = (torch.autograd.grad(layer(x), layer.weight, grad)[0] for layer in model)
        assert torch.equal(first, second) == (not chosen)


def test_policies_and_their_arguments():
    policy = ordered_reduce.convert(network(), layers=(name for name in ("0", "7")))
    assert policy.layers == ["0", "7"] and policy.to("cpu") is policy
    policy.load_state_dict({"step": (1 << 32) - 1})
    with pytest.raises(ValueError, match="step.*4294967296"):
        policy.step()
    assert policy.count == (1 << 32) - 1


def test_convert_hands_on_its_arguments():
    torch.manual_seed(0)
    x, grad, layer = torch.randn(64, 20), torch.randn(64, 9), nn.Linear(20, 9)
    for arguments in (dict(splits=16), dict(seed=5), dict(scope="tensor")):
        ordered_reduce.convert(layer, "shuffled", **arguments).step()
        got, = torch.autograd.grad(layer(x), layer.weight, grad)
        assert torch.equal(got, weight_gradient(x, layer.weight, grad, order="shuffled", step=1, **arguments))
        assert not torch.equal(got, weight_gradient(x, layer.weight, grad, order="shuffled", step=1))


@pytest.mark.parametrize("kind, arguments", [("gaussian", dict(seed=5)), ("flip", dict(seed=5)), ("flip", dict(flips=9)),
                                             ("flip", dict(bit=12)), ("gaussian", dict(ulps=9.0))], ids=str)
def test_convert_hands_on_its_noise(kind, arguments):
    torch.manual_seed(0)
    x, grad, layer = torch.randn(64, 20), torch.randn(64, 9), nn.Linear(20, 9)
    ordered_reduce.convert(layer, noise=kind, **arguments).step()
    got, = torch.autograd.grad(layer(x), layer.weight, grad)

    def noisy(**arguments):
        out = ordered_reduce.linear(x, ordered_reduce.noisy(layer.weight, kind, step=1, **arguments))
        return torch.autograd.grad(out, layer.weight, grad)[0]

    assert torch.equal(got, noisy(**arguments)) and not torch.equal(got, noisy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format_of_weight", [torch.channels_last, torch.contiguous_format])
def test_half_channels_last_groups_read_no_memory_that_nothing_was_written_to(dtype, format_of_weight):
    """As a kernel of PyTorch's does there."""
    torch.manual_seed(1)
    x, weight, grad = (torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
                       for shape in ((3, 4, 3, 1), (32, 2, 2, 2), (3, 32, 1, 1)))
    weight = weight.contiguous(memory_format=format_of_weight)
    out, found = ordered_reduce.conv2d(x, weight.requires_grad_(), stride=(3, 2), padding=(0, 1), groups=2, splits=1), set()
    for _ in range(60):
        dirty = [torch.full((n,), 3e30) for n in (64, 256, 1000, 4000)]
        del dirty
        got, = torch.autograd.grad(out, weight, grad, retain_graph=True)
        found.add(got.float().numpy().tobytes())
    assert len(found) == 1 and got.abs().max() < 100


@pytest.mark.parametrize("arguments", [
    ((4, 5, 1, 1), (4, 3, 2, 2), (5, 3, 1, 1), [1, 1], [2**31 - 1] * 2, [1, 1]),
    ((4, 5, 3, 3), (4, 3, 7, 7), (5, 3, 3, 3), [2**62 + 10**9, 1], [0, 0], [1, 1]),
    ((4, 5, 3, 3), (4, 3, 7, 7), (5, 3, 3, 3), [1, 1], [0, 0], [1, 2**62]),
    ((4, 5, 1, 1), (4, 3, 7, 7), (5, 3, 3, 3), [1, 1], [2**63 - 1, 0], [1, 1])])
def test_no_number_is_too_large_for_the_shape_of_a_convolution(arguments):
    tensors, numbers = map(torch.ones, arguments[:3]), arguments[3:]
    with pytest.raises(RuntimeError, match="convolution's shape|too large"):
        torch.ops.ordered_reduce.conv2d_weight_partials(*tensors, *numbers, 1, 2)
