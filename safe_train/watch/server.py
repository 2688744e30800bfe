"""The server of `safe-train watch`. It writes nothing; a run is asked for by its place in the list, not by a path."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from safe_train.config import ConfigError, SafeConfig
from safe_train.run.report import strict_json
from safe_train.watch import plots
from safe_train.watch.beside import require_packages
from safe_train.watch.runs import WatchedRun
from safe_train.watch.samples import ORDERS, PAGE, Query

PORT = 8650  # or any free one
OWN_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
EVERYWHERE = ("0.0.0.0", "::")
REFRESH_SECONDS = 0.5  # files are looked at no more often
WIDEST = 10_000  # steps to smooth over
FILES = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
PAGE_FOLDER = Path(__file__).parent / "page"

EMPTY_STYLE = "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="  # Plotly makes one, and adds its rules by script
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'self'; style-src 'self' '{EMPTY_STYLE}'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class BadRequest(ValueError):
    """A parameter that cannot be used."""


class Watch:
    """The answers, as values that JSON can hold."""

    def __init__(self, runs: Sequence[WatchedRun]):
        self.runs, self.read_at = runs, -math.inf

    def refresh(self) -> None:
        if monotonic() - self.read_at > REFRESH_SECONDS:
            for run in self.runs:
                run.refresh()
            self.read_at = monotonic()

    def state(self, given: dict[str, str]) -> Any:
        self.refresh()
        return {"runs": [run.summary() for run in self.runs]}

    def panels(self, given: dict[str, str]) -> Any:
        self.refresh()
        return {"panels": plots.described(self.chosen(given))}

    def panel(self, given: dict[str, str]) -> Any:
        self.refresh()
        width = integer(given, "smooth", 1, 1, WIDEST)
        found = plots.plot(given.get("key", ""), self.chosen(given), width)
        if found is None:
            raise BadRequest("no run that was asked for has this panel")
        return found

    def samples(self, given: dict[str, str]) -> Any:
        samples = self.one(given).samples.get(given.get("source", "samples"))
        if samples is None:
            raise BadRequest("source must be samples or evaluation")
        samples.refresh()
        order = given.get("order", "newest")
        if order not in ORDERS:
            raise BadRequest(f"order must be one of {', '.join(ORDERS)}")
        query = Query(
            order=order,
            lowest=number(given, "lowest", -math.inf),
            highest=number(given, "highest", math.inf),
            first_step=integer(given, "first_step", 0),
            last_step=integer(given, "last_step", 0) if given.get("last_step") else None,
            prompt=given.get("prompt", ""),
            has_tokens=given.get("has_tokens") == "true",
            page=integer(given, "page", 0),
        )
        count, rows = samples.select(query)
        return {"count": count, "pages": -(-count // PAGE), "rows": rows}

    def settings(self, given: dict[str, str]) -> Any:
        """Every setting, and whether it is another than the default."""
        run = self.one(given)
        run.refresh()
        try:
            usual = dict(SafeConfig(algorithm=run.settings.get("algorithm", "safe")).items())
        except ConfigError:  # of an algorithm that needs more settings, or that is not known here
            usual = dict(SafeConfig().items())
        named = [(name, value, name not in usual or usual[name] != value) for name, value in run.settings.items()]
        return {"settings": [{"name": n, "value": str(v), "is_changed": c} for n, v, c in named]}

    def chosen(self, given: dict[str, str]) -> plots.Runs:
        try:
            indices = [int(word) for word in given.get("runs", "").split(",") if word]
        except ValueError:
            raise BadRequest("runs must be numbers, such as 0,1") from None
        return {i: self.at(i) for i in indices}

    def one(self, given: dict[str, str]) -> WatchedRun:
        return self.at(integer(given, "run", 0))

    def at(self, index: int) -> WatchedRun:
        if not 0 <= index < len(self.runs):
            raise BadRequest(f"there is no run {index}")
        return self.runs[index]


def integer(given: dict[str, str], name: str, default: int, low: int = 0, high: int = sys.maxsize) -> int:
    try:
        value = int(given.get(name) or default)
    except ValueError:
        raise BadRequest(f"{name} must be a whole number") from None
    if not low <= value <= high:
        raise BadRequest(f"{name} must be from {low} to {high}")
    return value


def number(given: dict[str, str], name: str, default: float) -> float:
    try:
        return float(given.get(name) or default)
    except ValueError:
        raise BadRequest(f"{name} must be a number") from None


def make_app(runs: Sequence[WatchedRun], names: Sequence[str] = ()) -> Any:
    """The ASGI application; it answers requests for these host names and for this machine's own alone."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route

    watch = Watch(runs)

    def file(path: Path, kind: str) -> Any:
        async def answer(request: Request) -> Response:
            return FileResponse(path, media_type=kind, headers=HEADERS)

        return answer

    def answers(function: Any) -> Any:
        async def answer(request: Request) -> Response:
            try:
                found, status = function(dict(request.query_params)), 200
            except BadRequest as error:
                found, status = {"error": str(error)}, 400
            return Response(strict_json(found), status, HEADERS, "application/json")

        return answer

    routes = [Route("/", file(PAGE_FOLDER / "index.html", "text/html"))]
    routes += [Route(f"/{name}", file(PAGE_FOLDER / name, kind)) for name, kind in FILES.items()]
    routes += [Route("/plotly.js", file(plotly_file(), "text/javascript"))]
    for name in ("state", "panels", "panel", "samples", "settings"):
        routes.append(Route(f"/api/{name}", answers(getattr(watch, name))))
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[*OWN_NAMES, *names], www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts, Middleware(GZipMiddleware)])


def plotly_file() -> Path:
    """Plotly's JavaScript, found without importing plotly."""
    found = importlib.util.find_spec("plotly")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens; without a port at the usual one, or, if that is taken, at any."""
    reason: Exception | None = None
    for number in (PORT, 0) if port is None else (port,):
        try:
            return socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (OSError, OverflowError) as error:  # the latter of a number that is no port
            reason = error
    raise ConfigError(f"cannot listen at {host}:{port or PORT}: {reason}") from None


def serve(
    runs: Sequence[WatchedRun],
    host: str = "127.0.0.1",
    port: int | None = None,
    names: Sequence[str] = (),
    until_input_ends: bool = False,
) -> None:
    """Answers until Ctrl-C; with `until_input_ends` until whoever started this process is gone."""
    require_packages()
    import uvicorn

    if "*" in "".join(names):
        raise ConfigError(
            "--allow-host takes whole names: one that stands for all would let any web page read the runs"
        )
    connection = listen(host, port)
    own = [] if host in EVERYWHERE else [f"[{host}]" if ":" in host else host]
    config = uvicorn.Config(make_app(runs, [*own, *names]), log_level="warning", server_header=False)
    server = uvicorn.Server(config)
    if until_input_ends:
        threading.Thread(target=end_with_input, args=(server,), daemon=True).start()
    print(f"watch: {address(connection)} shows {', '.join(run.name for run in runs)}", flush=True)
    if host not in ("localhost", "127.0.0.1", "::1"):
        print("watch: whoever reaches this address reads these runs; there is no password", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
        server.run(sockets=[connection])


def end_with_input(server: Any) -> None:
    sys.stdin.buffer.read()
    server.should_exit = True


def address(connection: socket.socket) -> str:
    host, port = connection.getsockname()[:2]
    shown = "127.0.0.1" if host in EVERYWHERE else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
