import math

import pytest
import torch
import torch.nn.functional as F

from device import autocast
from model import GATES, Block, Pool, build_model, costs


def textbook(block, images):
    """A block as the report writes it: k convolutions, their outputs weighted, then ReLU."""
    pooled = F.adaptive_avg_pool2d(images, 8).mean((2, 3))
    coefficients = block.gate(F.linear(pooled, block.gate_linear.weight, block.gate_linear.bias))
    kernels = block.convs.weight.chunk(block.k), block.convs.bias.chunk(block.k)
    outputs = [F.conv2d(images, weight, bias, padding=1) for weight, bias in zip(*kernels)]
    total = sum(a.view(-1, 1, 1, 1) * output for a, output in zip(coefficients.T, outputs))
    return block.activation(total)


def double_images(count, channels, size=16):
    return torch.randn(count, channels, size, size, dtype=torch.double, requires_grad=True)


def in_both_forms(network, blocks, images):
    """What a network gives, all its gradients included, by each form of its blocks' sums."""
    for mix in ("outputs", "kernels"):
        for block in blocks:
            block.mix = mix
        output = network(images)
        gradients = torch.autograd.grad((output**3).sum(), [images, *network.parameters()])
        yield [output, *gradients]


@pytest.mark.parametrize("mix", ["outputs", "kernels"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_a_block_is_the_reports_formula(gate, relu, mix):
    block = Block(5, 7, k=3, gate=gate, relu=relu, mix=mix).double()
    images = double_images(4, 5)
    torch.testing.assert_close(block(images), textbook(block, images), atol=1e-10, rtol=0)


@pytest.mark.parametrize("count, inputs, outputs, k", [(4, 3, 8, 3), (1, 8, 4, 2), (5, 6, 6, 1)])
def test_both_forms_of_the_sum_have_the_same_output_and_gradients(count, inputs, outputs, k):
    block = Block(inputs, outputs, k).double()
    results = in_both_forms(block, [block], double_images(count, inputs))
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)


def test_both_forms_give_the_same_network_with_all_that_goes_beyond_the_report():
    torch.manual_seed(0)
    options = {"arch": [8, 8, 12], "norm": "batch", "downsample": True, "residual": True, "fc": 1}
    model = build_model(options).double()
    blocks = model.backbone.blocks().values()
    results = in_both_forms(model, blocks, double_images(4, 3, size=32))
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-8)


def test_softmax_coefficients_of_each_image_sum_to_one():
    coefficients = Block(3, 4, k=5).coefficients(torch.randn(6, 3, 32, 32))
    assert coefficients.shape == (6, 5)
    torch.testing.assert_close(coefficients.sum(1), torch.ones(6))


def test_the_backbone_has_a_block_per_entry_and_keeps_the_image_size():
    backbone = build_model({"arch": [4, 6, 5], "hidden": 8}).backbone
    assert [name for name, _ in backbone.named_children()] == ["block1", "block2", "block3"]
    assert [block.convs.in_channels for block in backbone] == [3, 4, 6]
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 5, 32, 32)


def test_fully_connected_layers_have_relu_and_dropout_between_them():
    classifier = build_model({"arch": [4], "fc": 3, "hidden": 20, "dropout": 0.3}).classifier
    names = [type(layer).__name__ for layer in classifier]
    hidden = ["Linear", "ReLU", "Dropout"]
    assert names == ["Pool", "Flatten", *hidden, *hidden, "Linear"]
    sizes = [(layer.in_features, layer.out_features) for layer in list(classifier)[2::3]]
    assert sizes == [(256, 20), (20, 20), (20, 10)]
    assert classifier[4].p == 0.3


def test_the_blocks_can_go_without_relu():
    model = build_model({"arch": [4, 6], "block_relu": False, "fc": 1})
    assert model.backbone(torch.randn(2, 3, 32, 32)).min() < 0


@pytest.mark.parametrize("init", ["he", "default"])
def test_initialisation_is_that_of_k_separate_convolutions(init):
    torch.manual_seed(0)
    convs = build_model({"arch": [32, 64], "k": 3, "init": init, "hidden": 8}).backbone.block2.convs
    fan_in = 32 * 3 * 3
    for weight, bias in zip(convs.weight.chunk(3), convs.bias.chunk(3)):
        if init == "he":
            assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
            assert bias.abs().max() == 0
        else:  # uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in)
            assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.01)
            assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)
            assert 0 < bias.abs().max() <= 1 / math.sqrt(fan_in)


def test_the_defaults_are_the_reports_final_model():
    with torch.device("meta"):
        model = build_model({})
    assert [block.convs.out_channels for block in model.backbone] == [192, 384, 768, 1536]
    layers = [layer for layer in model.classifier if isinstance(layer, torch.nn.Linear)]
    assert [layer.in_features for layer in layers] == [512 * 8 * 8, 4096, 4096]


@pytest.mark.parametrize("mix", ["outputs", "kernels"])
def test_batch_normalisation_is_of_the_gated_sum_before_the_relu(mix):
    block = Block(5, 7, k=3, mix=mix, norm="batch").double()
    images = double_images(4, 5)
    plain = Block(5, 7, k=3, relu=False).double()
    plain.load_state_dict(block.state_dict(), strict=False)
    sums = textbook(plain, images)
    mean, variance = sums.mean((0, 2, 3)), sums.var((0, 2, 3), unbiased=False)
    normalised = (sums - mean.view(-1, 1, 1)) / (variance + 1e-5).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(block(images), normalised.relu(), atol=1e-10, rtol=0)


