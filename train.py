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

import contextlib
import math
import shlex
import signal
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import data
import parallel
import state
from console import HEADER, Progress, environment, epoch_line, summary
from device import autocast, choose_device
from evaluate import predict, write_checkpoint
from history import write_history
from model import build_model, costs
from optimisation import make_average, make_optimizer, make_scheduler
from options import parse_args

SAVE_SECONDS = 60  # from one saved state to the next: the most work that a killed run loses
LOOK_EVERY = 16  # batches, where reading a figure makes the CPU wait for the device


class Stopped(Exception):
    """A run ended before its last epoch: the reason, and the exit code for it."""

    def __init__(self, reason, code=1):
        super().__init__(reason)
        self.code = code


class Run:
    """A training run: what it computes with, how far it has come, and its history.

    It can stop after any batch and go on from a saved state. All of its randomness is drawn from
    data.stream(seed, epoch, step), so a state holds no random generators. Where there are several
    processes each computes its share of every batch, and the first alone writes.
    """

    def __init__(self, args):
        """Set up the run of these options. OSError and ValueError say why it cannot begin."""
        self.args = args
        self.config = vars(args) | {"out": str(args.out)}
        history, saved = state.find(args.out, self.config)
        if history and history["finished"] and len(history["epochs"]) == args.epochs:
            raise Stopped(f"{self.path('.json')} is finished: nothing to do", code=0)
        self.device = choose_device(args.device)
        parallel.join(self.device)
        with parallel.first_process_first():  # it may have to download
            self.train_set, self.validation_set = self.load_data()
        self.model = self.make_model()
        self.forward = parallel.averaging(self.model)
        if args.compile:
            self.forward = torch.compile(self.forward)
        self.sizes = [
            len(part) for part in torch.arange(len(self.train_set)).split(args.batch_size)
        ]
        self.steps = len(self.sizes)
        self.optimizer = make_optimizer(self.model, args)
        self.scheduler = make_scheduler(self.optimizer, args, self.steps)
        self.average = make_average(self.model, args)
        self.step = 0  # of the epoch; the epoch is the number of those in the history
        # Of each batch of the epoch: its loss, how many images were right, whether a signal came.
        self.figures = torch.zeros(self.steps, 3, device=self.device)
        self.history = self.new_history()
        self.began = self.saved = time.monotonic()
        self.save_seconds = SAVE_SECONDS
        self.stop_signal = None
        if saved:
            state.load(self, saved)
        elif history:
            print("interrupted before anything was saved: beginning again", file=sys.stderr)
        self.progress = Progress(self.epochs_done(), args.epochs, len(self.train_set))

    def path(self, suffix):
        """The file of this run with that suffix."""
        return self.args.out / (self.args.name + suffix)

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

    def new_history(self):
        """The history of a run that has yet to begin."""
        parameters, macs, _ = costs(self.model)[-1][1:]
        return {
            "name": self.args.name,
            "command": shlex.join(["python", *sys.argv]),
            "config": self.config,
            "reported": self.args.reported,
            "environment": environment(self.model, self.device, self.args.precision),
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
        parallel.wait()  # until all have read what is there of the run
        self.write_first_history()
        self.say(summary(self.model, self.history["environment"]) + "\n\n" + HEADER)
        for epoch in self.history["epochs"]:
            self.say(epoch_line(epoch, self.args.epochs))
        while len(self.history["epochs"]) < self.args.epochs:
            self.train_epoch()
            self.end_epoch()
        self.finish()

    def say(self, text):
        """Print, if this is the first process."""
        if parallel.RANK == 0:
            print(text, flush=True)

    def write_history(self):
        """Write the history, if this is the first process."""
        if parallel.RANK == 0:
            write_history(self.path(".json"), self.history)

    def write_first_history(self):
        """Begin the files: what --overwrite replaces goes, so that no file of another run stays."""
        self.write_history()
        if self.args.overwrite and parallel.RANK == 0:
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
            self.step_schedule()
            torch.manual_seed(data.stream(args.seed, epoch, self.step, parallel.RANK))  # of dropout
            with autocast(self.device, args.precision):
                logits = self.forward(images)
                loss = F.cross_entropy(
                    logits, labels, reduction="sum", label_smoothing=args.label_smoothing
                )
                loss = loss / self.sizes[self.step]
            self.optimizer.zero_grad()
            (loss * parallel.WORLD_SIZE).backward()  # the processes average their gradients
            self.optimizer.step()
            if self.average:
                self.average.update_parameters(self.model)
            correct = (logits.argmax(1) == labels).sum()
            stop = torch.full_like(loss, bool(self.stop_signal))
            figures = torch.stack([loss.detach(), correct, stop])
            self.figures[self.step] = parallel.summed(figures)
            self.step += 1
            self.after_batch()

    def step_schedule(self):
        """Go on to the learning rate of the batch that comes, or of the epoch that begins."""
        first_of_run = self.step == 0 and not self.history["epochs"]
        if not first_of_run and (self.step == 0 or self.args.schedule == "onecycle"):
            self.scheduler.step()

    def end_epoch(self):
        """Validate, and add the epoch to the history."""
        self.check()
        losses, correct, _ = self.figures.T.tolist()
        train_seconds = time.monotonic() - self.began
        val_loss, val_correct = self.validate()
        count = len(self.train_set)
        epoch = {
            "epoch": len(self.history["epochs"]) + 1,
            "lr": self.scheduler.get_last_lr()[0],
            "train_loss": sum(loss * size for loss, size in zip(losses, self.sizes)) / count,
            "train_accuracy": 100 * sum(correct) / count,
            "val_loss": val_loss / len(self.validation_set),
            "val_accuracy": 100 * val_correct / len(self.validation_set),
            "seconds": time.monotonic() - self.began,
            "images_per_second": count / train_seconds,
        }
        self.history["epochs"].append(epoch)
        self.history["batch_losses"] += losses
        self.step = 0
        self.began = time.monotonic()
        self.write_history()
        self.progress.clear()
        self.say(epoch_line(epoch, self.args.epochs))

    def validate(self):
        """(the sum of the losses, the number of right predictions) on the validation images."""
        loader = data.batches(
            self.validation_set, self.args.dataset, data.EVALUATION_BATCH, self.device
        )
        model = self.average or self.forward
        logits, labels = predict(model, loader, self.args.precision, self.stop_if_asked)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        loss, correct = parallel.summed(torch.stack([loss, correct])).tolist()
        if not math.isfinite(loss):
            raise Stopped(
                f"the validation loss is {loss} after epoch {len(self.history['epochs']) + 1}, "
                f"learning rate {self.scheduler.get_last_lr()[0]:g}: try a lower --lr"
            )
        return loss, correct

    def after_batch(self):
        """Between two training batches: what has to be done from time to time."""
        if self.device.type == "cpu" or self.step % LOOK_EVERY == 0:
            self.check()
            self.progress.show(self.epochs_done(), self.step, self.steps)
            if self.figures[self.step - 1, 2] and not self.stop_signal:
                self.stop_signal = signal.SIGTERM  # came to another process
            self.stop_if_asked()

    def stop_if_asked(self):
        """Save the state if it is time to, and stop if a signal came."""
        if not self.stop_signal and time.monotonic() - self.saved < self.save_seconds:
            return
        began = time.monotonic()
        saved = state.save(self)
        self.saved = time.monotonic()
        # The state of the report's final model is 1.9 GB: where disks are slow, save it seldom.
        self.save_seconds = max(SAVE_SECONDS, 40 * (self.saved - began))
        if self.stop_signal:
            self.progress.clear()
            name = signal.Signals(self.stop_signal).name
            lost = "" if saved else "nothing could be saved now; "
            raise Stopped(f"{name}: {lost}{self.how_to_go_on()}", 128 + self.stop_signal)

    def check(self):
        """Stopped if the loss of a batch is NaN or infinite."""
        losses = self.figures[: self.step, 0]
        wrong = (~losses.isfinite()).nonzero().flatten().tolist()
        if wrong:
            loss, epoch = losses[wrong[0]].item(), len(self.history["epochs"]) + 1
            raise Stopped(
                f"the loss is {loss} at epoch {epoch}, batch {wrong[0] + 1}, learning rate "
                f"{self.scheduler.get_last_lr()[0]:g}: try a lower --lr"
            )

    def finish(self):
        """Write the weights, and mark the history as finished."""
        if parallel.RANK == 0:
            try:
                model = self.average.module if self.average else self.model
                write_checkpoint(self.path(".pt"), self.config, model)
            except OSError as error:
                raise Stopped(f"no weights written ({error}); {self.how_to_go_on()}") from error
            self.history["finished"] = True
            if self.args.schedule == "none":  # the run may be given more epochs
                state.save(self)
            else:
                self.path(".state.pt").unlink(missing_ok=True)
            self.write_history()
        parallel.leave()

    def on_signal(self, number, frame):
        """Stop after the current batch."""
        self.stop_signal = number

    def how_to_go_on(self):
        """The command that continues this run."""
        options = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        return f"go on with {shlex.join(['python', *options, '--resume'])}"


def main(argv=None):
    """Train the run that the options say; it ends in a line and an exit code where it fails."""
    args = parse_args(__doc__, argv)
    try:
        with contextlib.ExitStack() as until_done:
            try:
                if parallel.RANK == 0:
                    until_done.enter_context(state.claimed(args.out, args.name))
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
