"""One training run that survives interruption: saved, restored, stopped; what it prints.

train.py shows how it is used. All randomness of a run is drawn from (seed, epoch, step), so a saved
state holds no generators and a run may stop after any batch.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings

import torch
import torch.nn.functional as F

from checkpoint import find_run, write_checkpoint
from device import RANK, WORLD_SIZE, add_up, agree, leave, wait
from history import HEADER, format_epoch, format_seconds, write_history

SAVE_SECONDS = 60  # from one saved state to the next, or 40 times what saving takes
LOOK_EVERY = 16  # batches, where reading a loss makes the CPU wait for the device


class Stop(Exception):
    """A run ends before its last epoch: `args` are the reason and the exit code for it."""


class Run:
    """How far a run has come, its history, and its files runs/NAME.json, .pt and .state.pt.
    `epoch` and `step` count those that are done; `sizes` are the images of each batch of an epoch.
    Of several processes the first alone writes files."""

    def __init__(self, args):
        """Find the run of these options: ValueError as find_run says; Stop if nothing is to do."""
        self.args, self.config = args, vars(args) | {"out": str(args.out)}
        self.step, self.lr, self.signal, self.save_seconds = 0, None, 0, SAVE_SECONDS
        self.history, self.saved = find_run(args.out, self.config)
        # On whatever CPU, a run goes on in the precision that it began in.
        began = json.loads((self.saved or {}).get("history", "{}")).get("environment", {})
        self.precision = began.get("precision", args.precision)
        if self.history and args.reported is None:
            args.reported = self.config["reported"] = self.history["reported"]
        if self.history and self.history["finished"] and not self.saved:
            if args.schedule != "none":
                self._remove(".state.pt")  # a kill may have left it
            # ablations.sh may have copied it from another row.
            self.history |= {"name": args.name, "reported": args.reported}
            self._write_history()
            raise Stop(f"{self.path('.json')} is finished: nothing to do", 0)

    def path(self, suffix):
        """The file of this run with that suffix."""
        return self.args.out / (self.args.name + suffix)

    @property
    def epoch(self):
        """How many epochs are done."""
        return len(self.history["epochs"])

    def start(self, parts, facts, images, device):
        """Bring the parts, things with a state_dict, to where they were saved; begin the files. The
        part "weights" is the model; a part may be None. `facts` go into the history; `images` are
        how many an epoch has. ValueError if what was saved does not fit the parts."""
        batch = self.args.batch_size
        self.sizes = [min(batch, images - first) for first in range(0, images, batch)]
        self.device, self.parts = device, parts
        self.metrics = torch.zeros(len(self.sizes), 2, device=device)  # loss, right predictions
        self.began = self.trained_at = self.saved_at = time.monotonic()
        head = {"name": self.args.name, "command": format_command(), "config": self.config}
        head |= {"reported": self.args.reported} | facts
        if self.saved:
            self._restore(head)
        else:
            if self.history:
                say("there is no saved state: beginning again")
            self.history = head | {"epochs": [], "batch_losses": [], "finished": False}
        self.progress = Progress(self.epochs_done(), self.args.epochs, images)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        wait()  # until all processes have read what is there of the run
        if self.args.overwrite:  # weights before history, so that no kill leaves files of two runs
            self._remove(".state.pt", ".pt")
        self._write_history()
        say("\n" + HEADER)
        for epoch in self.history["epochs"]:
            say(format_epoch(epoch, self.args.epochs))

    def _restore(self, head):
        saved = self.saved
        try:
            for name, part in self.parts.items():
                if part is not None:
                    part.load_state_dict(saved[name])
            self.history = json.loads(saved["history"]) | head | {"finished": False}
            self.step, self.lr = len(saved["metrics"]), saved["lr"]
            self.metrics[: self.step] = saved["metrics"]
            self.began -= saved["seconds"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.path('.state.pt')} is of another run ({reason})") from error
        self.saved = None  # its memory is needed
        # A resumed run steps its scheduler before this process has trained.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    def epochs_done(self):
        """How many epochs are done, the current one counted in part."""
        return self.epoch + self.step / len(self.sizes)

    def after_batch(self, loss, correct, lr):
        """Note a batch's loss, right predictions and learning rate; save or stop if it is time to.
        `loss` and `correct` are tensors of one number, of this process's share of the batch.
        Raises Stop if the loss is NaN or infinite, or a signal came."""
        self.metrics[self.step] = add_up(torch.stack([loss.detach(), correct]))
        self.step, self.lr = self.step + 1, lr
        if self.device.type == "cpu" or self.step % LOOK_EVERY == 0 or self.step == len(self.sizes):
            losses = self.metrics[: self.step, 0]
            wrong = (~losses.isfinite()).nonzero().flatten().tolist()
            if wrong:
                loss, batch = losses[wrong[0]].item(), wrong[0] + 1
                self._stop_at(f"the loss is {loss} at epoch {self.epoch + 1}, batch {batch}")
            self.trained_at = time.monotonic()
            self.progress.show(self.epochs_done(), self.step, len(self.sizes))
            self._save_or_stop()

    def save_between(self, batches):
        """The batches of a validation: after each of them the run may be saved or stopped."""
        for batch in batches:
            yield batch
            self._save_or_stop()

    def after_epoch(self, logits, labels):
        """Add an epoch's metrics to the history, write it, print their line.
        logits (N, 10) and labels (N,) are of this process's share of the validation images."""
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        sums = torch.stack([loss, correct, torch.full_like(loss, len(labels))])
        val_loss, val_correct, val_images = add_up(sums).tolist()
        if not math.isfinite(val_loss):
            self._stop_at(f"the validation loss is {val_loss} after epoch {self.epoch + 1}")
        losses, right = self.metrics.T.tolist()
        images, now = sum(self.sizes), time.monotonic()
        epoch = {"epoch": self.epoch + 1, "lr": self.lr,
                 "train_loss": sum(loss * size for loss, size in zip(losses, self.sizes)) / images,
                 "train_accuracy": 100 * sum(right) / images,
                 "val_loss": val_loss / val_images, "val_accuracy": 100 * val_correct / val_images,
                 "seconds": now - self.began,
                 "images_per_second": images / (self.trained_at - self.began)}  # fmt: skip
        self.history["epochs"].append(epoch)
        self.history["batch_losses"] += losses
        self.step, self.began = 0, now
        self._write_history()
        self.progress.clear()
        say(format_epoch(epoch, self.args.epochs))

    def finish(self, model):
        """Write the weights of a model, mark the history as finished, remove the saved state.
        A run without a schedule keeps a state, since it may be given more epochs."""
        if RANK == 0:
            try:
                more = {"precision": self.history["environment"]["precision"]}
                write_checkpoint(self.path(".pt"), self.config, model.state_dict(), **more)
            except OSError as error:
                reason = f"no weights written ({error}); {self._say_how_to_go_on()}"
                raise Stop(reason, 1) from error
            if self.args.schedule == "none":
                self._save()
        self.history["finished"] = True
        self._write_history()
        if self.args.schedule != "none":
            self._remove(".state.pt")
        leave()

    def _write_history(self):
        if RANK == 0:
            write_history(self.path(".json"), self.history)

    def _remove(self, *suffixes):
        for suffix in suffixes if RANK == 0 else ():
            self.path(suffix).unlink(missing_ok=True)

    def _on_signal(self, number, frame):
        self.signal = number

    def _save_or_stop(self):
        """Save the state if it is time to; if a signal came, to whichever process, stop."""
        number = agree(self.signal, self.device)  # later ones wait for the next batch
        if not number and time.monotonic() - self.saved_at < self.save_seconds:
            return
        began = time.monotonic()
        saved = self._save()
        self.saved_at = time.monotonic()
        # The state of the report's final model is 1.9 GB: where disks are slow, save it seldom.
        self.save_seconds = max(SAVE_SECONDS, 40 * (self.saved_at - began))
        if number:
            self.progress.clear()
            lost = "" if saved else "nothing could be saved now; "
            name = signal.Signals(number).name
            raise Stop(f"{name}: {lost}{self._say_how_to_go_on()}", 128 + number)

    def _save(self):
        """Save what the run needs to go on, if this is the first process; whether it was possible.
        Weights that are not finite are not saved: the last good state stays."""
        if RANK > 0:
            return True
        parts = {name: part and part.state_dict() for name, part in self.parts.items()}
        if not all(weights.isfinite().all() for weights in parts["weights"].values()):
            return False
        try:
            write_checkpoint(self.path(".state.pt"), self.config, **parts,
                             history=json.dumps(self.history), lr=self.lr,
                             metrics=self.metrics[: self.step].cpu(),
                             seconds=time.monotonic() - self.began)  # fmt: skip
        except OSError as error:
            self.progress.clear()
            print(f"train.py: warning: the state is not saved: {error}", file=sys.stderr)
            return False
        return True

    def _stop_at(self, what):
        self.progress.clear()
        raise Stop(f"{what}, learning rate {self.lr:g}: try a lower --lr", 1)

    def _say_how_to_go_on(self):
        words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        return f"go on with {format_command([*words, '--resume'])}"


