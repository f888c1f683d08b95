import os
import subprocess
import sys
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.secrets import credentials_in, redact, redact_file, redact_values, split_userinfo

USERS = st.text("abcXYZ019-_.", min_size=1, max_size=12)
PASSWORDS = st.text(min_size=1, max_size=24).filter(lambda text: text.isprintable())


@given(user=USERS, password=PASSWORDS, scheme=st.sampled_from(["http", "https", "postgresql", "s3"]))
def test_no_password_in_a_url_is_shown_and_the_rest_is(user, password, scheme):
    userinfo = f"{user}:{quote(password, safe='')}"
    text = f"cannot reach {scheme}://{userinfo}@host:5000/a/b: refused"
    assert redact(text) == f"cannot reach {scheme}://***@host:5000/a/b: refused"
    assert redact(redact(text)) == redact(text)
    assert credentials_in({"root": [f"{scheme}://{userinfo}@host/a"]})


@given(user=USERS, password=PASSWORDS)
def test_user_and_password_come_out_of_a_url_as_they_were_meant(user, password):
    url = f"https://{user}:{quote(password, safe='')}@host:5000/mlflow"
    assert split_userinfo(url) == ("https://host:5000/mlflow", user, password)
    assert split_userinfo("https://host:5000/mlflow") == ("https://host:5000/mlflow", "", "")


@given(st.text())
def test_a_text_without_secrets_stays_as_it_is(text):
    if "://" not in text:
        assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:ab/cd+ef==@bucket/x", "s3://***@bucket/x"),
        ("https://host/x?X-Amz-Signature=0a1b&X-Amz-Date=1", "https://host/x?X-Amz-Signature=***&X-Amz-Date=***"),
        ("https://host/x?n=1&access_token=abc, then", "https://host/x?n=1&access_token=*** then"),
        ("https://host/x?sig=abc%2F&n=2", "https://host/x?sig=***&n=2"),
        ("https://ghp_0123@host/x", "https://***@host/x"),
        ("postgresql://me:hu/sh@host/x", "postgresql://***@host/x"),
        ("s3://KEY:1/2@bucket/x", "s3://***@bucket/x"),
        ("http://host:5000/x@y", "http://host:5000/x@y"),
        ("s3://bucket/user@example.org/videos", "s3://bucket/user@example.org/videos"),
        ("http://127.0.0.1:5000/#/experiments/1?workflowType=ml", "http://127.0.0.1:5000/#/experiments/1?workflowType=ml"),
        ("ask me@example.org", "ask me@example.org"),
    ],
)
def test_what_is_masked(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("s3://KEY:SECRET@bucket/x", True),
        ("s3://KEY:SEC/RET@bucket/x", True),
        ("s3://bucket/x?access_key=a&secret_key=b", True),
        ("https://host/weights.pth?X-Amz-Signature=a", True),
        ({"values": ["none", "https://me@host/x"]}, True),
        ("s3://bucket/user@example/x", False),
        ("https://host:8443/weights@2.pth", False),
        ("/data/what?/is@this", False),
        ("see https://host/x?a=b", False),
        (3, False),
        (None, False),
    ],
)
def test_settings_with_credentials_are_told_apart(value, expected):
    assert credentials_in(value) is expected


def test_secrets_of_the_environment_are_masked_wherever_they_are(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pl/anted+secret")
    monkeypatch.setenv("SOME_API_TOKEN", "planted-token")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:planted%20proxy@proxy:3128")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    text = "pl/anted+secret pl%2Fanted%2Bsecret planted-token 'planted proxy' planted%20proxy /var/run/secrets/token true"
    assert redact(text) == "*** *** *** '***' *** /var/run/secrets/token true"
    assert redact_values({"a": ["planted-token", 1, None], "b": {"c": "x"}}) == {"a": ["***", 1, None], "b": {"c": "x"}}
    picture = b"\x89PNG\xff planted-token http://a:b@c"
    assert redact_file(picture) == b"\x89PNG\xff *** http://a:b@c"


def test_nothing_that_python_prints_shows_a_secret():
    code = (
        "import logging, sys, warnings\n"
        "from infra.secrets import guard_output\n"
        "guard_output()\n"
        "print('out planted-token', flush=True); sys.stderr.writelines(['err ', 'planted-token\\n'])\n"
        "logging.warning('log %s', 'planted-token'); warnings.warn('planted-token')\n"
        "assert not sys.stdout.isatty() and sys.stdout.fileno() == 1\n"
        "raise OSError('http://me:hush@host planted-token')\n"
    )
    environment = {**os.environ, "SOME_API_TOKEN": "planted-token"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stdout == "out ***\n"
    assert "err ***" in done.stderr
    assert "log ***" in done.stderr
    assert "OSError: http://***@host ***" in done.stderr
    assert "planted" not in done.stderr
