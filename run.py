"""One training run that survives interruption: its name claimed, saved, restored, stopped.

    with claim(args.out, args.name):
        saved = find_checkpoint(args)
        run = Run(args, command, saved, ...)         # train.py shows the rest

runs/NAME.pt is the whole truth about a run, runs/NAME.json its history for people and plot.py. All
randomness is drawn from (seed, epoch, step), so a saved state holds no generators and a run may
stop after any batch.
"""

import contextlib
import glob
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torchvision
from torch.distributed import ReduceOp

from checkpoint import explain, load_checkpoint, write_checkpoint
from device import RANK, WORLD_SIZE, all_reduce, barrier, leave
from history import hyperparameters, lock, read_history, write_history

SAVE_SECONDS = 60  # from one saved state to the next, or 40 times what saving takes
STOPS = [signal.SIGINT, signal.SIGTERM]  # the signals that save a run and end it
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOPS.append(signal.SIGHUP)  # the terminal is closed; nohup has it ignored
LOOK_EVERY = 16  # batches, where reading a loss makes the CPU wait for the device
HEADER = "  epoch        lr  train loss  acc. %    val loss  acc. %  seconds  images/s"


class Run:
    """One run: how far it has come, its history and its two files. Of several processes the first
    alone writes. `position` is the epoch and the step that it goes on with."""

    def __init__(self, args, command, saved, images, info, model, optimizer):
        """Restore what was saved, or write the first files; say what is trained, and where. The
        signals in STOPS stop the run from here on. `command` are the words that began it, `saved`
        is what find_checkpoint gave, and is emptied, `images` how many an epoch has, `info` what
        the history is to say of the run."""
        self.args, self.command = args, command
        self.model, self.optimizer = model, optimizer
        self.checkpoint_path = args.out / f"{args.name}.pt"
        self.history_path = args.out / f"{args.name}.json"
        config = vars(args) | {"out": str(args.out), "data_dir": str(args.data_dir)}
        size = args.batch_size
        self.batch_sizes = [min(size, images - first) for first in range(0, images, size)]
        self.stop_signal = 0  # the number of the signal that came, if one did
        self.began = self.trained_at = time.perf_counter()
        self.save_at = self.began + SAVE_SECONDS
        self.history = {"name": args.name}
        self.history["command"] = format_command(["train.py", *command[1:]])
        self.history |= {"config": config, "reported": args.reported} | info
        self.history |= {"epochs": [], "batch_losses": [], "finished": False}
        self.metrics, self.lr = {}, None  # of the batches of this epoch
        if saved:
            self._restore(saved)
        self.position = len(self.history["epochs"]), len(self.metrics.get("loss", ()))
        for number in STOPS:
            signal.signal(number, self._on_signal)
        barrier()  # until all processes have read the existing files
        if not saved and RANK == 0:
            # With the old history, so that a kill never leaves files of two runs.
            self._write_checkpoint(stale=self.history_path)
        self._write_history()
        where = info["environment"]
        print0(f"{info['parameters']:,} parameters, {info['macs']:,} multiply-accumulates an image")
        print0(f"on {where['device']}, {where['precision']}\n\n{HEADER}")
        for epoch in self.history["epochs"]:
            print0(format_epoch(epoch, args.epochs))

    def log_batch(self, epoch, step, lr, loss, correct, **metrics):
        """Record a batch's metrics, numbers or tensors of one; save or stop if it is time to.
        `loss` and `correct`, tensors, are of this process's share: `loss` becomes the mean over the
        processes, `correct` their sum. Other metrics must already agree. Ends the process if the
        loss is NaN or infinite, or a signal came."""
        loss, correct = all_reduce(torch.stack([loss.detach(), correct])).unbind()
        loss = loss / WORLD_SIZE
        for name, value in {"loss": loss, "correct": correct, **metrics}.items():
            value = torch.as_tensor(value, device=loss.device).detach()
            self.metrics.setdefault(name, []).append(value)
        self.lr, done = lr, step + 1
        if loss.is_cpu or done % LOOK_EVERY == 0 or done == len(self.batch_sizes):
            recent = torch.stack(self.metrics["loss"][-LOOK_EVERY:]).tolist()
            for batch, value in enumerate(recent, start=done - len(recent) + 1):
                if not math.isfinite(value):
                    self._diverged(f"the loss is {value} at epoch {epoch + 1}, batch {batch}")
            self.trained_at = time.perf_counter()
            self._show_progress(epoch, done)
            self._save_or_stop(loss.device)

    def watch(self, batches):
        """Yield the batches of a validation; after each of them the run may be saved or stopped."""
        for x, labels in batches:
            yield x, labels
            self._save_or_stop(x.device)

    def log_epoch(self, epoch, **validation):
        """Add an epoch's metrics to the history, write it and print them. `validation` are numbers:
        val_loss, val_accuracy and any others. Ends the process if one is NaN or infinite."""
        images, now = sum(self.batch_sizes), time.perf_counter()
        metrics = {name: torch.stack(values).tolist() for name, values in self.metrics.items()}
        correct, line = metrics.pop("correct"), {"epoch": epoch + 1, "lr": self.lr}
        for name, values in metrics.items():
            sizes = self.batch_sizes[-len(values) :]  # of those that were measured
            total = sum(value * size for value, size in zip(values, sizes))
            line[f"train_{name}"] = total / sum(sizes)
        line["train_accuracy"] = 100 * sum(correct) / images
        line |= {name: float(value) for name, value in validation.items()}
        line["seconds"] = now - self.began
        line["images_per_second"] = images / (self.trained_at - self.began)
        for name, value in line.items():
            if not math.isfinite(value):
                self._diverged(f"{name} is {value} after epoch {epoch + 1}")
        self.history["epochs"].append(line)
        self.history["batch_losses"] += [float(f"{loss:.6g}") for loss in metrics["loss"]]
        self.metrics, self.began = {}, now
        self._write_history()
        print0(format_epoch(line, self.args.epochs))

    def finish(self):
        """Write the checkpoint without what only resuming needs, and the history as finished. A run
        without a schedule keeps it all, since it may be given more epochs."""
        self.history["finished"] = True
        if RANK == 0:
            self._write_checkpoint(resumable=self.args.schedule == "none")
        self._write_history()
        leave()

    def _restore(self, saved):
        try:
            self.model.load_state_dict(saved["weights"])
            self.optimizer.load_state_dict(saved["state"]["optimizer"])
            lay_out_as_parameters(self.optimizer)
            kept = json.loads(saved["history"])
            self.history |= {name: kept[name] for name in ("epochs", "batch_losses")}
            self.history["reported"] = self.args.reported or kept["reported"]
            device = next(self.model.parameters()).device
            for name, values in saved["state"]["metrics"].items():
                self.metrics[name] = list(values.to(device).unbind())
            self.lr, seconds = saved["state"]["lr"], saved["state"]["seconds"]
            self.began -= seconds
            self.trained_at = self.began + saved["state"].get("training_seconds", seconds)
            saved.clear()  # its memory is needed
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            what = f"{self.checkpoint_path} is of another run ({explain(error)})"
            raise ValueError(what) from error

    def _write_history(self):
        if RANK == 0:
            write_history(self.history_path, self.history)

    def _write_checkpoint(self, resumable=True, stale=None):
        # evaluate.py looks for the images where training had them, from whatever folder.
        place = {"data_dir": str(self.args.data_dir.absolute())}
        checkpoint = {
            "config": self.history["config"] | place,
            "precision": self.history["environment"]["precision"],
            "history": json.dumps(self.history),  # the same digits as in NAME.json
            "weights": self.model.state_dict(),
        }
        if resumable:
            metrics = {name: torch.stack(values).cpu() for name, values in self.metrics.items()}
            checkpoint["state"] = {"optimizer": self.optimizer.state_dict(), "metrics": metrics}
            checkpoint["state"] |= {"lr": self.lr, "seconds": time.perf_counter() - self.began}
            checkpoint["state"]["training_seconds"] = self.trained_at - self.began
        write_checkpoint(self.checkpoint_path, checkpoint, stale)

    def _on_signal(self, number, frame):
        self.stop_signal = number

    def _save_or_stop(self, device):
        """Save the run if it is time to; if a signal came, to whichever process, stop it."""
        number, unsaved = self.stop_signal, ""
        if WORLD_SIZE > 1:  # one process alone need not wait for its device
            number = all_reduce(torch.tensor(number, device=device), ReduceOp.MAX).item()
        began = time.perf_counter()
        if not number and began < self.save_at:
            return
        if RANK == 0:
            try:
                self._write_checkpoint()
            except OSError as error:
                print(f"train.py: warning: the state is not saved: {error}", file=sys.stderr)
                unsaved = "nothing could be saved now; "
        ended = time.perf_counter()
        # The state of the report's final model is 1.9 GB: where disks are slow, save it seldom.
        self.save_at = ended + max(SAVE_SECONDS, 40 * (ended - began))
        if number:
            words = [word for word in self.command if word not in ("--resume", "--overwrite")]
            go_on = format_command([*words, "--resume"])
            stop(f"{signal.Signals(number).name}: {unsaved}go on with {go_on}", 128 + number)

    def _diverged(self, what):
        advice = "begin again with --overwrite and a lower --lr"
        stop(f"{what}, learning rate {self.lr:g}: {advice}", 1)

    def _show_progress(self, epoch, done):
        """Rewrite a line on the terminal: how far the run is and how long it still takes. The next
        line that is printed takes its place."""
        if RANK == 0 and sys.stderr is not None and sys.stderr.isatty():
            share, seconds = done / len(self.batch_sizes), time.perf_counter() - self.began
            rate = sum(self.batch_sizes[:done]) / seconds
            left = timedelta(seconds=round((self.args.epochs - epoch - share) * seconds / share))
            place = f"{epoch + 1:>3}/{self.args.epochs}  batch {done}/{len(self.batch_sizes)}"
            line = f"{place}  {rate:,.0f} images/s  {left} left"
            width = min(len(HEADER), terminal_columns() - 1)  # a wrapped line would stay
            print(f"{line[:width]:<{width}}", end="\r", file=sys.stderr, flush=True)


