"""Who may use a Ray cluster: whoever holds its token. Whom Ray lets in may run any code.

In Ray 2.60 only a cluster that `ray.init` starts asks for a token by itself, and the file that Ray makes for it can be read by
all users of the machine; one that `ray start` starts asks only where a token or `RAY_AUTH_MODE=token` is found. A driver with a
wrong token hears of it after 20 seconds, as "Failed to connect". Here the token is the rule, its file is private, and an
existing cluster is asked first, in milliseconds.
"""

import os
import secrets
import stat
from pathlib import Path
from typing import Any

from infra.errors import ClusterError

_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_ANSWER_SECONDS = 5.0


def token_file() -> Path:
    """Where Ray looks for the token if `RAY_AUTH_TOKEN` does not hold it."""
    return Path(os.environ.get(_TOKEN_FILE) or "~/.ray/auth_token").expanduser()


def provide_token() -> None:
    """Let the cluster that this process starts next ask for a token, and make one unless one is configured.

    `RAY_AUTH_MODE=disabled` is left as it is: somebody wants it so.

    Raises:
        ClusterError: if the file for the token cannot be written.
    """
    if not _wants_token() or os.environ.get(_TOKEN):
        return
    path = token_file()
    try:
        if not path.exists():
            _write_token(path)
        elif not os.environ.get(_TOKEN_FILE) and stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)  # Ray made it
    except OSError as error:
        raise ClusterError(
            f"cannot keep the token of the Ray cluster in {path}: {error}; "
            f"let {_TOKEN_FILE} name a file that this user can write"
        ) from error


def require_entry(address: str) -> str:
    """Ask the cluster at `address` whether it lets this process in, and which Ray it runs.

    Args:
        address: host:port of its head (its GCS).

    Returns:
        The cluster's version of Ray.

    Raises:
        ClusterError: if nothing answers there; if it asks for a token and there is none, or another; if it lets everybody in
            and `RAY_AUTH_MODE` does not say that this is meant.
    """
    stranger = _ask(address, None)
    if stranger is not None:
        if _wants_token():
            raise ClusterError(
                f"the Ray cluster at {address} lets everybody in who can reach it; expected one that asks for a token: "
                f"start all its nodes with {_MODE}=token and the same {_TOKEN_FILE}, or, where nobody else reaches it, set "
                f"{_MODE}=disabled here too"
            )
        return stranger
    if not _wants_token():
        raise ClusterError(
            f"the Ray cluster at {address} asks for a token, but here {_MODE} is {os.environ[_MODE]!r}; unset it, and let "
            f"{_TOKEN_FILE} name a file with the cluster's token"
        )
    token, place = _read_token()
    if not token:
        raise ClusterError(
            f"the Ray cluster at {address} asks for a token, and there is none in {place}; "
            f"let {_TOKEN_FILE} name a file with the cluster's token (on its head `ray get-auth-token` prints it)"
        )
    version = _ask(address, token)
    if version is None:
        raise ClusterError(
            f"the Ray cluster at {address} refuses the token in {place}; let {_TOKEN_FILE} name a file with the cluster's own "
            "(on its head `ray get-auth-token` prints it)"
        )
    return version


def _wants_token() -> bool:
    """Whether this process uses tokens; sets the default. Ray forgets what it has read of all this so far."""
    from ray import _raylet

    compiled: Any = _raylet
    os.environ.setdefault(_MODE, "token")
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()
    return os.environ[_MODE].lower() == "token"


def _write_token(path: Path) -> None:
    """Never over another one: two runs may start at the same moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(descriptor)
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _read_token() -> tuple[str, str]:
    """The token, "" if there is none, and where it is or should be."""
    if token := os.environ.get(_TOKEN):
        return token, _TOKEN
    path = token_file()
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    return text if text.isascii() and text.isprintable() else "", str(path)


def _ask(address: str, token: str | None) -> str | None:
    """The cluster's version of Ray; None if it does not accept the token."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2  # made when it is imported
    with _channel(address) as channel:
        service: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]  # Ray
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            answer = service.CheckAlive(messages.CheckAliveRequest(), timeout=_ANSWER_SECONDS, metadata=metadata)
            return str(answer.ray_version)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return None
            raise ClusterError(
                f"no Ray cluster at {address}: {error.details()}; expected the address that `ray status` or `ray start --head` "
                "prints; leave out --address to use this machine"
            ) from error


def _channel(address: str) -> Any:
    import grpc
    from ray._common.tls_utils import load_certs_from_env

    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address)
    try:
        chain, key, root = load_certs_from_env()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    except (RuntimeError, OSError) as error:
        raise ClusterError(f"RAY_USE_TLS is set, but the certificates of Ray cannot be read: {error}") from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root, key, chain))
