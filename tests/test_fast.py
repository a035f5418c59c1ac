from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast
from device import autocast
from model import Block, build_model

CPU = torch.device("cpu")
# All of a network that goes beyond the report and is not of its classifier.
BEYOND = {"arch": [8, 8, 12], "norm": "batch", "downsample": [3], "residual": True, "fc": 1}


@pytest.fixture(params=[*fast.FORMS, "kernels of GPUs"])
def form(request, monkeypatch):
    """A form, which blocks then use; what a GPU has for one runs on any processor."""
    name, _, gpu = request.param.partition(" ")
    monkeypatch.setattr(fast, "FORM", name)
    if gpu:
        monkeypatch.setattr(fast, "MixedConvolution", fast.MixedProduct)
    return request.param


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "network, shape",
    [
        (Block(3, 8, k=3), (4, 3, 16, 12)),
        (Block(8, 4, k=2), (1, 8, 16, 12)),
        (Block(6, 6, k=1), (5, 6, 16, 12)),
        (build_model(BEYOND), (4, 3, 32, 32)),
    ],
)
def test_all_forms_have_the_same_output_and_gradients(network, shape, layout, form, monkeypatch):
    network.double().to(memory_format=layout)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    x, results = torch.randn(shape, dtype=torch.double, requires_grad=True), []
    for _ in ("this form", "as the report writes it"):
        y = network(x)
        results.append([y, *torch.autograd.grad((y**3).sum(), [x, *trained])])
        monkeypatch.setattr(fast, "FORM", "outputs")
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("outputs", [8, 32])  # narrow gradients are computed in float32
def test_in_bfloat16_all_forms_stay_close_and_gradients_float32(outputs, form):
    torch.manual_seed(0)
    block = Block(16, outputs, 3)
    x, results = torch.randn(40, 16, 32, 32, requires_grad=True), []
    for precision in ("float32", "bfloat16"):
        with autocast(CPU, precision):
            y = block(x)
        gradients = torch.autograd.grad((y.float() ** 2).sum(), [x, *block.parameters()])
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append([y.float(), *gradients])
    assert y.dtype == torch.bfloat16
    for exact, rounded in zip(*results):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_in_channels_last_stays_so_from_its_first_block_on(form, precision):
    model = build_model(BEYOND).to(memory_format=torch.channels_last)
    outputs = []
    for layer in model.backbone:
        layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
    with autocast(CPU, precision):
        model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert len(outputs) == 3
    assert all(fast.is_channels_last(x) for x in outputs)
    grads = [block.convs.weight.grad for block in model.backbone]
    assert all(fast.is_channels_last(grad) for grad in grads)


@pytest.mark.parametrize("amx", [True, False])
def test_channels_are_together_on_gpus_and_in_bfloat16_on_cpus_with_amx(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast.memory_format(torch.device("cuda"), "float32") is torch.channels_last
    assert fast.memory_format(CPU, "float32") is torch.contiguous_format
    expected = torch.channels_last if amx else torch.contiguous_format
    assert fast.memory_format(CPU, "bfloat16") is expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_images_have_no_loss_and_gradients_of_zero(form, precision):
    # A process may have none of the last batch.
    model = build_model({"arch": [8, 8], "downsample": [1], "hidden": 8})
    labels = torch.empty(0, dtype=torch.long)
    with autocast(CPU, precision):
        loss = F.cross_entropy(model(torch.empty(0, 3, 32, 32)), labels, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert all(weights.grad.abs().max() == 0 for weights in model.parameters())


def test_the_form_depends_on_size_width_and_precision():
    def choose(width, size, precision, inputs=8, layout=torch.contiguous_format):
        block, x = Block(inputs, width, 3), torch.zeros(1, inputs, size, size)
        block, x = block.to(memory_format=layout), x.to(memory_format=layout)
        with autocast(x.device, precision):
            return fast.choose_form(x, block.coefficients(x), block.convs)

    shapes = (8, 16), (8, 8), (4, 16)
    assert [choose(*shape, "float32") for shape in shapes] == ["kernels", "outputs", "outputs"]
    assert [choose(*shape, "bfloat16") for shape in shapes] == ["kernels", "outputs", "kernels"]
    shapes = (32, "bfloat16", 128), (32, "bfloat16", 64), (16, "bfloat16", 128)
    together = [choose(8, *shape, torch.channels_last) for shape in shapes]
    assert together == ["kernels", "outputs", "outputs"]
    batch = {batch: MagicMock(is_cuda=True, shape=(batch, 256, 32, 32)) for batch in (16, 128)}
    on_gpu = []
    for images, x in batch.items():
        x.__len__.return_value = images
        on_gpu.append(fast.choose_form(x, torch.ones(images, 3), nn.Conv2d(256, 3 * 512, 3)))
    assert on_gpu == ["outputs", "kernels"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
def test_a_pool_is_pytorchs_own_gradient_included(pool, dtype):
    x, results = torch.randn(4, 16, 32, 32, requires_grad=True), []
    for own in (fast.Pool(pool, 4), lambda x: pool(x, 4)):
        y = own(x.relu().to(dtype))
        results.append([y, *torch.autograd.grad((y**2).sum(), x)])
    torch.testing.assert_close(*results)