def terminal_columns():
    """Return how many characters a line of the terminal behind stderr has."""
    with contextlib.suppress(OSError, ValueError):  # it may be a terminal of Python's own
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


def print0(text):
    """Print, if this is the first process."""
    if RANK == 0:
        print(text, flush=True)


def stop(reason, code):
    """End this process with an exit code; the first of several says why."""
    if RANK == 0:
        print(f"train.py: {reason}", file=sys.stderr)
    sys.exit(code)


def lay_out_as_parameters(optimizer):
    """Give the state of each parameter the memory format of the parameter. Fused steps need that,
    and a run that was saved on a GPU, with its channels last, may go on on a CPU."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def find_checkpoint(args):
    """Return the checkpoint that a run of these options goes on from, or None where it begins.
    ValueError if the name is taken, without --resume or by other options, or its file is gone."""
    checkpoint, history = (args.out / (args.name + suffix) for suffix in (".pt", ".json"))
    if args.overwrite or not (checkpoint.exists() or history.exists()):
        return None
    if not args.resume:
        raise ValueError(
            f"{args.out / args.name} exists: go on with it by --resume, replace it by --overwrite, "
            "or give another --name"
        )
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint} is gone: --overwrite trains the run from its beginning")
    saved = load_checkpoint(checkpoint)
    before, now = saved["config"], vars(args)
    old, new = hyperparameters(before), hyperparameters(now)
    differ = [key for key in old | new if old.get(key) != new.get(key)]
    # Without a schedule, a longer run is the same as far as it has come.
    longer = args.schedule == "none" and args.epochs > before["epochs"]
    if differ and not (longer and differ == ["epochs"]):
        differences = ", ".join(f"{key} {before.get(key)} (now {now.get(key)})" for key in differ)
        raise ValueError(
            f"{checkpoint} was made with other options, {differences}: give those, another --name "
            "or --out, or --overwrite"
        )
    return saved


def is_finished(saved, args):
    """Whether a checkpoint is of a run that has all its epochs."""
    history = json.loads(saved["history"])
    return history["finished"] and len(history["epochs"]) >= args.epochs


def restore_history(saved, args):
    """Write the history of a finished run again if a kill kept it from saying that it is finished,
    if it is lost, or if other reported figures are given."""
    path, before = args.out / f"{args.name}.json", {"finished": False}
    with contextlib.suppress(OSError, ValueError):
        before = read_history(path)
    history = before if before["finished"] else json.loads(saved["history"])
    history = history | {"reported": args.reported or history["reported"]}
    if RANK == 0 and history != before:
        write_history(path, history)
        note = "" if before["finished"] else ", without a test: evaluate.py adds it"
        print(f"train.py: {path} is written again{note}", file=sys.stderr)


@contextlib.contextmanager
def claim(out, name):
    """Keep other processes from training a run of this name in this folder: ValueError if one does.
    The claim ends with the process, however that ends; its file .NAME.lock stays. What a killed run
    was writing is removed."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f".{name}.lock", "w") as file:
        try:
            lock(file)
        except BlockingIOError as error:
            raise ValueError(f"another process is training {out / name}") from error
        for suffix in (".pt", ".json"):
            for part in out.glob(f"{glob.escape(name)}{suffix}.*.part"):
                part.unlink()
        yield


