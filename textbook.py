"""The report in one file: CIFAR-10 classified by blocks of k gated convolutions.

python textbook.py --arch 16 8 4 --fc 1 --init default --schedule none --epochs 30    # its row 4
python textbook.py                       # its final model: days on two CPU cores

From top to bottom: data, block, backbone, classifier, loss and optimiser, training, metrics. Where
the report leaves something open, a comment that begins with "Open:" says how it is read here.

train.py trains the same networks, which the tests hold equal to these, and adds what daily use asks
for: speed (a cheaper form of the sum, bfloat16, several processes), runs that go on where they were
stopped, saved weights and curves, augmentation, images held out of training for validation.
"""

import argparse
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10


def load_data(data_dir, batch_size):
    """Return loaders of the 50,000 training images, shuffled, and of the 10,000 test images."""
    # Open: normalisation. By mean and standard deviation of each channel of the training images.
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    # Open: augmentation. None.
    train_set = CIFAR10(data_dir, train=True, transform=transform, download=True)
    test_set = CIFAR10(data_dir, train=False, transform=transform, download=True)
    return DataLoader(train_set, batch_size, shuffle=True), DataLoader(test_set, batch_size)


class Block(nn.Module):
    """k convolutions o_1 ... o_k of the same input X, weighted by coefficients computed from X:
    a = softmax(SpatialAveragePool(X) W), output = ReLU(a_1 o_1 + ... + a_k o_k)."""

    def __init__(self, in_channels, out_channels, k, relu=True):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1) for _ in range(k)
        )
        self.gate_linear = nn.Linear(in_channels, k)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):  # (N, in_channels, 32, 32)
        # Open: the report's code pools to 8x8, its formula to one number. As the layer is linear,
        # the mean of its 8x8 outputs is its output for the mean of the image.
        pooled = x.mean(dim=(2, 3))  # (N, in_channels)
        # Open: the dim of the softmax. The k coefficients, so that those of an image sum to one.
        a = self.gate_linear(pooled).softmax(dim=1)  # (N, k)
        y = sum(a[:, i].view(-1, 1, 1, 1) * conv(x) for i, conv in enumerate(self.convs))
        return self.activation(y)  # (N, out_channels, 32, 32)


class Backbone(nn.Sequential):
    """A block per entry of `arch`, its output channels: (N, 3, 32, 32) -> (N, arch[-1], 32, 32)."""

    def __init__(self, arch, k, relu):
        super().__init__()
        in_channels = 3
        for number, out_channels in enumerate(arch, start=1):
            self.add_module(f"block{number}", Block(in_channels, out_channels, k, relu))
            in_channels = out_channels


class Classifier(nn.Sequential):
    """Pool, flatten, `fc` linear layers: (N, in_channels, 32, 32) -> logits (N, 10)."""

    def __init__(self, in_channels, pool, fc, hidden, dropout):
        # Open: the sizes of "AdaptivePool2D" and, in row 1, "AvgPool2D". To an 8x8 grid, and by
        # 8x8 to a 4x4 grid: a global pool would leave row 4 four numbers for ten classes.
        layer, size = {"adaptive": (nn.AdaptiveAvgPool2d(8), 8), "avg": (nn.AvgPool2d(8), 4)}[pool]
        super().__init__(layer, nn.Flatten())
        features = in_channels * size * size
        for _ in range(fc - 1):
            self.extend([nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout)])
            features = hidden
        self.append(nn.Linear(features, 10))


def build_model(args):
    """Return the network of the options: images (N, 3, 32, 32) -> logits (N, 10)."""
    model = nn.Sequential()
    model.add_module("backbone", Backbone(args.arch, args.k, args.block_relu))
    classifier = Classifier(args.arch[-1], args.pool, args.fc, args.hidden, args.dropout)
    model.add_module("classifier", classifier)
    if args.init == "he":  # Open: initialisation of rows 1 to 5. PyTorch's default.
        model.apply(initialise_he)
    return model


