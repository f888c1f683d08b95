"""infra/deploy/ray_up holds against Ray's schema and validators, Amazon's own models of its requests, and our rules."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[3]
TEXTS = {path.name: path.read_text() for path in sorted((ROOT / "infra" / "deploy" / "ray_up").iterdir())}
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TOKEN = re.compile(r".*\.ray/auth_token")
PROVIDER = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group"},
    "local": {"type", "head_ip", "worker_ips"},
}


@pytest.fixture(scope="module")
def amazon() -> Any:
    """The shapes of EC2's requests; no network."""
    return botocore.session.get_session().get_service_model("ec2")


def problems(text: str, amazon: Any) -> list[str]:
    try:
        config = yaml.load(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    found = [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(config)]
    if found:
        return found
    try:
        validate_config(prepare_config(config))
    except Exception as error:  # Ray raises what comes
        return [f"{type(error).__name__}: {error}"]
    return [*rule_problems(config), *node_problems(config, amazon)]


def rule_problems(config: dict) -> Iterator[str]:
    provider = config["provider"]
    if provider["type"] not in PROVIDER:
        yield f"provider {provider['type']} is none that we know"
        return
    yield from (f"provider.{name} is no setting" for name in provider.keys() - PROVIDER[provider["type"]])
    if (
        config.get("file_mounts", {}).get(next(filter(TOKEN.fullmatch, config.get("file_mounts", {})), ""))
        != "~/.ray/auth_token"
    ):
        yield "the token does not get to the nodes as a file"
    if re.search(r"RAY_AUTH_TOKEN=|AWS_SECRET_ACCESS_KEY|[0-9a-f]{32}", yaml.safe_dump(config)):
        yield "a secret in clear"
    options = " ".join(config.get("docker", {}).get("run_options", []))
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(name, []) if "ray start" in command]
        if len(starts) != 1:
            yield f"{name}: expected one `ray start`"
            continue
        if "RAY_AUTH_MODE=token" not in starts[0] + options:
            yield f"{name}: no token: who reaches the cluster can run anything on it"
        if provider["type"] == "local":  # on Amazon the security group keeps others out
            closed = ["RAY_enable_metrics_collection=0"]
            closed += ["DASHBOARD_METRIC_PORT=-1", "AUTOSCALER_METRIC_PORT=-1"] if name.startswith("head") else []
            yield from (f"{name}: Ray's metrics are open to all, without {word}" for word in closed if word not in starts[0])
        wanted = ["--head", "--port=6379", "--dashboard-host=127.0.0.1", "--autoscaling-config=~/ray_bootstrap_config.yaml"]
        for word in wanted if name.startswith("head") else ["--address=$RAY_HEAD_IP:6379"]:
            if word not in starts[0]:
                yield f"{name}: expected {word}"
    if "docker" in config:
        image = config["docker"].get("image", "")
        if not re.fullmatch(rf"[\w.-]+(/[\w.-]+)+:{re.escape(VERSION)}(@sha256:[0-9a-f]{{64}})?", image):
            yield f"image {image} is not of version {VERSION}"
        if "--privileged" in options or "--cap-drop ALL" not in options or "no-new-privileges:true" not in options:
            yield "the containers keep capabilities"
    for name, kind in config.get("available_node_types", {}).items():
        if not 0 <= kind.get("min_workers", 0) <= kind.get("max_workers", 0) and name != config["head_node_type"]:
            yield f"{name}: min_workers is above max_workers"
    if "available_node_types" in config:
        if config["available_node_types"][config["head_node_type"]]["resources"].get("CPU") != 0:
            yield "the head takes tasks"
        if sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values()) > config.get("max_workers", 2):
            yield "max_workers is less than the groups' together"
    else:
        addresses = [provider["head_ip"], *provider["worker_ips"]]
        yield from (f"{address} is no address" for address in addresses if not re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", address))
        if len(set(addresses)) < len(addresses):
            yield "an address stands there twice"


def node_problems(config: dict, amazon: Any) -> Iterator[str]:
    if config["provider"]["type"] != "aws":
        return
    if config["provider"].get("use_internal_ips") is not True:
        yield "the nodes have public addresses"
    validator = botocore.validate.ParamValidator()
    rules = config["provider"].get("security_group", {}).get("IpPermissions", [])
    shape = amazon.operation_model("AuthorizeSecurityGroupIngress").input_shape
    yield from report(validator.validate({"IpPermissions": rules}, shape))
    for rule in rules:
        if rule.get("FromPort") != 22 or rule.get("ToPort") != 22:
            yield "a port besides that of ssh is open"
        if any(source["CidrIp"].endswith("/0") for source in rule.get("IpRanges", [])) or not rule.get("IpRanges"):
            yield "ssh is open to everybody"
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        request = {"MinCount": 1, "MaxCount": 1, **node}
        yield from (
            f"{name}: {line}"
            for line in report(validator.validate(request, amazon.operation_model("RunInstances").input_shape))
        )
        if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{name}: a video's decoder could ask the metadata service for keys"
        if not all(device["Ebs"].get("Encrypted") for device in node.get("BlockDeviceMappings", [])):
            yield f"{name}: a disk is not encrypted"
        if not {"InstanceType", "ImageId", "IamInstanceProfile"} <= node.keys():
            yield f"{name}: expected InstanceType, ImageId, IamInstanceProfile"


def report(errors: Any) -> list[str]:
    return [errors.generate_report()] if errors.has_errors() else []


@pytest.mark.parametrize("name", TEXTS)
def test_the_files_are_right(name, amazon):
    assert problems(TEXTS[name], amazon) == []


MISTAKES = [
    ("aws.yaml", "cluster_name: sagsm\n", "", "'cluster_name' is a required property"),
    ("aws.yaml", "max_workers: 10\n", "max_worker: 10\n", "max_worker"),
    ("aws.yaml", "max_workers: 10\n", "max_workers: ten\n", "'ten' is not of type 'integer'"),
    ("aws.yaml", "max_workers: 10\n", "max_workers: 4\n", "less than the groups' together"),
    ("aws.yaml", "  type: aws\n", "  type: awss\n", "awss"),
    ("aws.yaml", "  region: us-west-2\n", "  regoin: us-west-2\n", "regoin"),
    ("aws.yaml", "  use_internal_ips: true\n", "", "public addresses"),
    ("aws.yaml", "CidrIp: 10.0.0.0/8", "CidrIp: 0.0.0.0/0", "open to everybody"),
    ("aws.yaml", "FromPort: 22\n        ToPort: 22", "FromPort: 22\n        ToPort: 8265", "besides that of ssh"),
    ("aws.yaml", "FromPort: 22", "FromPort: ssh", "FromPort"),
    ("aws.yaml", "IpProtocol", "Protocol", "Protocol"),
    ("aws.yaml", "sagsm:0.1.0", "sagsm:latest", "not of version"),
    ("aws.yaml", "    - --cap-drop ALL\n", "    - --privileged\n", "keep capabilities"),
    ("aws.yaml", "    - --env RAY_AUTH_MODE=token\n", "", "no token"),
    ("aws.yaml", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef", "a secret in clear"),
    ("aws.yaml", "  /home/sagsm/.ray/auth_token: ~/.ray/auth_token\n", "  {}\n", "as a file"),
    ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "expected --dashboard-host=127.0.0.1"),
    ("aws.yaml", "--port=6379 ", "", "expected --port=6379"),
    ("aws.yaml", "head_node_type: head", "head_node_type: haed", "must be one of"),
    ("aws.yaml", "resources: {CPU: 0}", "resources: {CPU: 8}", "the head takes tasks"),
    ("aws.yaml", "resources: {CPU: 0}", "resources: {CPU: -1}", "less than the minimum"),
    ("aws.yaml", "min_workers: 2\n    max_workers: 2", "min_workers: 3\n    max_workers: 2", "gpu: min_workers"),
    ("aws.yaml", "InstanceType: c7i", "InstancesType: c7i", "InstancesType"),
    ("aws.yaml", "MarketType: spot", "MarktType: spot", "MarktType"),
    ("aws.yaml", "HttpTokens: required", "HttpTokens: optional", "metadata"),
    ("aws.yaml", "Encrypted: true", "Encrypted: false", "not encrypted"),
    ("aws.yaml", "VolumeSize: 200", "VolumeSize: 200GB", "VolumeSize"),
    ("aws.yaml", "   resources: {}\n", "  resources: {}\n", "not YAML"),
    ("aws.yaml", "worker_setup_commands: []", "worker_setup_commands: make", "'make' is not of type 'array'"),
    ("machines.yaml", "  type: local\n", "  type: machines\n", "machines"),
    ("machines.yaml", "  head_ip: 10.0.0.10\n", "", "head_ip"),
    ("machines.yaml", "head_ip: 10.0.0.10", "head_ip: 10.0.0", "no address"),
    ("machines.yaml", "10.0.0.12]", "10.0.0.11]", "twice"),
    ("machines.yaml", "worker_ips: [10.0.0.11, 10.0.0.12]", "worker_ips: 10.0.0.11", "is not of type 'array'"),
    ("machines.yaml", "worker_ips:", "workers_ips:", "ips"),
    ("machines.yaml", "ssh_user", "user", "'user' was unexpected"),
    ("machines.yaml", "auth:\n", "auth: {}\n", "not YAML"),
    ("machines.yaml", "  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "as a file"),
    (
        "machines.yaml",
        "    RAY_AUTH_MODE=token RAY_task_oom_retries=3 RAY_worker_niceness=0 RAY_enable",
        "    RAY_enable",
        "worker_start_ray_commands: no token",
    ),
    ("machines.yaml", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "head_start_ray_commands: no token"),
    ("machines.yaml", "--address=$RAY_HEAD_IP:6379", "--address=$HEAD_IP:6379", "expected --address"),
    ("machines.yaml", "--dashboard-host=127.0.0.1 ", "", "expected --dashboard-host"),
    ("machines.yaml", " --autoscaling-config=~/ray_bootstrap_config.yaml", "", "expected --autoscaling-config"),
    ("machines.yaml", "head_start_ray_commands", "head_start_commands", "head_start_commands"),
    ("machines.yaml", 'rsync_exclude: [".git"', 'rsync_exclude: ".git", ["x"', "not YAML"),
    (
        "machines.yaml",
        "setup_commands:\n  - make --directory",
        "setup_commands:\n  - run: make --directory",
        "is not of type 'string'",
    ),
    ("machines.yaml", "cluster_name: sagsm", "cluster_name: 1", "1 is not of type 'string'"),
    ("machines.yaml", "RAY_enable_metrics_collection=0 DASH", "DASH", "without RAY_enable_metrics_collection=0"),
    ("machines.yaml", "DASHBOARD_METRIC_PORT=-1", "DASHBOARD_METRIC_PORT=44227", "without DASHBOARD_METRIC_PORT=-1"),
    ("machines.yaml", " AUTOSCALER_METRIC_PORT=-1", "", "without AUTOSCALER_METRIC_PORT=-1"),
]


@pytest.mark.parametrize(
    "name, right, wrong, said", MISTAKES, ids=[f"{name}: {wrong.strip()[:40]}" for name, _, wrong, _ in MISTAKES]
)
def test_a_mistake_is_found(name, right, wrong, said, amazon):
    assert right in TEXTS[name]
    found = problems(TEXTS[name].replace(right, wrong, 1), amazon)
    assert [problem for problem in found if said in problem], found
