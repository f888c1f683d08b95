import datetime
import hashlib
import http.server
import ipaddress
import logging
import ssl
import threading
import urllib.error

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from models import BACKBONE_SOURCES, create_model, list_models, load_backbone_weights
from models.factory import build_model


def small(name="tsn_resnet18"):
    return build_model(name, num_classes=3, num_segments=2)


def save(state, path):
    torch.save(state, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def published():
    """A file as torchvision's: the backbone and the layer of 1,000 classes."""
    torch.manual_seed(1)
    state = small().base_model.state_dict()
    return state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize("name", ["tsn_resnet18", "tsm_resnet18", "sa_gsm_resnet18"])
def test_the_backbone_is_filled_and_the_rest_is_kept(name, published, tmp_path, caplog):
    digest = save(published, tmp_path / "weights.pth")
    model = small(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="models.imagenet"):
        names = load_backbone_weights(model, tmp_path / "weights.pth", sha256_prefix=digest[:8].upper())
    assert names.unexpected == ("fc.weight", "fc.bias")
    own = {key for key in model.base_model.state_dict() if ".gsm." in key and not key.endswith("num_batches_tracked")}
    assert set(names.missing) == own
    assert bool(own) == (name == "sa_gsm_resnet18")
    assert f"kept {len(own)} of its own, left fc.weight, fc.bias unused" in caplog.text
    for key, tensor in model.state_dict().items():
        source = published.get(key.removeprefix("base_model."))
        assert torch.equal(tensor, before[key] if source is None else source), key


def test_batch_norms_of_the_published_bn_inception_have_an_axis_of_one(tmp_path):
    model = small("gsm_bn_inception")
    source = build_model("tsn_bn_inception", num_classes=3, num_segments=2).base_model.state_dict()
    state = {name: tensor[None] if "_bn." in name and tensor.dim() else tensor for name, tensor in source.items()}
    digest = save(state, tmp_path / "bn.pth")
    load_backbone_weights(model, tmp_path / "bn.pth", sha256_prefix=digest[:16])
    assert all(torch.equal(model.base_model.state_dict()[name], tensor) for name, tensor in source.items())


def test_what_does_not_fit_is_in_one_message_and_nothing_is_loaded(published, tmp_path):
    state = {name: tensor for name, tensor in published.items() if name != "bn1.weight"}
    state |= {"conv1.weight": torch.zeros(64, 1, 7, 7), "AuxLogits.fc.weight": torch.zeros(2)}
    digest = save(state, tmp_path / "weights.pth")
    model = small()
    before = model.base_model.layer1[0].conv1.weight.clone()
    with pytest.raises(ValueError) as refused:
        load_backbone_weights(model, tmp_path / "weights.pth", sha256_prefix=digest[:8])
    assert str(refused.value).splitlines() == [
        f"{tmp_path / 'weights.pth'} does not fit the backbone ResNet:",
        "  missing: bn1.weight [64]",
        "  unexpected: AuxLogits.fc.weight [2]",
        "  shape: conv1.weight is [64, 1, 7, 7], expected [64, 3, 7, 7]",
    ]
    assert torch.equal(model.base_model.layer1[0].conv1.weight, before)


def test_another_file_than_expected_is_refused(published, tmp_path):
    digest = save(published, tmp_path / "resnet18-f37072fd.pth")
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, which does not begin with 00000000"):
        load_backbone_weights(small(), tmp_path / "resnet18-f37072fd.pth", sha256_prefix="0" * 8)
    with pytest.raises(ValueError, match="does not begin with f37072fd"):  # the known file name stands for its known hash
        load_backbone_weights(small(), tmp_path / "resnet18-f37072fd.pth")


@pytest.mark.parametrize("prefix", [None, "", "f37072f", "not hexadecimal"])
def test_without_the_hash_nothing_is_read(prefix, tmp_path):
    with pytest.raises(ValueError, match=r"own\.pth needs the first digits of its SHA-256, at least 8 of them"):
        load_backbone_weights(small(), tmp_path / "own.pth", sha256_prefix=prefix)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/w.pth", "file:///w.pth", "ftp://127.0.0.1/w.pth"])
def test_other_schemes_than_https_are_refused(url):
    with pytest.raises(ValueError, match=f"weights are fetched over https only, not from {url}"):
        load_backbone_weights(small(), url, sha256_prefix="f37072fd")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_backbone_weights(small(), tmp_path / "nowhere.pth", sha256_prefix="f37072fd")


def test_known_sources_carry_the_prefix_of_their_hash():
    assert BACKBONE_SOURCES["bn_inception"][1] == "9f5701afb96c8044"
    assert {name.removesuffix("_v2") for name in BACKBONE_SOURCES} == {name[4:] for name in list_models() if name[:4] == "tsn_"}
    assert all(url.startswith("https://") and f"-{prefix}.pth" in url for url, prefix in BACKBONE_SOURCES.values())


def test_without_weights_a_network_says_that_it_is_random(published, tmp_path, caplog):
    create_model("tsn_resnet18", num_classes=3, num_segments=2)
    assert caplog.messages == ["tsn_resnet18: random initialisation; no weights were given for its backbone"]
    caplog.clear()
    save(published, tmp_path / "resnet18-f37072fd.pth")
    with pytest.raises(ValueError, match="does not begin with f37072fd"):
        create_model("tsn_resnet18", num_classes=3, num_segments=2, backbone_weights=tmp_path / "resnet18-f37072fd.pth")
    assert "random initialisation" not in caplog.text


class Server:
    """A server on this machine that shows a certificate which it signed itself."""

    def __init__(self, folder):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
        now = datetime.datetime.now(datetime.UTC)
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
        )
        builder = builder.add_extension(address, critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        plain = serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        (folder / "both.pem").write_bytes(certificate + private)
        self.certificate = folder / "certificate.pem"
        self.certificate.write_bytes(certificate)
        self.answers = {}
        self.asked = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                status, headers, body = server.answers[self.path]
                self.send_response(status)
                for header in headers.items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None  # a client that hangs up is what is expected
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "both.pem")
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        self.url = f"https://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    running = Server(tmp_path)
    yield running
    running.http.shutdown()
    running.thread.join()
    running.http.server_close()


