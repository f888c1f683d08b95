"""How a cluster is started or joined: what goes to its nodes, and what is said where it cannot be joined."""

import json
import socket
import threading
from concurrent import futures

import grpc
import pytest

from infra.cluster import PACKAGES, checkout, code_environment, session
from infra.errors import ClusterError


def test_only_our_packages_travel(tmp_path):
    """Through Ray's own packing, of a checkout in which somebody keeps data, a store and a secret."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    environment = code_environment()
    assert environment["working_dir"] == str(checkout())
    for name in ("infra/cluster.py", "models/temporal/a.py", "work/store/x", "data/raw.mp4", ".env", "tests/test_a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "infra/__pycache__").mkdir()
    (tmp_path / "infra/__pycache__/cluster.pyc").write_text("")
    sent = []
    _dir_travel(tmp_path, [_get_excludes(tmp_path, environment["excludes"])], sent.append, include_gitignore=True)
    files = {str(path.relative_to(tmp_path)) for path in sent if path.is_file()}
    assert files == {"infra/cluster.py", "models/temporal/a.py"}
    assert {path.name for path in checkout().iterdir() if (path / "__init__.py").exists()} == set(PACKAGES)


def test_a_job_has_brought_its_code_along(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
    assert code_environment() == {}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": {"A": "1"}}}))
    assert code_environment()["working_dir"] == str(checkout())


def refused(address):
    with pytest.raises(ClusterError) as error, session(address):
        raise AssertionError("connected")
    return str(error.value)


def test_addresses_where_no_cluster_is():
    assert refused("127.0.0.1:1").startswith("no Ray cluster at 127.0.0.1:1: [Errno 111]")
    assert "Ray Client cannot train; expected host:port of the head" in refused("ray://127.0.0.1:10001")
    assert refused("local").startswith("no Ray cluster at local; expected the address")
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        assert "leave out --address" in refused(f"127.0.0.1:{other.getsockname()[1]}")


@pytest.fixture
def old_head(monkeypatch):
    """Speaks as the head of a cluster of another Ray does when it is asked whether it is alive."""
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    class OldHead(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def CheckAlive(self, request, context):
            return gcs_service_pb2.CheckAliveReply(ray_version="2.9.3")

    server = grpc.server(futures.ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(OldHead(), server)
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_cluster_of_another_ray(old_head):
    import ray

    message = refused(old_head)
    assert message.startswith(
        f"the cluster at {old_head} runs Ray 2.9.3, this process Ray {ray.__version__}; expected the same"
    )
    assert "pip install 'ray[default,train,tune]==2.9.3' here" in message
