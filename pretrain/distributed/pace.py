"""How long ranks wait for one another, in seconds. Tests take a faster pace; no configuration or environment changes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Waits of the rendezvous and the watchdog."""

    rendezvous: float = 600.0  # at most for all ranks to arrive
    retry: float = 0.3  # between two attempts to reach the store's address
    poll: float = 0.1  # between two looks at the store during the rendezvous
    verdict: float = 5.0  # longer than rank 0 may take to publish its verdict
    report: float = 4.0  # for the rank that reports an error, before the others on its machine end: launchers then end all
    beat: float = 1.0  # between two signs of life; less where parallel.lost_after_seconds is below 5
    suspicious_after: float = 10.0  # silence that counts as loss once communication with some rank broke
    follow: float = 0.5  # before a rank ends because another one said so
    count_out: float = 3.0  # at most for rank 0's store to outlive the others after an error
    leave: float = 10.0  # at most for rank 0's store to outlive the others at a regular end


STANDARD = Pace()
