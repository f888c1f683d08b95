"""What somebody in the network without a token tries: every route and every method on every port. Run on a host of its own.

    python neighbour.py '[["10.77.0.1", 6379], ...]' [REGEX]

Prints a JSON list of [address, port, what was tried, what came back] of all that was answered with more than a refusal. REGEX
leaves out routes and methods that it does not match.
"""

import http.client
import importlib
import json
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import ray

WRONG = "Bearer 0123456789abcdef0123456789abcdef"
SECONDS = 5.0
OTHER_ROUTES = [
    ("get", "/metrics"),
    ("get", "/api/2.0/mlflow/experiments/search?max_results=1"),
    ("get", "/api/2.0/mlflow-artifacts/artifacts"),
    ("get", "/bucket?list-type=2"),
]
SERVICES = ("gcs_service", "node_manager", "core_worker", "reporter", "runtime_env_agent", "ray_client", "autoscaler", "event")
REFUSED = {
    *(grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED),
    *(grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE),
}

Answer = tuple[str, str]


def routes() -> list[tuple[str, str]]:
    """Those of Ray's dashboard and agents, by their source, and some of MLflow's and the bucket's."""
    sources = (Path(ray.__file__).parent / "dashboard").rglob("*.py")
    pattern = re.compile(r'\.(get|post|put|delete|patch)\(\s*f?"(/[^"]*)"')
    found = {route for source in sources for route in pattern.findall(source.read_text())}
    return sorted({(method, re.sub(r"\{\w+\}", "1", path)) for method, path in found}) + OTHER_ROUTES


def methods() -> list[str]:
    """Full names of all methods of Ray's gRPC services that take one request and give one answer."""
    modules = [importlib.import_module(f"ray.core.generated.{name}_pb2") for name in SERVICES]
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    return [
        f"/{service.full_name}/{method.name}"
        for service in services
        for method in service.methods
        if not (method.client_streaming or method.server_streaming)
    ]


def try_http(address: str, port: int, pattern: re.Pattern[str]) -> Iterator[Answer]:
    for method, path in routes():
        for headers in ({}, {"Authorization": WRONG}):
            if not pattern.search(path):
                continue
            connection = http.client.HTTPConnection(address, port, timeout=SECONDS)
            try:
                connection.request(method.upper(), path, headers=headers)
                answer = connection.getresponse()
                if answer.status < 400:
                    yield f"{method} {path}", f"{answer.status} {answer.read(100)!r}"
            except (http.client.HTTPException, ConnectionError):
                return  # it speaks something else
            except TimeoutError:
                return
            finally:
                connection.close()


def try_grpc(address: str, port: int, pattern: re.Pattern[str]) -> Iterator[Answer]:
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(SECONDS)
        except grpc.FutureTimeoutError:
            return  # it speaks something else
        for name in filter(pattern.search, methods()):
            for metadata in ([], [("authorization", WRONG)]):
                try:
                    data = channel.unary_unary(name)(b"", timeout=SECONDS, metadata=metadata)
                    yield name, f"OK, {len(data)} bytes"
                except grpc.RpcError as error:
                    if error.code() not in REFUSED:
                        yield name, f"{error.code().name}: {error.details()}"


def try_bytes(address: str, port: int, _: re.Pattern[str]) -> Iterator[Answer]:
    """What a port says to noise, but for the first frame of HTTP/2 and a refusal in HTTP/1."""
    with suppress(OSError), socket.create_connection((address, port), timeout=SECONDS) as connection:
        connection.settimeout(1.0)
        connection.sendall(b"\x07" * 64)
        data = connection.recv(1000)
        is_refusal = data[3:4] == b"\x04" or re.match(rb"HTTP/1\.\d 4", data)
        if data and not is_refusal:
            yield "noise", repr(data)


def try_database(address: str, port: int, _: re.Pattern[str]) -> Iterator[Answer]:
    import psycopg

    if port == 5432:
        with suppress(psycopg.OperationalError), psycopg.connect(f"host={address} user=mlflow dbname=mlflow connect_timeout=5"):
            yield "PostgreSQL", "a session"


def main() -> None:
    targets = json.loads(sys.argv[1])
    pattern = re.compile(sys.argv[2] if len(sys.argv) > 2 else "")
    tries = (try_http, try_grpc, try_bytes, try_database)
    answers = [[*target, *answer] for target in targets for attempt in tries for answer in attempt(*target, pattern)]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
