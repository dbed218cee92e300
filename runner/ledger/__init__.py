"""The ledger: what each run was promised to cost and what it cost, for whom, and project budgets.

schema.py   its tables, and how older files become this version
entry.py    what an attempt enters, what it asks of its project, how a project stands
store.py    the SQLite file: runs, attempts, reservations; opening, beating, closing
dead.py     attempts whose process died: charged, and their reservations freed
lease.py    whether the process of an attempt still lives, without trusting any wall clock
report.py   rows and sums for people and for other programs
bills.py    a provider's bill against it, and Slurm's accounting into it
period.py   the part of it that a bill is about
"""

from outlay.runner.ledger.entry import Entry, Took, Total, Want
from outlay.runner.ledger.store import Ledger, OpenRun

__all__ = ["Entry", "Ledger", "OpenRun", "Took", "Total", "Want"]
