"""What tests of several packages share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """The URL of an empty bucket on an S3 server of our own; the environment leads pyarrow there for the rest of the module."""
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        yield "s3://bucket"
        client.close()
    server.stop()
