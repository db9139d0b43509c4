"""The curves of runs for other programs: a table, TensorBoard, Weights & Biases."""

import csv
import io

from common import BadInput, write
from reports.facts import names_of
from reports.reading import COLUMNS

# {column: name of the curve in TensorBoard and W&B}
TAGS = {"train_loss": "train/loss", "lr_scale": "train/lr_scale", "ms_per_step": "train/ms_per_step",
        "tokens": "train/tokens", "val_loss": "val/loss", "val_bpb": "val/bpb"}


def export(every, kind, to):
    """Write the curves of these runs: of one to `to`, of several each under its name in the folder `to`."""
    for facts in every:
        if not facts["points"]:
            raise BadInput(f"{facts['run_dir']} has no training or validation lines to export yet")
    for facts, name in zip(every, names_of(every)):
        name = name.strip("/").replace("/", "_")
        path = to if len(every) == 1 else to / (f"{name}.csv" if kind == "csv" else name)
        if kind != "csv":
            make_empty(path)
        WRITERS[kind](facts, name, path)


def write_csv(facts, name, path):
    """One row a step; what a step has not is empty."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(facts["points"])
    write(path, table.getvalue().encode())


def write_tensorboard(facts, name, path):
    """An event file; TensorBoard's relative time is the clock of the training."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(path)) as writer:
        for point in facts["points"]:
            for column, tag in TAGS.items():
                if point[column] is not None:
                    writer.add_scalar(tag, point[column], point["step"], walltime=point["seconds"])
        end = facts["points"][-1]
        if facts["final_bpb"] is not None:
            writer.add_scalar("final/bpb", facts["final_bpb"], end["step"], walltime=end["seconds"])
        settings = "\n".join(f"    {name}={value}" for name, value in facts["settings"].items())
        writer.add_text("settings", settings, 0, walltime=0.0)


def write_wandb(facts, name, path):
    """An offline run, which `wandb sync` sends where its owner wants it."""
    import wandb

    run = wandb.init(mode="offline", project="parameter-golf", name=name, dir=str(path), config=facts["settings"],
                     settings=wandb.Settings(console="off", silent=True))
    for point in facts["points"]:
        values = {tag: point[column] for column, tag in TAGS.items() if point[column] is not None}
        run.log({**values, "train/seconds": point["seconds"]}, step=point["step"])
    known = {key: facts[key] for key in ("final_bpb", "final_loss", "total_bytes", "params", "valid") if facts[key]}
    run.summary.update(known)
    run.finish()


def make_empty(path):
    """A new folder: a second event file beside an older one would be drawn as the same run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise BadInput(f"--to {path} is not empty; choose another folder")
    except OSError as error:
        raise BadInput(f"--to {path} cannot be written ({error.strerror})") from None


WRITERS = {"csv": write_csv, "tensorboard": write_tensorboard, "wandb": write_wandb}