def initialise_he(layer):
    """Initialise a convolution or linear layer as He et al. (2015) do."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


def train(model, train_loader, test_loader, args):
    """Train the model and validate it after each epoch; print and return the metrics of each."""
    criterion = nn.CrossEntropyLoss()
    # SGD stayed at 10 % in the report, Adam was better, AdamW best.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    # Open: the kind of schedule. Cosine over the whole run, a step an epoch.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    history = {"train_loss": [], "train_accuracy": [], "val_loss": [], "val_accuracy": []}
    for epoch in range(1, args.epochs + 1):
        train_loss, train_acc = run_epoch(model, train_loader, criterion, args.device, optimizer)
        val_loss, val_acc = run_epoch(model, test_loader, criterion, args.device)
        if args.schedule == "cosine":
            scheduler.step()
        history["train_loss"].append(train_loss)
        history["train_accuracy"].append(train_acc)
        history["val_loss"].append(val_loss)
        history["val_accuracy"].append(val_acc)
        trained = f"train loss {train_loss:.4f}, {train_acc:.2f} %"
        validated = f"validation loss {val_loss:.4f}, {val_acc:.2f} %"
        print(f"epoch {epoch}/{args.epochs}: {trained}; {validated}", flush=True)
    return history


def run_epoch(model, loader, criterion, device, optimizer=None):
    """Show every batch to the model once, and train it on each if there is an optimizer. Return
    the mean loss and the accuracy (%) of the images."""
    training = optimizer is not None
    model.train(training)  # dropout, too, is for training only
    total_loss = correct = images = 0
    with torch.set_grad_enabled(training):
        for x, labels in loader:
            x, labels = x.to(device), labels.to(device)
            logits = model(x)
            loss = criterion(logits, labels)  # the mean of the batch
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total_loss += loss.item() * len(labels)  # the last batch may be smaller
            correct += (logits.argmax(dim=1) == labels).sum().item()
            images += len(labels)
    return total_loss / images, 100 * correct / images


def parse_args(argv=None):
    """Return the options; their defaults are the report's final model."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add("--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to")
    # Open: the batch size. 128 is usual.
    add("--batch-size", type=int, default=128, help="images of a step")
    add("--arch", type=int, nargs="+", default=[64, 128, 256, 512], help="channels of each block")
    add("--k", type=int, default=3, help="convolutions of a block")
    add("--block-relu", action=on_off, default=True, help="ReLU on the blocks' outputs")
    add("--pool", choices=("adaptive", "avg"), default="adaptive", help="of the classifier")
    # Open: the classifier of rows 2, 3 and 5. Row 2: one layer, as in row 1; rows 3 and 5: three,
    # as in the final model.
    add("--fc", type=int, default=3, help="number of linear layers")
    add("--hidden", type=int, default=4096, help="units of each hidden one")
    add("--dropout", type=float, default=0.5, help="probability, after each hidden one")
    add("--init", choices=("he", "default"), default="he", help="He's, or PyTorch's default")
    add("--lr", type=float, default=0.001, help="learning rate")
    add("--schedule", choices=("cosine", "none"), default="cosine", help="of the learning rate")
    add("--epochs", type=int, default=15, help="passes over the training images")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", default="auto", help="cpu, cuda ...; auto: cuda if there is one")
    return parser.parse_args(argv)


def main(argv=None):
    """Train the network of the options, and print its test accuracy."""
    args = parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    try:
        train_loader, test_loader = load_data(args.data_dir, args.batch_size)
    except (OSError, RuntimeError) as error:  # neither there nor to be downloaded
        sys.exit(f"textbook.py: error: CIFAR-10: {error}")
    model = build_model(args).to(args.device)
    history = train(model, train_loader, test_loader, args)
    # Open: the epoch that counts. The last; validation was on the test images, as in the report.
    print(f"Final Model Test Accuracy: {history['val_accuracy'][-1]:.2f}%")


if __name__ == "__main__":
    main()
