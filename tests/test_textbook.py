"""textbook.py is the report, and what model.py and train.py are held to."""

import re
from itertools import count

import pytest
import torch
from conftest import CIFAR10, ROOT, needs_cifar10
from torch import nn
from torchvision.datasets import FakeData

import textbook
import train
from data import load
from model import build_model

TEXT = (ROOT / "ablations.sh").read_text()
SIMPLE = re.search('^simple="(.*?)"', TEXT, re.M)[1]
ROWS = dict(re.findall(r'^ +"(row\d|final) --reported [\d. ]+(.*)"', TEXT, re.M))
ROWS = {name: row.replace("$simple", SIMPLE) for name, row in ROWS.items()}


def as_textbook(tensors, k):
    """Weights or gradients of a block or network of ours, {name: tensor}, as textbook.py has them:
    there each of the k convolutions is a layer of its own."""
    split = {}
    for name, tensor in tensors.items():
        parts = tensor.chunk(k) if "convs." in name else [tensor]
        for number, part in enumerate(parts):
            split[name.replace("convs.", f"convs.{number}.")] = part
    return split


def textbook_block(block, relu=True):
    """The textbook's block with the weights of one of ours."""
    k, weight = block.gate_linear.out_features, block.convs.weight
    copy = textbook.Block(weight.shape[1], len(weight) // k, k, relu).to(weight.dtype)
    weights = as_textbook(block.state_dict(), k)
    copy.load_state_dict({name: weights[name] for name in copy.state_dict()})
    return copy


def textbook_model(model, args):
    """The textbook's network with the weights of one of ours."""
    copy = textbook.build_model(args).to(next(model.parameters()).dtype)
    copy.load_state_dict(as_textbook(model.state_dict(), args.k))
    return copy


def gradients(network):
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def parse_row(row, options=""):
    """The options of a row, narrower, as textbook.py reads them."""
    args = textbook.parse_args(f"{ROWS[row]} --hidden 24 --device cpu {options}".split())
    args.arch = [8, 4, 9, 3][: len(args.arch)]
    return args


def test_the_rows_that_it_can_train_are_1_to_5_and_final():
    assert list(ROWS) == ["row1", "row2", "row3", "row4", "row5", "final"]


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_options_mean_what_they_mean_to_train_py(options):
    ours, textbooks = (
        {name: str(value) for name, value in vars(parse(options.split())).items()}
        for parse in (train.parse_args, textbook.parse_args)
    )
    assert textbooks.items() <= ours.items()


@pytest.mark.parametrize("row", ROWS)
def test_networks_are_equal_in_logits_and_gradients(row):
    args = parse_row(row)
    ours = build_model(vars(args)).double()
    networks = ours, textbook_model(ours, args)
    x, labels = torch.randn(2, 3, 32, 32, dtype=torch.double), torch.arange(2)
    logits = []
    for network in networks:
        torch.manual_seed(0)  # the same units drop out
        logits.append(network(x))
        nn.functional.cross_entropy(logits[-1], labels).backward()
    torch.testing.assert_close(*logits, atol=1e-10, rtol=0)
    expected = gradients(networks[1])
    torch.testing.assert_close(as_textbook(gradients(ours), args.k), expected, atol=1e-10, rtol=0)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


@pytest.mark.parametrize("init", ["he", "default"])
def test_weights_start_as_wide_as_ours(init):
    args = textbook.parse_args(f"--arch 32 64 --hidden 64 --init {init}".split())
    ours = as_textbook(build_model(vars(args)).state_dict(), args.k)
    textbooks = textbook.build_model(args).state_dict()
    assert ours.keys() == textbooks.keys()
    for name in ours:
        if ours[name].numel() > 500:
            assert ours[name].std().item() == pytest.approx(textbooks[name].std().item(), rel=0.1)
        assert ours[name].any() == textbooks[name].any()  # He's biases are 0


def test_coefficients_are_those_of_the_reports_8x8_grid():
    block = textbook.Block(5, 2, k=2, relu=False)
    for conv, bias in zip(block.convs, torch.eye(2)):
        conv.weight.data.zero_()
        conv.bias.data = bias  # so that channel i is a_i
    x = torch.randn(3, 5, 32, 32)
    grid = nn.AdaptiveAvgPool2d(8)(x).permute(0, 2, 3, 1)
    coefficients = block.gate_linear(grid).mean(dim=(1, 2)).softmax(dim=1)
    torch.testing.assert_close(block(x), coefficients[..., None, None].expand(3, 2, 32, 32))


def test_steps_are_equal_in_all_weights_and_follow_the_schedule():
    args = parse_row("final", "--epochs 3 --dropout 0 --lr 0.01")
    ours = build_model(vars(args)).double()
    textbooks = textbook_model(ours, args)
    x, labels = torch.randn(8, 3, 32, 32, dtype=torch.double), torch.arange(8)
    textbook.train(textbooks, [(x, labels)], [(x, labels)], args)

    args = train.parse_args("--epochs 3 --lr 0.01".split())
    optimizer = train.make_optimizer(ours, args)
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(args, epoch, 0, 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(ours(x), labels).backward()
        optimizer.step()
    weights = as_textbook(ours.state_dict(), 3)
    torch.testing.assert_close(weights, dict(textbooks.state_dict()), atol=1e-8, rtol=0)


def test_a_run_of_train_py_has_the_textbooks_losses_and_accuracies(run):
    options = "--arch 4 8 --k 2 --hidden 8 --batch-size 32 --dropout 0 --epochs 3"
    ours = run(options)["epochs"]

    config = f"--dataset shapes --limit 100 --precision float32 {options}".split()
    args, device = train.parse_args(config), torch.device("cpu")
    train_set, test_set = load("shapes")[:100], load("shapes", train=False)
    model = textbook_model(train.make_model(args, train_set, device, "float32"), args)

    class Batches:  # a loader that shuffles as ours does
        epochs = count()

        def __iter__(self):
            return train_set.batches(32, seed=0, epoch=next(self.epochs))

    args.device = "cpu"
    history = textbook.train(model, Batches(), list(test_set.batches()), args)
    for name, values in history.items():
        near = 1 if "accuracy" in name else 1e-3  # rounding may decide an image of the 100
        assert [epoch[name] for epoch in ours] == pytest.approx(values, abs=near)


def test_it_trains_and_prints_a_line_per_epoch_and_the_test_accuracy(monkeypatch, capsys):
    def fake(data_dir, train, transform, download):
        return FakeData(20 if train else 10, (3, 32, 32), transform=transform)

    monkeypatch.setattr(textbook, "CIFAR10", fake)
    textbook.main("--arch 4 4 --hidden 8 --batch-size 8 --epochs 2 --device cpu".split())
    first, second, last = capsys.readouterr().out.splitlines()
    figures = r"train loss \d\.\d{4}, \d+\.\d\d %; validation loss \d\.\d{4}, (\d+\.\d\d) %"
    assert re.fullmatch(f"epoch 1/2: {figures}", first)
    accuracy = re.fullmatch(f"epoch 2/2: {figures}", second)[1]
    assert last == f"Final Model Test Accuracy: {accuracy}%"


@needs_cifar10
def test_its_images_are_ours_and_training_images_are_shuffled_every_epoch():
    train_loader, test_loader = textbook.load_data(CIFAR10, 50)
    ours = next(load("cifar10", CIFAR10, train=False).batches(50))
    torch.testing.assert_close(tuple(next(iter(test_loader))), ours)
    epochs = [next(iter(train_loader))[1].tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_a_missing_data_set_is_a_line(refused, tmp_path):
    line = refused(textbook.main, ["--data-dir", str(tmp_path)])
    assert line == "textbook.py: error: CIFAR-10: no network in tests"


def test_it_needs_nothing_but_torch_and_torchvision():
    modules = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / "textbook.py").read_text(), re.M)
    assert set(modules) == {"argparse", "sys", "torch", "torchvision"}
