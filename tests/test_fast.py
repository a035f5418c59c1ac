import json
import platform
import re
import sys
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, execute
from test_textbook import as_textbook, gradients, textbook_block
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fast
from device import autocast
from model import Block, build_model

CPU = torch.device("cpu")
# All of a network that goes beyond the report and is not of its classifier.
BEYOND = {"arch": [8, 8, 12], "norm": "batch", "downsample": [3], "fc": 1}


@pytest.fixture(params=[*fast.FORMS, "kernels of GPUs"])
def form(request, monkeypatch):
    """A form, which blocks then use; what a GPU has for one runs on any processor."""
    name, _, gpu = request.param.partition(" ")
    monkeypatch.setattr(fast, "FORM", name)
    if gpu:
        monkeypatch.setattr(fast, "MixedConvolution", fast.MixedProduct)
    return request.param


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["apart", "together"])
def layout(request):
    """How the channels of a pixel lie in memory."""
    return request.param


def values(network, x):
    """What a network makes of x, the gradient of x, and those of the network's weights."""
    x = x.clone().requires_grad_()
    network.zero_grad()
    y = network(x)
    (y**3).sum().backward()
    return [y, x.grad, gradients(network)]


@pytest.mark.parametrize(
    "images, inputs, outputs, k", [(4, 3, 8, 3), (1, 8, 4, 2), (5, 6, 6, 2), (130, 2, 2, 2)]
)
def test_all_forms_have_the_textbooks_values(images, inputs, outputs, k, layout, form):
    block = Block(inputs, outputs, k).double().to(memory_format=layout)
    x = torch.randn(images, inputs, 16, 12, dtype=torch.double)
    y, grad, grads = values(block, x)
    expected = values(textbook_block(block), x)
    torch.testing.assert_close([y, grad, as_textbook(grads, k)], expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("gate", [{}, {"k": 1, "gate": "sigmoid"}], ids=["choice", "one set"])
def test_all_forms_agree_in_a_network_that_goes_beyond_the_report(gate, layout, form, monkeypatch):
    network = build_model(BEYOND | gate).double().to(memory_format=layout)
    x = torch.randn(4, 3, 32, 32, dtype=torch.double)
    ours = values(network, x)
    monkeypatch.setattr(fast, "FORM", "outputs")
    torch.testing.assert_close(ours, values(network, x), atol=1e-8, rtol=1e-8)


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


@pytest.mark.parametrize(
    "k, inputs, size, together",
    [(1, 16, 32, True), (1, 3, 32, True), (2, 16, 8, True), (2, 16, 32, False)],
)
def test_on_a_cpu_channels_are_together_for_whole_convolutions(k, inputs, size, together, layout):
    x = torch.randn(2, inputs, size, size).to(memory_format=layout)
    assert fast.is_channels_last(Block(inputs, 16, k)(x)) == together


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


def measured(file):
    """Each block in a file of bench.py: whether the CPU has AMX, the precision, what the block is,
    and the seconds of each form."""
    report = json.loads((ROOT / "results" / "bench" / file).read_text())
    for row in report["results"]:
        # Elsewhere weighted inputs were not timed, or before outputs were as fast as now.
        forms = fast.FORMS if "amx" in file else ("outputs", "kernels")
        seconds = {form: median(row["seconds"][form]) for form in forms}
        name = f"{row['what']}, {file}"
        yield pytest.param("amx" in file, report["precision"], row["what"], seconds, id=name)


def choose(inputs, outputs, size, k, batch, precision="float32", device=None, amx=False):
    """The form that `auto` takes for a block."""
    convs = nn.Conv2d(inputs, k * outputs, 3, device=device)
    if amx:
        convs.to(memory_format=torch.channels_last)
    x = torch.empty(1, inputs, size, size, device=device).expand(batch, -1, -1, -1)
    coefficients = torch.empty(batch, k)
    with autocast(CPU, precision):
        return fast.choose_form(x, coefficients, convs)


@pytest.mark.parametrize(
    "amx, precision, what, seconds",
    [
        *measured("forms-cpu.json"),
        *measured("forms-cpu-amx.json"),
        *measured("forms-cpu-float32.json"),
    ],
)
def test_auto_is_the_form_that_was_measured_to_be_the_fastest(amx, precision, what, seconds):
    inputs, outputs, size, _, k, batch = map(int, re.findall(r"\d+", what))
    chosen = choose(inputs, outputs, size, k, batch, precision, amx=amx)
    assert seconds[chosen] == min(seconds.values())


@pytest.mark.parametrize(
    "inputs, outputs, size, fastest",
    [(64, 128, 32, "kernels"), (128, 256, 32, "kernels"), (128, 128, 16, "outputs")],
)
def test_so_it_is_on_cpus_with_amx(inputs, outputs, size, fastest):
    assert choose(inputs, outputs, size, 3, 1, "bfloat16", amx=True) == fastest


def test_on_a_gpu_auto_mixes_kernels_in_the_wide_blocks_of_final_alone():
    with FakeTensorMode():  # there need not be one
        final, row2, best = (
            choose(*block, 128, device="cuda")
            for block in ((256, 512, 32, 3), (128, 256, 32, 2), (256, 256, 8, 2))
        )
    assert (final, row2, best) == ("kernels", "outputs", "outputs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
def test_a_pool_is_pytorchs_own_gradient_included(pool, dtype):
    x, results = torch.randn(4, 16, 32, 32, requires_grad=True), []
    for own in (fast.Pool(pool, 4), lambda x: pool(x, 4)):
        y = own(x.relu().to(dtype))
        results.append([y, *torch.autograd.grad((y**2).sum(), x)])
    torch.testing.assert_close(*results)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory")
def test_the_memory_of_a_freed_tensor_stays_with_the_process():
    code = """
import fast, resource, torch
fast.keep_memory()
pages = lambda: int(open("/proc/self/statm").read().split()[1])
before = pages()
torch.ones(64 * 2**20)
print((pages() - before) * resource.getpagesize() // 2**20)
"""
    result = execute(sys.executable, "-c", code)
    assert int(result.stdout) > 200, result.stderr  # of 256 MiB
