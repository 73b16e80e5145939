"""A dashboard that answers as Ray's does, as far as `zsplg submit` asks; and one that fails."""

import asyncio
import contextlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import WSCloseCode, web


class Dashboard:
    """What it is asked to be, and what it was told."""

    def __init__(self) -> None:
        self.address = ""
        self.ray_version: str | None = None
        self.python_version = "3.11.7"
        self.token: str | None = None
        self.status = ""  # of the cluster, as `ray status` formats it
        self.states: list[dict[str, Any]] = [{"status": "SUCCEEDED", "driver_exit_code": 0}]
        """States of the job, one for each question; the last one stays."""
        self.log = ["a\n", "b\n", "c\n"]
        self.breaks: list[int] = []
        """After how many pieces of the log each of the first connections breaks."""
        self.while_tailing: Callable[[], None] = lambda: None
        self.special: Callable[[web.Request], web.StreamResponse | None] = lambda request: None
        self.jobs: list[dict[str, Any]] = []
        self.packages: dict[str, bytes] = {}
        self.stopped: list[str] = []
        self.seen: list[str] = []
        self.tailed = 0

    def zipped(self) -> list[str]:
        """Names of the files in the job's working directory."""
        uri = self.jobs[-1]["runtime_env"]["working_dir"]
        return zipfile.ZipFile(io.BytesIO(self.packages[uri.rpartition("/")[2]])).namelist()

    @web.middleware
    async def _door(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.seen.append(f"{request.method} {request.path}")
        if (special := self.special(request)) is not None:
            return special
        told = request.headers.get("Authorization")
        if self.token is not None and told != f"Bearer {self.token}":
            return web.Response(status=403 if told else 401, text="Unauthorized")
        return await handler(request)

    async def _version(self, request: web.Request) -> web.Response:
        import ray

        version = self.ray_version or ray.__version__
        return web.json_response({"version": "4", "ray_version": version, "ray_commit": "x"})

    async def _metadata(self, request: web.Request) -> web.Response:
        return web.json_response({"result": True, "data": {"pythonVersion": self.python_version}})

    async def _cluster(self, request: web.Request) -> web.Response:
        return web.json_response({"result": True, "data": {"clusterStatus": self.status}})

    async def _package(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
        return web.Response(status=200 if name in self.packages else 404)

    async def _submit(self, request: web.Request) -> web.Response:
        self.jobs.append(await request.json())
        name = self.jobs[-1]["submission_id"]
        return web.json_response({"job_id": name, "submission_id": name})

    async def _job(self, request: web.Request) -> web.Response:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state["status"] == "UNKNOWN":
            return web.Response(status=404, text="Job x does not exist")
        about = {"type": "SUBMISSION", "submission_id": request.match_info["name"]}
        return web.json_response({**about, "entrypoint": "x", **state})

    async def _stop(self, request: web.Request) -> web.Response:
        self.stopped.append(request.match_info["name"])
        self.states = [{"status": "STOPPED"}]
        return web.json_response({"stopped": True})

    async def _whole_log(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": "".join(self.log)})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        self.tailed += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        pieces = self.breaks.pop(0) if self.breaks else len(self.log)
        for text in self.log[:pieces]:
            await socket.send_str(text)
        self.while_tailing()
        broken = pieces < len(self.log)
        code = WSCloseCode.INTERNAL_ERROR if broken else WSCloseCode.OK
        if broken and self.tailed % 2:
            assert request.transport is not None
            request.transport.abort()
        await socket.close(code=code)
        return socket

    def application(self) -> web.Application:
        """The server."""
        app = web.Application(middlewares=[self._door], client_max_size=100 * 2**20)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/v0/cluster_metadata", self._metadata)
        app.router.add_get("/api/cluster_status", self._cluster)
        app.router.add_route("*", "/api/packages/gcs/{name}", self._package)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{name}", self._job)
        app.router.add_post("/api/jobs/{name}/stop", self._stop)
        app.router.add_get("/api/jobs/{name}/logs", self._whole_log)
        app.router.add_get("/api/jobs/{name}/logs/tail", self._tail)
        return app


@contextlib.contextmanager
def serving(made: Dashboard) -> Iterator[Dashboard]:
    """Let it answer on this machine, at `made.address`."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(made.application(), shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    host, port = runner.addresses[0][:2]
    made.address = f"http://{host}:{port}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
