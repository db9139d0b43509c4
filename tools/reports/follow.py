"""A run that is going on, in the terminal and as a page."""

import time

from rich import console, live, progress_bar, table, text

from reports.facts import gather, names_of

SECONDS = 1.0  # between two looks at the run
PAGE_SECONDS = 5.0  # between two pages


def follow(run_dir, html, x):
    """Show the run until it ends. With `html` that file is its page, written as it goes."""
    terminal = console.Console()
    written = -PAGE_SECONDS  # when the page was
    ended = False
    with live.Live(console=terminal, auto_refresh=False) as shown:
        while not ended:
            facts = gather(run_dir, compress=False)
            shown.update(view(facts), refresh=True)
            ended = facts["state"] != "running"
            if html and (ended or time.monotonic() - written >= PAGE_SECONDS):
                from reports.page import page

                page([gather(run_dir) if ended else facts], x, html)
                written = time.monotonic()
            if not ended:
                time.sleep(SECONDS)
    if not terminal.is_terminal:
        terminal.print()


def progress_of(facts):
    """(share of the training that is done, seconds that it still takes or None), by steps or by the clock."""
    end = facts["points"][-1] if facts["points"] else {"step": 0, "seconds": 0.0}
    limits = (end["step"], facts["steps_to_make"]), (end["seconds"], facts["seconds_to_train"])
    share = min(1.0, max((done / limit for done, limit in limits if limit), default=0.0))
    return share, end["seconds"] * (1 - share) / share if share else None


def view(facts):
    """What the terminal shows."""
    def latest(column, form):
        """The last value of a column of the points and its step, in this form; None if there is no value."""
        known = [point for point in facts["points"] if point[column] is not None]
        return form.format(known[-1][column], known[-1]["step"]) if known else None

    share, eta = progress_of(facts)
    running = facts["state"] == "running"
    lines = {
        "phase": facts["phase"] if running else facts["ended"],
        "progress": f"{share:.0%} of the training",
        "step": f"{facts['steps']:,}",
        "loss": latest("train_loss", "{:.4f}"),
        "learning rate": latest("lr_scale", "{:.3f} of its peak"),
        "ms/step": latest("ms_per_step", "{:.1f}"),
        "validation": latest("val_bpb", "{:.4f} BPB at step {:,}"),
        "final score": None if facts["final_bpb"] is None else f"{facts['final_bpb']:.4f} BPB",
        "ETA of the training": f"{eta:,.0f} s" if eta and running and facts["phase"] == "training" else None}
    grid = table.Table.grid(padding=(0, 2))
    grid.add_row("", progress_bar.ProgressBar(total=1.0, completed=share, width=40))
    for label, value in lines.items():
        if value:
            grid.add_row(text.Text(label, style="dim"), text.Text(value))
    return console.Group(text.Text(names_of([facts])[0], style="bold"), grid)
