"""Train one network of gated multi-convolution blocks: options in, weights and history out.

python train.py --arch 64 128 256 512 --k 3 --epochs 15       # the report's final model
python train.py --arch 16 8 4 --fc 1 --name small             # a small one, for a CPU
python train.py --arch 16 8 4 --fc 1 --name small --resume    # go on where that was interrupted
python train.py --dataset shapes --arch 16 32 --hidden 256    # needs no data set
python train.py --holdout 5000                                # leaves the test images unseen
python train.py --limit 256 --epochs 1                        # try things out

The weights go to runs/NAME.pt, the history to runs/NAME.json after every epoch. A run's figures are
those of its last epoch. On the CPU the same options give the same figures.
"""

import json
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR
from torch.utils.data import TensorDataset

import data
from console import HEADER, Progress, epoch_line, summary
from evaluate import CHECKPOINT_FORMAT, load_checkpoint, predict
from history import hyperparameters, read_history, write_atomically, write_history
from model import autocast, build_model, costs, precision_on
from options import parse_args

SAVE_SECONDS = 60  # from one saved state to the next: the most work that a killed run loses


class Stopped(Exception):
    """A run ended before its last epoch: the reason, and the exit code for it."""

    def __init__(self, reason, code=1):
        super().__init__(reason)
        self.code = code