@contextlib.contextmanager
def restored_signals():
    """Leave the handlers of signals as they were: a run may be one of many things that a Python
    session does."""
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # it was not Python's
                signal.signal(number, handler)


def describe_run(model, device, precision):
    """Return what a history says of a model and of what it is trained with and where."""
    parameters = sum(p.numel() for p in model.parameters())
    where = describe_environment(device, precision)
    return {"environment": where, "parameters": parameters, "macs": model.macs}


def describe_environment(device, precision):
    """Return what a run is made with, as its history keeps it."""
    threads = torch.get_num_threads()
    kind = f"{platform.machine()}, {threads} threads"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": f"{device} ({kind})",
        "precision": precision,
        "threads": threads,
        "commit": find_commit(),
    }


def find_commit():
    """Return the commit of these scripts as git describes it, or None. A repository that they only
    lie in, or that the environment names, does not count."""
    here = Path(__file__).resolve()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words):
        command = ["git", "-C", here.parent, *words]
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL, env=environment)
        return output.decode().strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails if it is not this repository's
        return git("describe", "--always", "--dirty")
    except (OSError, ValueError, subprocess.CalledProcessError):  # no git, no repository
        return None


def format_command(words):
    """Return a command line of this process as it is typed."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    torchrun = ["torchrun", "--standalone", f"--nproc-per-node={processes}"]
    words = [*(torchrun if WORLD_SIZE > 1 else ["python"]), *words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def format_epoch(epoch, epochs):
    """Return an epoch of the history as a line under HEADER."""
    return (
        f"{epoch['epoch']:>3}/{epochs:<3} {epoch['lr']:>9.3g}"
        f"  {epoch['train_loss']:>10.4f}  {epoch['train_accuracy']:>6.2f}"
        f"  {epoch['val_loss']:>10.4f}  {epoch['val_accuracy']:>6.2f}"
        f"  {epoch['seconds']:>7.1f}  {epoch['images_per_second']:>8,.0f}"
    )
