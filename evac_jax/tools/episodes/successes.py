"""Who succeeded in recorded episodes, by player and task."""

from evac_jax.files.recordings import Episodes
from evac_jax.telemetry import report


def show_successes(data: Episodes) -> None:
    """Print a table for each player that occurs: success by task, with 95 % Wilson intervals."""
    success = data.success_once()
    tables = {
        name: report.by_task(data.instructions, data.task[mine], success[mine])
        for number, name in enumerate(data.sources)
        if (mine := data.source == number).any()
    }
    report.show("\n\n".join(report.task_tables(tables)))
