"""Run folders as a run leaves them, and a server that shows them, for the tests of `safe-train watch`."""

import json
import threading
import time
from contextlib import contextmanager

import yaml

from safe_train.watch.runs import named


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(step, **changes):
    values = {
        "reward": step / 100,
        "reward_std": 0.2,
        "kl": 0.01,
        "entropy": 2.0,
        "time/step_s": 1.0,
        "phase": "warmup",
    }
    return {"step": step, **values, **changes}


def write_run(folder, rows, samples=(), tokens=(), **settings):
    folder.mkdir(parents=True)
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "samples.jsonl", samples)
    write_rows(folder / "tokens.jsonl", tokens)
    settings = {"algorithm": "safe", "controller": "safe", "critic": "soft_min", "total_steps": len(rows)} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@contextmanager
def served(*folders, names=()):
    """The port of a server that shows these folders."""
    import uvicorn

    from safe_train.watch.server import listen, make_app

    connection = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(named(list(folders)), names), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [connection]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield connection.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        connection.close()
