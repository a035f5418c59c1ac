import pytest
import torch
import torch.nn.functional as F

import fast
from device import autocast
from model import Block, build_model

FORMATS = [torch.contiguous_format, torch.channels_last]


def in_all_forms(network, x, monkeypatch):
    """What a network gives, all its gradients included, by each form of its blocks' sums."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for form in fast.FORMS:
        monkeypatch.setattr(fast, "FORM", form)
        y = network(x)
        yield [y, *torch.autograd.grad((y**3).sum(), [x, *trained])]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("count, inputs, outputs, k", [(4, 3, 8, 3), (1, 8, 4, 2), (5, 6, 6, 1)])
def test_all_forms_have_the_same_output_and_gradients(
    count, inputs, outputs, k, layout, monkeypatch
):
    block = Block(inputs, outputs, k).double().to(memory_format=layout)
    x = torch.randn(count, inputs, 16, 12, dtype=torch.double).to(memory_format=layout)
    first, *others = in_all_forms(block, x.requires_grad_(), monkeypatch)
    assert others
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-10, rtol=0)


@pytest.mark.parametrize("layout", FORMATS)
def test_all_forms_give_the_same_network_with_all_that_goes_beyond_the_report(layout, monkeypatch):
    torch.manual_seed(0)
    options = {"arch": [8, 8, 12], "norm": "batch", "downsample": [3], "residual": True, "fc": 1}
    model = build_model(options).double().to(memory_format=layout)
    x = torch.randn(4, 3, 32, 32, dtype=torch.double, requires_grad=True)
    first, *others = in_all_forms(model, x, monkeypatch)
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("form", fast.FORMS)
@pytest.mark.parametrize("outputs", [8, 32])  # narrow gradients are computed in float32
def test_in_bfloat16_all_forms_stay_close_and_gradients_float32(outputs, form, monkeypatch):
    torch.manual_seed(0)
    block = Block(16, outputs, 3)
    monkeypatch.setattr(fast, "FORM", form)
    x, results = torch.randn(40, 16, 32, 32, requires_grad=True), []
    for precision in ("float32", "bfloat16"):
        with autocast(torch.device("cpu"), precision):
            y = block(x)
        gradients = torch.autograd.grad((y.float() ** 2).sum(), [x, *block.parameters()])
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append([y.float(), *gradients])
    assert y.dtype == torch.bfloat16
    for exact, rounded in zip(*results):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", fast.FORMS)
def test_a_network_in_channels_last_stays_so_from_its_first_block_on(form, precision, monkeypatch):
    monkeypatch.setattr(fast, "FORM", form)
    options = {"arch": [8, 8, 12], "norm": "batch", "downsample": [3], "residual": True, "fc": 1}
    model = build_model(options).to(memory_format=torch.channels_last)
    outputs = []
    for layer in model.backbone:
        layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
    with autocast(torch.device("cpu"), precision):
        model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert len(outputs) == 3
    assert all(fast.is_channels_last(x) for x in outputs)
    grads = [block.convs.weight.grad for block in model.backbone]
    assert all(fast.is_channels_last(grad) for grad in grads)


@pytest.mark.parametrize(
    "kind, precision, amx, together",
    [("cuda", "float32", False, True), ("cpu", "bfloat16", True, True)]
    + [("cpu", "float32", True, False), ("cpu", "bfloat16", False, False)],
)
def test_channels_are_together_on_gpus_and_in_bfloat16_on_cpus_with_amx(
    kind, precision, amx, together, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    expected = torch.channels_last if together else torch.contiguous_format
    assert fast.memory_format(torch.device(kind), precision) is expected


@pytest.mark.parametrize("form", fast.FORMS)
def test_no_images_have_no_output_and_gradients_of_zero(form, monkeypatch):
    monkeypatch.setattr(fast, "FORM", form)
    block = Block(3, 4, 2)
    y = block(torch.zeros(0, 3, 8, 8))
    assert y.shape == (0, 4, 8, 8)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), block.convs.parameters()))


def test_the_form_depends_on_size_width_and_precision():
    def choose(width, size, precision, inputs=8, layout=torch.contiguous_format):
        block, x = Block(inputs, width, 3), torch.zeros(1, inputs, size, size)
        block, x = block.to(memory_format=layout), x.to(memory_format=layout)
        with autocast(x.device, precision):
            return fast.choose_form(x, block.coefficients(x), block.convs)

    assert [choose(*shape, "float32") for shape in [(8, 16), (8, 8), (4, 16)]] == [
        "kernels",
        "outputs",
        "outputs",
    ]
    assert [choose(*shape, "bfloat16") for shape in [(8, 16), (8, 8), (4, 16)]] == [
        "kernels",
        "inputs",
        "kernels",
    ]
    together = [
        choose(8, *shape, torch.channels_last)
        for shape in [(32, "bfloat16", 128), (32, "bfloat16", 64), (16, "bfloat16", 128)]
    ]
    assert together == ["kernels", "outputs", "outputs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
def test_a_pool_is_pytorchs_own_gradient_included(pool, dtype):
    x, results = torch.randn(4, 16, 32, 32, requires_grad=True), []
    for own in (fast.Pool(pool, 4), lambda x: pool(x, 4)):
        y = own(x.relu().to(dtype))
        results.append([y, *torch.autograd.grad((y**2).sum(), x)])
    torch.testing.assert_close(*results)
