"""An unfinished run on disk: its name claimed, its state saved, and found again."""

import contextlib
import json
import os
import sys
import time
import warnings

import parallel
from evaluate import load_checkpoint, write_checkpoint
from history import hyperparameters, read_history

try:
    import fcntl
except ImportError:  # Windows: there, two runs of one name are not kept apart
    fcntl = None


@contextlib.contextmanager
def claimed(out, name):
    """Keep other processes from training a run of this name in this folder at the same time.

    ValueError if one does already. The claim ends with the process, however that ends.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f".{name}.lock"
    with open(path, "w") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino != path.stat().st_ino:
                raise FileNotFoundError  # its owner removed it while this process opened it
        except (BlockingIOError, FileNotFoundError) as error:
            raise ValueError(f"another process is training {out / name}") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def find(out, config):
    """The history and the saved state that a run of this config goes on from.

    Both are None for a new run; the state is None where nothing was saved yet. ValueError if the
    name is taken, by a run with other options, or by this one and `resume` is not among them.
    """
    history_path, weights_path, state_path = (
        out / f"{config['name']}{suffix}" for suffix in (".json", ".pt", ".state.pt")
    )
    if config["overwrite"] or not (history_path.exists() or weights_path.exists()):
        return None, None
    if not config["resume"]:
        raise ValueError(
            f"{out / config['name']} exists: go on with it by --resume, replace it by --overwrite, "
            "or give another --name"
        )
    history = read_history(history_path)
    refuse_other_options(history["config"], config, history_path)
    return history, load_checkpoint(state_path) if state_path.exists() else None


def refuse_other_options(before, now, path):
    """ValueError if two configs have other hyperparameters; it names them.

    A run without a schedule may have more epochs: it is the same as far as it has come.
    """
    before, now = hyperparameters(before), hyperparameters(now)
    differ = [key for key in now if before.get(key) != now[key]]
    longer = differ == ["epochs"] and now["epochs"] > before["epochs"]
    if not differ or (longer and now["schedule"] == "none"):
        return
    differences = ", ".join(f"{key} {before.get(key)} (now {now[key]})" for key in differ)
    reason = f"; its {now['schedule']} schedule depends on the number of epochs" if longer else ""
    raise ValueError(
        f"{path} was made with other options, {differences}{reason}: give those, another --name or "
        "--out, or --overwrite"
    )


def save(run):
    """Save what a Run needs to go on, if this is the first process; whether that was possible.

    Weights that are not finite are not saved: the last good state stays.
    """
    if parallel.RANK > 0:
        return True
    if not all(weights.isfinite().all() for weights in run.model.parameters()):
        return False
    state = {
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "average": run.average and run.average.state_dict(),
        "history": json.dumps(run.history),
        "figures": run.figures[: run.step].cpu(),
        "seconds": time.monotonic() - run.began,
    }
    try:
        write_checkpoint(run.path(".state.pt"), run.config, run.model, **state)
    except OSError as error:
        print(f"train.py: warning: the state is not saved: {error}", file=sys.stderr)
        return False
    return True


def load(run, state):
    """Bring a Run to where `save` saved it. ValueError if the state does not fit it."""
    try:
        run.model.load_state_dict(state["weights"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        if run.average:
            run.average.load_state_dict(state["average"])
        run.history = json.loads(state["history"]) | {"config": run.config, "finished": False}
        run.step = len(state["figures"])
        run.figures[: run.step] = state["figures"]
        run.began -= state["seconds"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{run.path('.state.pt')} is of another run ({reason})") from error
    # A resumed run steps its scheduler before this process has trained.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
