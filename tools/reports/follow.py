"""A run that is going on, in the terminal and as a page."""

import time

from common import BadInput
from reports.facts import gather, names_of
from reports.reading import number
from reports.table import bits

SECONDS = 1.0  # between two looks at the run
PAGE_SECONDS = 5.0  # between two pages


def follow(run_dir, html, x):
    """Show the run until it ends; returns the exit code. With `html` that file is its page, written as it goes."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise BadInput("--follow needs rich: pip install -r requirements-dev.txt") from None
    console = Console()
    written = -PAGE_SECONDS  # when the page was
    with Live(console=console, auto_refresh=False) as live:
        while True:
            facts = gather(run_dir, compress=False)
            live.update(view(facts), refresh=True)
            ended = facts["state"] != "running"
            due = ended or time.monotonic() - written >= PAGE_SECONDS
            if html and due:
                from reports.page import page

                page([gather(run_dir) if ended else facts], x, html)
                written = time.monotonic()
            if ended:
                break
            time.sleep(SECONDS)
    if not console.is_terminal:
        console.print()
    return 0


def progress_of(facts):
    """(share of the training that is done, seconds that it still takes or None), by steps or by the clock."""
    end = facts["points"][-1] if facts["points"] else {"step": 0, "seconds": 0.0}
    limits = (end["step"], facts["steps_to_make"]), (end["seconds"], facts["seconds_to_train"])
    share = min(1.0, max((done / limit for done, limit in limits if limit), default=0.0))
    return share, end["seconds"] * (1 - share) / share if share else None


def view(facts):
    """What the terminal shows."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    points = facts["points"]
    share, eta = progress_of(facts)
    trained = [point for point in points if point["train_loss"] is not None]
    latest = trained[-1] if trained else {}
    val = next((point for point in reversed(points) if point["val_bpb"] is not None), None)
    running = facts["state"] == "running"
    shown = {
        "phase": facts["phase"] if running else facts["ended"],
        "progress": f"{share:.0%} of the training",
        "step": f"{facts['steps']:,}",
        "loss": f"{latest['train_loss']:.4f}" if latest else None,
        "learning rate": f"{latest['lr_scale']:.3f} of its peak" if number(latest, "lr_scale") is not None else None,
        "ms/step": f"{latest['ms_per_step']:.1f}" if number(latest, "ms_per_step") is not None else None,
        "validation": f"{bits(val['val_bpb'])} BPB at step {val['step']:,}" if val else None,
        "final score": f"{bits(facts['final_bpb'])} BPB" if facts["final_bpb"] is not None else None,
        "ETA of the training": f"{eta:,.0f} s" if eta and running and facts["phase"] == "training" else None}
    table = Table.grid(padding=(0, 2))
    table.add_row("", ProgressBar(total=1.0, completed=share, width=40))
    for label, value in shown.items():
        if value:
            table.add_row(Text(label, style="dim"), Text(value))
    return Group(Text(names_of([facts])[0], style="bold"), table)
