"""One rank of a `RankPool`: joins the process group, then runs what it is told until told to stop.

Started as `python -m outlay.runner.pool_worker FD`; FD is one end of a socket pair. Messages are
pickled: in `(target, args, kwargs, paths)` or None to stop; out `("ready", None)` once,
then `("ok", result)` or `("error", text, exception or None)` for each call.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any


def _resolve(target: str) -> Any:
    """`package.module:function` → the function."""
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _portable(error: BaseException) -> BaseException | None:
    """The exception itself where it survives pickling, so that its class is known on the other side."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # any class may fail in any way here; the text still goes over
        return None
    return copy if type(copy) is type(error) else None


def serve(connection: Connection) -> None:
    """Answer calls until the other side says stop or is gone."""
    while _answer(connection):
        pass


def _answer(connection: Connection) -> bool:
    """One call; false where there is none. In a frame of its own, so that nothing of it stays alive."""
    try:
        request = connection.recv()
    except EOFError:
        return False
    if request is None:
        return False
    target, args, kwargs, paths = request
    sys.path.extend(path for path in paths if path not in sys.path)
    try:
        result = _resolve(target)(*args, **kwargs)
    except Exception as error:
        connection.send(("error", traceback.format_exc(), _portable(error)))
    else:
        connection.send(("ok", result))
    return True


def _end_with_parent(parent: int) -> None:
    """A rank that waits in a collective never sees that its pool is gone; end it from a thread."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Join the ranks, say so, serve."""
    connection = Connection(int(sys.argv[1]))
    _end_with_parent(os.getppid())
    import torch

    from outlay.runner.engine import RankInfo, init_process_group

    init_process_group(
        RankInfo.from_environment(),
        init_method=os.environ["OUTLAY_POOL_INIT"],
        timeout_s=float(os.environ["OUTLAY_POOL_TIMEOUT_S"]),
    )
    connection.send(("ready", None))
    serve(connection)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
