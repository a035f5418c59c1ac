import math

import pytest
import torch
import torch.nn.functional as F
from test_textbook import textbook_block

from model import Block, build_model, count_macs


@pytest.mark.parametrize("relu", [True, False])
def test_a_block_is_the_textbooks(relu):
    block = Block(5, 7, k=3, relu=relu).double()
    images = torch.randn(4, 5, 16, 16, dtype=torch.double)
    expected = textbook_block(block, relu)(images)
    torch.testing.assert_close(block(images), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "gate, expected",
    [
        ("softmax", [1 / 4, 3 / 4]),
        ("relu", [0.0, 0.0]),
        ("sigmoid", [1 / 4, 1 / 2]),
        ("none", [-math.log(3), 0]),
        ("mean", [1 / 2, 1 / 2]),
    ],
)
def test_a_gate_weights_each_image_by_its_activation(gate, expected):
    (block,) = build_model({"arch": [4], "k": 2, "gate": gate, "fc": 1}).backbone
    block.gate_linear.weight.data.zero_()
    block.gate_linear.bias.data = torch.tensor([-math.log(3), 0])
    coefficients = block.coefficients(torch.randn(6, 3, 32, 32))
    torch.testing.assert_close(coefficients, torch.tensor([expected] * 6))


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


@pytest.mark.parametrize("init", ["he", "default"])
def test_initialisation_is_that_of_k_separate_convolutions(init):
    torch.manual_seed(0)
    model = build_model({"arch": [32, 64], "k": 3, "init": init, "fc": 1})
    convs, linear = model.backbone.block2.convs, model.classifier[-1].weight
    fan_in = 32 * 3 * 3
    variance = {"he": 2, "default": 1 / 3}[init] / (64 * 8 * 8)
    assert linear.std().item() == pytest.approx(math.sqrt(variance), rel=0.02)
    for weight, bias in zip(convs.weight.chunk(3), convs.bias.chunk(3)):
        if init == "he":
            assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
            assert bias.abs().max() == 0
        else:  # uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in)
            assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.01)
            assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)
            assert 0 < bias.abs().max() <= 1 / math.sqrt(fan_in)


def test_batch_normalisation_is_of_the_gated_sum_before_the_relu():
    block = Block(5, 7, k=3, norm="batch").double()
    images = torch.randn(4, 5, 16, 16, dtype=torch.double)
    sums = textbook_block(block, relu=False)(images)
    mean, variance = sums.mean((0, 2, 3)), sums.var((0, 2, 3), unbiased=False)
    normalised = (sums - mean.view(-1, 1, 1)) / (variance + 1e-5).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(block(images), normalised.relu(), atol=1e-10, rtol=0)


def test_a_downsampling_block_takes_the_largest_of_four_sums_before_its_norm():
    block = Block(6, 6, k=2, norm="batch", downsample=True).eval()
    block.norm.weight.data.neg_()  # then the order matters
    block.norm.running_mean += 1
    images = torch.randn(2, 6, 16, 16)
    expected = block.norm(F.max_pool2d(textbook_block(block, relu=False)(images), 2)).relu()
    torch.testing.assert_close(block(images), expected)


def test_the_named_blocks_halve_the_images():
    model = build_model({"arch": [4, 4, 6, 6], "downsample": [2, 4], "fc": 1})
    images, sizes = torch.randn(2, 3, 32, 32), []
    for block in model.backbone:
        images = block(images)
        sizes.append(images.shape[-1])
    assert sizes == [32, 16, 16, 8]
    assert model.backbone.size == 8


@pytest.mark.parametrize("size, cell", [(31, 3), (15, 1)])
def test_after_the_whitening_the_classifier_pools_by_cells(size, cell):
    options = {"arch": [4], "fc": 1, "whiten": True, "downsample": [1] if size == 15 else []}
    pool = build_model(options).classifier[0]
    maps = torch.randn(2, 4, size, size)
    torch.testing.assert_close(pool(maps), F.avg_pool2d(maps, cell))