class Run:
    """A training run: what it computes with, how far it has come, and its history.

    It can stop after any batch and go on from a saved state. All of its randomness is drawn from
    data.stream(seed, epoch, step), so a state holds no random generators.
    """

    def __init__(self, args):
        """Set up the run of these options. OSError and ValueError say why it cannot begin."""
        self.args = args
        self.config = vars(args) | {"out": str(args.out)}
        state = self.previous_state()
        self.device = data.choose_device(args.device)
        self.train_set, self.validation_set = self.load_data()
        self.model = self.make_model()
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.optimizer = self.make_optimizer()
        self.scheduler = (
            CosineAnnealingLR(self.optimizer, args.epochs)
            if args.schedule == "cosine"
            else ConstantLR(self.optimizer, factor=1)
        )
        self.steps = -(-len(self.train_set) // args.batch_size)
        self.step = 0  # of the epoch; the epoch is the number of those in the history
        self.losses = torch.zeros(self.steps, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.history = self.new_history()
        self.began = self.saved = self.checked = time.monotonic()
        self.save_seconds = SAVE_SECONDS
        self.stop_signal = None
        if state:
            self.load_state(state)
        self.history["environment"] = environment(self.model, self.device, args.precision)
        self.progress = Progress(self.epochs_done(), args.epochs, len(self.train_set))

    def path(self, suffix):
        """The file of this run with that suffix."""
        return self.args.out / (self.args.name + suffix)

    def previous_state(self):
        """The saved state to go on from, or None to begin anew; ValueError if NAME is taken."""
        history_path, state_path = self.path(".json"), self.path(".state.pt")
        if self.args.overwrite or not (history_path.exists() or self.path(".pt").exists()):
            return None
        if not self.args.resume:
            raise ValueError(
                f"{self.path('')} exists: go on with it by --resume, replace it by --overwrite, or "
                "give another --name"
            )
        history = read_history(history_path)
        before, now = hyperparameters(history["config"]), hyperparameters(self.config)
        differ = [key for key in now if before.get(key) != now[key]]
        if differ:
            differences = ", ".join(f"{key} {before.get(key)} (now {now[key]})" for key in differ)
            raise ValueError(
                f"{history_path} was made with other options, {differences}: give those, "
                "another --name or --out, or --overwrite"
            )
        if history["finished"]:
            raise Stopped(f"{history_path} is finished: nothing to do", code=0)
        if not state_path.exists():
            print("interrupted before anything was saved: beginning again", file=sys.stderr)
            return None
        return load_checkpoint(state_path)

    def load_data(self):
        """(training, validation) images, on the device."""
        args = self.args
        train = data.load(args.dataset, args.data_dir)
        if args.holdout:
            train, validation = data.hold_out(train, args.holdout)
        else:
            validation = data.load(args.dataset, args.data_dir, train=False)
        if args.limit and args.limit > len(train):
            raise ValueError(f"--limit {args.limit}: there are {len(train)} training images")
        train = TensorDataset(*(tensor[: args.limit] for tensor in train.tensors))
        return (
            TensorDataset(*(tensor.to(self.device) for tensor in dataset.tensors))
            for dataset in (train, validation)
        )

    def make_model(self):
        """The network, initialised from the seed alone, on the device."""
        torch.manual_seed(self.args.seed)
        try:
            model = build_model(self.config).to(self.device)
        except RuntimeError as error:  # out of memory
            reason = str(error).partition("\n")[0]
            raise ValueError(f"no model with --arch {self.args.arch} here: {reason}") from error
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
            model = model.to(memory_format=torch.channels_last)
        return model

    def make_optimizer(self):
        """PyTorch's optimiser, its step fused where that exists."""
        args, device = self.args, self.device
        kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        options = {"weight_decay": args.weight_decay, "momentum": args.momentum}
        options = {name: value for name, value in options.items() if value is not None}
        fused = device.type in ("cpu", "cuda")
        return kinds[args.optimizer](self.model.parameters(), lr=args.lr, fused=fused, **options)

    def new_history(self):
        """The history of a run that has yet to begin."""
        parameters, macs, _ = costs(self.model)[-1][1:]
        return {
            "name": self.args.name,
            "command": shlex.join(["python", *sys.argv]),
            "config": self.config,
            "reported": self.args.reported,
            "parameters": parameters,
            "macs": macs,
            "epochs": [],
            "batch_losses": [],
            "finished": False,
        }

    def epochs_done(self):
        """How many epochs the run has come, the current one counted in part."""
        return len(self.history["epochs"]) + self.step / self.steps

    def fit(self):
        """Train to the last epoch. Stopped: it ended early; OSError: it cannot write."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.write_first_history()
        print(summary(self.model, self.history["environment"]), end="\n\n")
        print(HEADER)
        for epoch in self.history["epochs"]:
            print(epoch_line(epoch, self.args.epochs))
        while len(self.history["epochs"]) < self.args.epochs:
            self.train_epoch()
            self.end_epoch()
        self.save(".pt", {})
        write_history(self.path(".json"), self.history | {"finished": True})
        self.path(".state.pt").unlink(missing_ok=True)

    def write_first_history(self):
        """Claim NAME: what --overwrite replaces goes, so that no file of another run stays."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        write_history(self.path(".json"), self.history)
        if self.args.overwrite:
            for suffix in (".pt", ".state.pt"):
                self.path(suffix).unlink(missing_ok=True)

    def train_epoch(self):
        """Train on the batches of the current epoch that are still to come."""
        args, epoch = self.args, len(self.history["epochs"])
        loader = data.batches(
            self.train_set, args.dataset, args.batch_size, self.device,
            seed=args.seed, epoch=epoch, start=self.step, augment=args.augment,
        )  # fmt: skip
        self.model.train()
        for images, labels in loader:
            torch.manual_seed(data.stream(args.seed, epoch, self.step))  # of dropout
            with autocast(self.device, args.precision):
                logits = self.forward(images)
                loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses[self.step] = loss.detach()
            self.correct += (logits.argmax(1) == labels).sum()
            self.step += 1
            self.after_batch()

    def end_epoch(self):
        """Validate, and add the epoch to the history."""
        losses = torch.tensor(self.losses.tolist(), dtype=torch.float64)  # waits for the device
        self.check(losses)
        train_seconds = time.monotonic() - self.began
        count = len(self.train_set)
        sizes = torch.full((self.steps,), self.args.batch_size)
        sizes[-1] = count - sizes[:-1].sum()
        loader = data.batches(
            self.validation_set, self.args.dataset, data.EVALUATION_BATCH, self.device
        )
        logits, labels = predict(self.forward, loader, self.args.precision, self.after_batch)
        epoch = {
            "epoch": len(self.history["epochs"]) + 1,
            "lr": self.scheduler.get_last_lr()[0],
            "train_loss": ((losses * sizes).sum() / count).item(),
            "train_accuracy": 100 * self.correct.item() / count,
            "val_loss": F.cross_entropy(logits, labels).item(),
            "val_accuracy": 100 * (logits.argmax(1) == labels).sum().item() / len(labels),
            "seconds": time.monotonic() - self.began,
            "images_per_second": count / train_seconds,
        }
        self.scheduler.step()
        self.history["epochs"].append(epoch)
        self.history["batch_losses"] += losses.tolist()
        self.step = 0
        self.correct.zero_()
        self.began = time.monotonic()
        write_history(self.path(".json"), self.history)
        self.progress.clear()
        print(epoch_line(epoch, self.args.epochs), flush=True)

    def after_batch(self):
        """Between two batches, of training or validation: what has to be done from time to time."""
        now = time.monotonic()
        # Reading a loss waits for the device, so on others than the CPU that is done seldom.
        if self.device.type == "cpu" or now - self.checked > 1:
            self.check(self.losses[: self.step])
            self.progress.show(self.epochs_done(), self.step, self.steps)
            self.checked = now
        if self.stop_signal or now - self.saved > self.save_seconds:
            self.save_state()
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            self.progress.clear()
            raise Stopped(f"{name}: go on with {self.resume_command()}", 128 + self.stop_signal)

    def check(self, losses):
        """Stopped if a batch loss is NaN or infinite."""
        wrong = (~losses.isfinite()).nonzero().flatten().tolist()
        if wrong:
            epoch, batch = len(self.history["epochs"]) + 1, wrong[0] + 1
            raise Stopped(
                f"the loss is {losses[wrong[0]].item()} at epoch {epoch}, batch {batch}, "
                f"learning rate {self.scheduler.get_last_lr()[0]:g}: try a lower --lr"
            )

    def on_signal(self, number, frame):
        """Stop after the current batch."""
        self.stop_signal = number

    def resume_command(self):
        """The command that continues this run."""
        options = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        return shlex.join(["python", *options, "--resume"])

    def save(self, suffix, more):
        """Save the weights, and what a checkpoint holds `more` than them."""
        checkpoint = {"format": CHECKPOINT_FORMAT, "config": self.config}
        checkpoint |= {"weights": self.model.state_dict(), **more}
        write_atomically(self.path(suffix), lambda file: torch.save(checkpoint, file))

    def save_state(self):
        """Save all that a resumed run needs."""
        began = time.monotonic()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": json.dumps(self.history),
            "step": self.step,
            "losses": self.losses[: self.step].cpu(),
            "correct": self.correct.item(),
            "seconds": began - self.began,
        }
        self.save(".state.pt", state)
        self.saved = time.monotonic()
        # The state of the report's final model is 1.9 GB: on a slow disk, save it less often.
        self.save_seconds = max(SAVE_SECONDS, 40 * (self.saved - began))

    def load_state(self, state):
        """Go on from what save_state saved."""
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        # A run stopped while it validated steps its scheduler before this process has trained.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        self.history = json.loads(state["history"])
        self.step = state["step"]
        self.losses[: self.step] = state["losses"]
        self.correct.fill_(state["correct"])
        self.began -= state["seconds"]


def environment(model, device, precision):
    """What a run was made with."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": data.describe(device),
        "precision": precision_on(device, precision),
        "mix": [block.mix_on(device) for block in model.backbone],
        "commit": commit or None,
    }


def main(argv=None):
    args = parse_args(__doc__, argv)
    try:
        try:
            run = Run(args)
        except ValueError as error:  # of bad input; a later one is a bug, and shown as one
            raise Stopped(f"error: {error}") from error
        run.fit()
    except Stopped as stopped:
        print(f"train.py: {stopped}", file=sys.stderr)
        sys.exit(stopped.code)
    except OSError as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:  # before the first batch
        sys.exit(130)


if __name__ == "__main__":
    main()