def test_a_residual_block_adds_its_input_where_it_keeps_the_width():
    images = torch.randn(2, 6, 16, 16)
    for outputs in (6, 7):
        block = Block(6, outputs, k=2, residual=True)
        expected = textbook(block, images) + (images if outputs == 6 else 0)
        torch.testing.assert_close(block(images), expected)


def test_downsampling_halves_the_images_between_blocks_of_different_width():
    model = build_model({"arch": [4, 4, 6, 6, 8], "downsample": True, "fc": 1})
    images, sizes = torch.randn(2, 3, 32, 32), {}
    for name, layer in model.backbone.named_children():
        images = layer(images)
        sizes[name] = images.shape[-1]
    assert sizes == {
        "block1": 32, "block2": 32, "pool2": 16, "block3": 16, "block4": 16, "pool4": 8, "block5": 8
    }  # fmt: skip
    assert [block.size for block in model.backbone.blocks().values()] == [32, 32, 16, 16, 8]
    assert model.backbone.size == 8
    assert model.backbone.pool2.pool is F.max_pool2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
def test_a_pool_is_pytorchs_own_gradient_included(pool, dtype):
    images, results = torch.randn(4, 16, 32, 32, requires_grad=True), []
    for own in (Pool(pool, 4), lambda images: pool(images, 4)):
        outputs = own(images.relu().to(dtype))
        results.append([outputs, *torch.autograd.grad((outputs**2).sum(), images)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("halvings, size", [(0, 32), (1, 16), (2, 8), (4, 2)])
def test_the_classifier_pools_maps_of_any_size_to_a_grid(halvings, size):
    arch = [4, 8, 4, 8, 4][: halvings + 1]
    for pool, grid in (("adaptive", min(8, size)), ("avg", size // min(8, size))):
        model = build_model({"arch": arch, "downsample": True, "pool": pool, "fc": 1})
        assert model.classifier[-1].in_features == arch[-1] * grid**2
        maps = torch.randn(2, arch[-1], size, size)
        torch.testing.assert_close(model.classifier[0](maps), F.adaptive_avg_pool2d(maps, grid))
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_mixed_kernels_are_chosen_on_a_cpu_for_large_maps_but_for_few_channels_in_float32():
    cpu = torch.device("cpu")
    blocks = [Block(8, width, 3, size=size) for width, size in [(8, 16), (8, 8), (4, 16)]]
    chosen = {}
    for precision in ("float32", "bfloat16"):
        with autocast(cpu, precision):
            chosen[precision] = [block.mix_on(cpu) for block in blocks]
    assert chosen["float32"] == ["kernels", "outputs", "outputs"]
    assert chosen["bfloat16"] == ["kernels", "outputs", "kernels"]
    assert Block(8, 8, 3).mix_on(torch.device("cuda")) == "outputs"
    assert Block(8, 4, 3, mix="kernels", size=4).mix_on(cpu) == "kernels"


@pytest.mark.parametrize("mix", ["outputs", "kernels"])
@pytest.mark.parametrize("outputs", [8, 32])  # narrow gradients are computed in float32
def test_in_bfloat16_both_forms_stay_close_and_gradients_float32(outputs, mix):
    torch.manual_seed(0)
    block = Block(16, outputs, 3, mix=mix)
    images, results = torch.randn(40, 16, 32, 32, requires_grad=True), []
    for precision in ("float32", "bfloat16"):
        with autocast(torch.device("cpu"), precision):
            output = block(images)
        gradients = torch.autograd.grad((output.float() ** 2).sum(), [images, *block.parameters()])
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append([output.float(), *gradients])
    assert output.dtype == torch.bfloat16
    for exact, rounded in zip(*results):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_costs_fall_with_the_size_of_the_maps():
    options = {"arch": [4, 6], "k": 2, "fc": 1}
    full = costs(build_model(options))
    half = costs(build_model(options | {"downsample": True}))
    gate, kernels = 4 * 2, 2 * 4 * 6 * 9
    assert half[0] == full[0]
    assert 4 * (half[1][2] - gate) == full[1][2] - gate
    assert 4 * (half[1][3] - gate - kernels) == full[1][3] - gate - kernels


def test_costs_count_parameters_and_multiply_accumulates():
    rows = costs(build_model({"arch": [4, 6], "k": 2, "fc": 1}))
    assert [row[0] for row in rows] == ["block1", "block2", "classifier", "total"]
    kernels, biases, gate = 2 * 4 * 6 * 9, 2 * 6, 4 * 2  # of block2
    macs, mixed = 32 * 32 * (kernels + biases) + gate, 32 * 32 * kernels // 2 + kernels + gate
    assert rows[1][1:] == (kernels + biases + gate + 2, macs, mixed)
    assert rows[2][1:] == (6 * 64 * 10 + 10, 6 * 64 * 10, 6 * 64 * 10)
    assert rows[3][1:] == tuple(map(sum, list(zip(*rows[:3]))[1:]))