@pytest.mark.parametrize("halvings, size", [(0, 32), (1, 16), (2, 8), (4, 2), (5, 1)])
def test_the_classifier_pools_maps_of_any_size(halvings, size):
    for pool, grid in (("adaptive", min(8, size)), ("avg", size // min(8, size)), ("max", 1)):
        options = {"arch": [4] * 5, "downsample": list(range(1, halvings + 1)), "fc": 1}
        model = build_model(options | {"pool": pool})
        assert model.classifier[-1].in_features == 4 * grid**2
        maps = torch.randn(2, 4, size, size)
        expected = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
        torch.testing.assert_close(model.classifier[0](maps), expected(maps, grid))
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_logits_are_scaled():
    torch.manual_seed(0)
    model = build_model({"arch": [4], "fc": 1})
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    model.classifier.logit_scale = 0.125
    torch.testing.assert_close(model(images), plain / 8)


def test_multiply_accumulates_are_counted_by_hand():
    kernels, biases, gate = 2 * 4 * 6 * 9, 2 * 6, 4 * 2  # of the second of two blocks
    first = 32 * 32 * (2 * 3 * 4 * 9 + 2 * 4) + 3 * 2
    options = {"arch": [4, 6], "k": 2, "fc": 1}
    second, classifier = 32 * 32 * (kernels + biases) + gate, 6 * 64 * 10
    assert count_macs(build_model(options)) == first + second + classifier
    halved = 16 * 16 * (kernels + biases) + gate
    assert count_macs(build_model(options | {"downsample": [1]})) == first + halved + classifier
    whitened = build_model(options | {"downsample": [1], "whiten": True, "pool": "max"})
    layer = 31 * 31 * 24 * 12
    first = 31 * 31 * (2 * 24 * 4 * 9 + 2 * 4) + 24 * 2
    halved = 15 * 15 * (kernels + biases) + gate
    assert count_macs(whitened) == layer + first + halved + 6 * 10


def test_whitening_gives_uncorrelated_outputs_of_unit_variance_and_their_opposites():
    torch.manual_seed(0)
    x = torch.randn(20, 3, 32, 32).cumsum(3)  # neighbours are alike
    model = build_model({"arch": [4, 4], "whiten": True, "fc": 1})
    model.whitening.fit(x)
    outputs = model.whitening[0](x)
    positive = outputs[:, :12].transpose(0, 1).flatten(1)
    second_moments = positive @ positive.T / positive.shape[1]
    torch.testing.assert_close(second_moments, torch.eye(12), atol=0.03, rtol=0)
    torch.testing.assert_close(outputs[:, 12:], -outputs[:, :12])
    assert torch.equal(model.whitening(x), outputs.relu())


def test_whitening_stays_fixed_and_the_blocks_after_it_learn():
    model = build_model({"arch": [4, 6], "whiten": True, "downsample": [1, 2], "fc": 1})
    assert [block.convs.in_channels for block in model.backbone] == [24, 4]
    assert (model.backbone.in_size, model.backbone.size) == (31, 7)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not any(weights.requires_grad for weights in model.whitening.parameters())
    assert all(weights.grad is not None for weights in model.backbone.parameters())


@pytest.mark.parametrize("inputs, outputs", [(5, 8), (8, 8), (8, 5)])
def test_dirac_adds_the_identity_to_each_set_of_kernels(inputs, outputs):
    kernels = []
    for init in ("default", "dirac"):
        torch.manual_seed(0)
        model = build_model({"arch": [inputs, outputs], "k": 3, "init": init, "fc": 1})
        kernels.append(model.backbone.block2.convs.weight)
    x, passed = torch.randn(2, inputs, 9, 9), min(inputs, outputs)
    for identity in (kernels[1] - kernels[0]).chunk(3):
        y = F.conv2d(x, identity, padding=1)
        torch.testing.assert_close(y[:, :passed], x[:, :passed], atol=1e-5, rtol=0)
        assert y[:, passed:].abs().sum() == 0


@pytest.mark.parametrize("gate", ["softmax", "mean"])
def test_one_set_of_kernels_without_a_choice_is_a_plain_convolution(gate):
    block = Block(5, 7, k=1, gate=gate)
    x = torch.randn(4, 5, 16, 16)
    assert torch.equal(block(x), block.convs(x).relu())
    torch.testing.assert_close(block(x), textbook_block(block)(x))
    assert block.coefficients(x) is None
    block(x).sum().backward()
    assert block.gate_linear.weight.grad is None  # several processes would wait for it


def test_one_set_of_kernels_is_weighted_by_a_gate_that_is_not_always_1():
    block = Block(5, 7, k=1, gate="sigmoid")
    x = torch.randn(4, 5, 16, 16)
    weight = block.gate_linear(x.mean((2, 3))).sigmoid()[..., None, None]
    torch.testing.assert_close(block(x), (weight * block.convs(x)).relu())
