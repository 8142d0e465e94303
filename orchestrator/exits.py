"""Exit statuses of the command line, and the ways in which it is asked to end."""

COMPLETE, FAILED, USAGE, DEGRADED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: end as after Ctrl-C, with what is finished kept."""