def format_command(words=None):
    """The command line of this process (or of other words), as it is typed."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["torchrun", f"--nproc-per-node={processes}"] if WORLD_SIZE > 1 else ["python"]
    return shlex.join([*launcher, *(words or sys.argv)])


def say(text):
    """Print, if this is the first process."""
    if RANK == 0:
        print(text, flush=True)


@contextlib.contextmanager
def first_process_first():
    """What the first process does here, the others do after it."""
    if RANK > 0:
        wait()
    yield
    if RANK == 0:
        wait()


class Progress:
    """One line on the terminal, rewritten; nothing where stderr is a log or a pipe. It counts
    epochs, the current one in part: `start` is where this process began, `end` the whole run."""

    def __init__(self, start, end, images_per_epoch):
        self.start, self.end, self.images_per_epoch = start, end, images_per_epoch
        self.began = time.monotonic()
        self.on_terminal = RANK == 0 and sys.stderr is not None and sys.stderr.isatty()

    def show(self, done, step, steps):
        """Show how far the epoch is, how fast it goes and how long the whole run still takes."""
        if self.on_terminal and done > self.start:
            speed = (done - self.start) / (time.monotonic() - self.began)  # epochs per second
            rate, left = self.images_per_epoch * speed, format_seconds((self.end - done) / speed)
            line = f"{math.ceil(done):>3}/{self.end}  batch {step}/{steps}  {rate:,.0f} images/s"
            print(f"\r{f'{line}  {left} left':<78}", end="", file=sys.stderr, flush=True)

    def clear(self):
        """Make room for a line that stays."""
        if self.on_terminal:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)
