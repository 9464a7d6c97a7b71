"""The run folder: opening and resuming it, what a finished run leaves, its report."""
