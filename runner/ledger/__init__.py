"""The ledger: what each run was promised to cost and what it cost, for whom, and project budgets.

store.py    the SQLite file: runs, attempts, reservations; opening, beating, closing
lease.py    whether the process of an attempt still lives, without trusting any wall clock
report.py   rows and sums for people and for other programs
bills.py    a provider's bill against it, and Slurm's accounting into it
period.py   the part of it that a bill is about
"""

from outlay.runner.ledger.store import Entry, Ledger, OpenRun, Total, Want

__all__ = ["Entry", "Ledger", "OpenRun", "Total", "Want"]