def test_a_server_that_does_not_prove_who_it_is_is_refused(server, published, tmp_path, monkeypatch):
    """Also in a process that has switched the verification of urllib off, as many scripts do."""
    digest = save(published, tmp_path / "w.pth")
    server.answers["/w.pth"] = (200, {}, (tmp_path / "w.pth").read_bytes())
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(ssl, "_create_default_https_context", ssl._create_unverified_context)
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            load_backbone_weights(small(), f"{server.url}/w.pth", sha256_prefix=digest[:8])
    assert server.asked == []
    assert list((tmp_path / "torch" / "hub" / "checkpoints").iterdir()) == []


def test_a_server_that_is_trusted_is_read_once_and_its_file_checked_each_time(server, published, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
    digest = save(published, tmp_path / "w.pth")
    server.answers["/w.pth"] = (200, {}, (tmp_path / "w.pth").read_bytes())
    model = small()
    for _ in range(2):
        load_backbone_weights(model, f"{server.url}/w.pth", sha256_prefix=digest[:8])
    assert torch.equal(model.base_model.conv1.weight, published["conv1.weight"])
    assert server.asked == ["/w.pth"]
    [kept] = (tmp_path / "torch" / "hub" / "checkpoints").iterdir()
    kept.write_bytes(b"tampered with")
    with pytest.raises(ValueError, match=f"{kept.name} has the SHA-256"):
        load_backbone_weights(model, f"{server.url}/w.pth", sha256_prefix=digest[:8])


def test_wrong_bytes_and_redirects_to_http_leave_nothing_behind(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
    server.answers["/wrong.pth"] = (200, {}, b"something else")
    server.answers["/moved.pth"] = (302, {"Location": "http://127.0.0.1:1/w.pth"}, b"")
    with pytest.raises(ValueError, match=r"/wrong.pth has the SHA-256 \w+, which does not begin with f37072fd"):
        load_backbone_weights(small(), f"{server.url}/wrong.pth", sha256_prefix="f37072fd")
    with pytest.raises(ValueError, match=r"fetched over https only, not from http://127\.0\.0\.1:1/w\.pth"):
        load_backbone_weights(small(), f"{server.url}/moved.pth", sha256_prefix="f37072fd")
    assert list((tmp_path / "torch" / "hub" / "checkpoints").iterdir()) == []
