"""infra/deploy/kubernetes holds against Kubernetes' schemas, KubeRay's rules and our own; what is wrong in it is found.

KubeRay's rules are those of its webhook (`ValidateRayClusterSpec`, `ValidateRayJobSpec` of version 1.7).
"""

import configparser
import json
import random
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "infra" / "deploy"
TEXTS = {path.name: path.read_text() for path in sorted((DEPLOY / "kubernetes").iterdir())}
SCHEMA = json.loads(Path(__file__).with_name("kuberay.schema.json").read_text())
KUBERNETES = "1.37"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY|CREDENTIAL")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?")
IMAGE = re.compile(r"[\w.-]+(/[\w.-]+)*:[0-9]+\.[0-9]+[\w.-]*(@sha256:[0-9a-f]{64})?")

# It reads two megabytes of JSON anew for each object.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)


def problems(texts: dict[str, str]) -> list[str]:
    """Everything that is wrong in the files, each with the name of its file."""
    found = [f"{name}: {problem}" for name, text in texts.items() for problem in file_problems(text)]
    return found or list(joint_problems({name: load(text) for name, text in texts.items()}))


@cache
def file_problems(text: str) -> list[str]:
    try:
        return [problem for document in load(text) for problem in document_problems(document)]
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]


def load(text: str) -> list[Any]:
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


def document_problems(document: Any) -> list[str]:
    if not isinstance(document, dict) or not {"apiVersion", "kind", "metadata"} <= document.keys():
        return ["no Kubernetes object"]
    return schema_problems(document) or list(rule_problems(document))


def schema_problems(document: dict) -> list[str]:
    if document["kind"].startswith("Ray"):
        return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(document)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [f"{document['kind']}: {error.message}"]
    return []


def rule_problems(document: dict) -> Iterator[str]:
    if document["kind"] == "Secret":
        yield "a Secret: secrets do not belong in files"
    if document["kind"] != "Namespace" and document["metadata"].get("namespace") != "sagsm":
        yield f"{document['kind']} stands in another namespace"
    if document["kind"] == "NetworkPolicy":
        spec = document["spec"]
        kinds = {"Ingress": spec.get("ingress", []), "Egress": spec.get("egress", [])}
        missing = [kind for kind, rules in kinds.items() if rules and kind not in spec.get("policyTypes", [])]
        yield from (f"rules for {kind}, but policyTypes has it not" for kind in missing)
        yield from ("a rule that lets everybody in" for rule in kinds["Ingress"] if not rule.get("from"))
    if document["kind"].startswith("Ray"):
        yield from kuberay_problems(document["spec"], document["kind"])
    else:
        yield from core_problems(document)
    for pod in pods(document):
        yield from pod_problems(pod)


def core_problems(document: dict) -> Iterator[str]:
    for path, value in leaves(document):
        if path[-1] in ("port", "containerPort") and isinstance(value, int) and not 0 < value < 65536:
            yield f"{'.'.join(map(str, path))} is {value}"
    spec = document.get("spec") or {}
    if document["kind"] == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
        yield f"a Service of type {spec['type']} is reached from outside"
    if "selector" in spec and "template" in spec:
        chosen = spec["selector"].get("matchLabels", {})
        if not chosen.items() <= spec["template"]["metadata"]["labels"].items():
            yield "the selector does not choose the pods of the template"


def kuberay_problems(spec: dict, kind: str) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec") if kind == "RayJob" else spec
    if kind == "RayJob":
        ends = spec.get("shutdownAfterJobFinishes", False)
        if spec.get("ttlSecondsAfterFinished") and not ends:
            yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
        if spec.get("suspend") and not ends:
            yield "suspend needs shutdownAfterJobFinishes"
        if "deletionStrategy" in spec and ends:
            yield "deletionStrategy and shutdownAfterJobFinishes exclude each other"
        if (cluster is None) == (not spec.get("clusterSelector")):
            yield "one of rayClusterSpec and clusterSelector is needed"
        if spec.get("submissionMode") == "SidecarMode" and "submitterPodTemplate" in spec:
            yield "SidecarMode has no submitterPodTemplate"
        if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit"):
            yield "InteractiveMode has no backoffLimit"
    if not isinstance(cluster, dict) or "headGroupSpec" not in cluster:
        return
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token: who reaches the cluster can run anything on it (authOptions.mode)"
    if str(cluster.get("rayVersion")) != RAY:
        yield f"rayVersion is {cluster.get('rayVersion')}, constraints.txt has {RAY}"
    elif Version(RAY) < Version("2.52"):
        yield "tokens need Ray 2.52"
    if cluster.get("autoscalerOptions", {}).get("version") != "v2" or not cluster.get("enableInTreeAutoscaling"):
        yield "expected the in-tree autoscaler, version v2"
    if cluster["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
        yield "the head's service is reached from outside"
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield "the head takes tasks (num-cpus)"
    for group in [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]:
        if group.get("template", {}).get("spec", {}).get("restartPolicy", "Never") != "Never":
            yield "autoscaler v2 needs restartPolicy Never, or none"
        if "labels" in group.get("rayStartParams", {}):
            yield "labels belong into the group's labels"
    for group in cluster.get("workerGroupSpecs", []):
        least, now, most = (
            group.get(name, default) for name, default in (("minReplicas", 0), ("replicas", 0), ("maxReplicas", 0))
        )
        if not (isinstance(most, int) and least <= now <= most):
            yield f"group {group.get('groupName')}: {least} <= {now} <= {most} does not hold"
        if group.get("suspend"):
            yield "a group cannot be suspended under the autoscaler"
    yield from container_problems(
        {"name": "autoscaler", "image": "autoscaler:0.0", **cluster.get("autoscalerOptions", {})}, writes=True
    )


def pods(document: dict) -> Iterator[dict]:
    """Each pod template, wherever it is."""
    for path, value in nodes(document):
        if path and path[-1] in ("template", "submitterPodTemplate") and "spec" in value:
            yield value


def pod_problems(template: dict) -> Iterator[str]:
    wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
    try:
        kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"pod: {error.json_path}: {error.message}"
        return
    spec = template["spec"]
    security = spec.get("securityContext", {})
    if not (security.get("runAsNonRoot") is True and security.get("runAsUser", 0) > 0):
        yield "pod may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "pod without seccompProfile RuntimeDefault"
    yield from (f"pod has {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])} | {"data": {}}
    yield from (f"volume {name} of the node itself" for name, volume in volumes.items() if "hostPath" in volume)
    yield from (
        f"volume {name} has no sizeLimit"
        for name, volume in volumes.items()
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {})
    )
    for container in spec["containers"]:
        yield from container_problems(container)
        yield from (f"no volume {mount['name']}" for mount in container.get("volumeMounts", []) if mount["name"] not in volumes)
        hook = " ".join(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))
        seconds = [int(number) for number in re.findall(r"(?:seconds|timeout) (\d+)", hook)]
        if "drain-node" in hook and (len(seconds) != 2 or max(seconds) >= spec.get("terminationGracePeriodSeconds", 30)):
            yield "the pod is killed before its hook has ended (terminationGracePeriodSeconds)"
        if container["name"] == "ray-worker" and "drain-node" not in hook:
            yield "a worker that goes without a word to Ray (preStop)"


def container_problems(container: dict, *, writes: bool = False) -> Iterator[str]:
    name, security, resources = container["name"], container.get("securityContext", {}), container.get("resources", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield f"{name} may gain privileges"
    if security.get("capabilities", {}).get("drop") != ["ALL"] or security.get("capabilities", {}).get("add"):
        yield f"{name} keeps capabilities"
    if not writes and security.get("readOnlyRootFilesystem") is not True:
        yield f"{name} can write to its image"
    amounts = [amount for kind in ("requests", "limits") for amount in resources.get(kind, {}).values()]
    yield from (f"{amount!r} is no quantity" for amount in amounts if not QUANTITY.fullmatch(str(amount)))
    for kind in ("requests", "limits"):
        yield from (f"{name} has no {kind}.{what}" for what in ("cpu", "memory") if what not in resources.get(kind, {}))
    if not IMAGE.fullmatch(container["image"]) or (
        "/sagsm" in container["image"] and container["image"].split(":")[1] != VERSION
    ):
        yield f"image {container['image']} is not of one version, or not of {VERSION}"
    for variable in container.get("env", []):
        if SECRET.search(variable["name"]) and "valueFrom" not in variable:
            yield f"{variable['name']} is in clear"
        if re.search(r"://[^/]*:[^/]*@", variable.get("value", "")):
            yield f"{variable['name']} holds a password"


def joint_problems(documents: dict[str, list[dict]]) -> Iterator[str]:
    """What no file shows alone."""
    everything = [document for some in documents.values() for document in some]
    by_kind: dict[str, list[dict]] = {}
    for document in everything:
        by_kind.setdefault(document["kind"], []).append(document)
    if by_kind["RayJob"][0]["spec"]["rayClusterSpec"] != by_kind["RayCluster"][0]["spec"]:
        yield "rayjob.yaml and raycluster.yaml: not the same cluster"
    if by_kind["Namespace"][0]["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "base.yaml: the namespace takes any pod"
    policies = [policy["spec"] for policy in by_kind["NetworkPolicy"]]
    if {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} not in policies:
        yield "base.yaml: no policy denies everything"
    labels = [pod.get("metadata", {}).get("labels", {}) for document in everything for pod in pods(document)]
    labels.append({"ray.io/is-ray-node": "yes"})  # KubeRay's own
    for policy in policies:
        wanted = policy["podSelector"].get("matchLabels", {})
        if not any(wanted.items() <= found.items() for found in labels):
            yield f"a NetworkPolicy for pods that do not exist: {wanted}"
    for service in by_kind["Service"]:
        if not any(service["spec"]["selector"].items() <= found.items() for found in labels):
            yield f"mlflow.yaml: service {service['metadata']['name']} chooses no pod"
    yield from mlflow_problems(documents["mlflow.yaml"])


def mlflow_problems(documents: list[dict]) -> Iterator[str]:
    """The server is that of compose.yaml, which test_mlflow.py looks at, but for its names."""
    compose = yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())["services"]["mlflow"]
    [server] = [
        document["spec"]["template"]["spec"]["containers"][0] for document in documents if document["kind"] == "Deployment"
    ]
    own = ("--allowed-hosts=", "--cors-allowed-origins=", "--artifacts-destination=")
    ours, theirs = ([word for word in words if not word.startswith(own)] for words in (server["command"], compose["command"]))
    if ours != theirs:
        yield f"mlflow.yaml: the command is not that of compose.yaml: {sorted(set(ours) ^ set(theirs))}"
    hosts = [word.split("=", 1)[1] for word in server["command"] if word.startswith("--allowed-hosts=")]
    if len(hosts) != 1 or not all(re.fullmatch(r"[a-z0-9.-]+:\d+", host) for host in hosts[0].split(",")):
        yield "mlflow.yaml: expected exact hosts with their port"
    for name in ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"):
        if {"name": name, "value": "false"} not in server["env"]:
            yield f"mlflow.yaml: {name} is not false"
    [settings] = [document["data"]["basic_auth.ini"] for document in documents if document["kind"] == "ConfigMap"]
    parsed = [configparser.ConfigParser(), configparser.ConfigParser()]
    parsed[0].read_string(settings)
    parsed[1].read(DEPLOY / "mlflow" / "basic_auth.ini")
    if parsed[0] != parsed[1]:
        yield "mlflow.yaml: basic_auth.ini is not the file's"


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    if isinstance(value, dict):
        yield path, value
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(child, (*path, key))


def leaves(value: Any) -> Iterator[tuple[tuple, Any]]:
    for path, node in nodes(value):
        yield from (((*path, key), child) for key, child in node.items() if not isinstance(child, dict | list))


def test_the_files_are_right():
    assert problems(TEXTS) == []


MISTAKES = [
    # file, what is there, what somebody wrote instead, what is said about it
    ("base.yaml", "apiVersion: networking.k8s.io/v1\n", "apiVersion: networking.k8s.io/v1beta1\n", "find schema"),
    ("base.yaml", "enforce: restricted", "enforce: privileged", "takes any pod"),
    ("base.yaml", "ReadWriteMany]", "ReadWriteMany", "not YAML"),
    ("base.yaml", "  podSelector: {}\n", "  podSelectors: {}\n", "podSelectors"),
    ("base.yaml", "policyTypes: [Ingress, Egress]\n---", "policyTypes: [Egress]\n---", "no policy denies everything"),
    (
        "base.yaml",
        'matchLabels: {ray.io/is-ray-node: "yes"}\n  policyTypes',
        "matchLabels: {ray.io/is-ray-nod: x}\n  policyTypes",
        "do not exist",
    ),
    ("base.yaml", "{protocol: TCP, port: 6443}", "{protocol: TCP, port: 64430000}", "64430000"),
    (
        "base.yaml",
        "    - from:\n        - podSelector:\n            matchLabels: {ray",
        "    - to:\n        - podSelector:\n            matchLabels: {ray",
        "to",
    ),
    ("rayjob.yaml", "apiVersion: ray.io/v1\n", "apiVersion: ray.io/v1alpha1\n", "'ray.io/v1' was expected"),
    ("rayjob.yaml", "  shutdownAfterJobFinishes: true\n", "", "ttlSecondsAfterFinished needs"),
    ("rayjob.yaml", "shutdownAfterJobFinishes", "shutDownAfterJobFinishes", "shutDownAfterJobFinishes"),
    ("rayjob.yaml", "    authOptions: {mode: token}\n", "", "no token"),
    ("rayjob.yaml", "mode: token", "mode: none", "'none' is not one of"),
    ("rayjob.yaml", "rayVersion: 2.60.0", "rayVersion: 2.9.0", "rayVersion is 2.9.0"),
    ("rayjob.yaml", "rayVersion: 2.60.0", "rayVersion: 2.60", "2.6 is not of type 'string'"),
    ("rayjob.yaml", "runAsUser: 1000", "runAsUser: 0", "root"),
    ("rayjob.yaml", "sagsm:0.1.0", "sagsm:latest", "not of one version"),
    ("rayjob.yaml", "sagsm:0.1.0", "sagsm", "not of one version"),
    ("rayjob.yaml", '                limits: {cpu: "4", memory: 16Gi}\n', "", "no limits.memory"),
    ("rayjob.yaml", "      serviceType: ClusterIP", "      serviceType: LoadBalancer", "reached from outside"),
    ("rayjob.yaml", "terminationGracePeriodSeconds: 120", "terminationGracePeriodSeconds: 30", "killed before its hook"),
    ("rayjob.yaml", "ray drain-node", "ray drain", "without a word"),
    ("rayjob.yaml", "maxReplicas: 8", "maxReplicas: -8", "less than the minimum"),
    ("rayjob.yaml", "replicas: 2\n        minReplicas: 2", "replicas: 1\n        minReplicas: 2", "2 <= 1 <= 2"),
    ("rayjob.yaml", 'num-cpus: "0"', "num-cpus: 0", "0 is not of type 'string'"),
    ("rayjob.yaml", "      version: v2\n", "", "version v2"),
    ("rayjob.yaml", "  submissionMode: K8sJobMode", "  submissionMode: SidecarMode", "SidecarMode"),
    ("rayjob.yaml", "capabilities: {drop: [ALL]}", "capabilities: {add: [SYS_ADMIN]}", "keeps capabilities"),
    ("raycluster.yaml", "kind: RayCluster", "kind: RayClusters", "RayClusters"),
    ("raycluster.yaml", "mode: token", "mode: disabled", "no token"),
    ("raycluster.yaml", "maxReplicas: 8", "maxReplicas: 9", "not the same cluster"),
    ("raycluster.yaml", "  name: sagsm\n", "  name: Sagsm_1\n", "does not match"),
    ("raycluster.yaml", "      rayStartParams: {}\n", "    rayStartParams: {}\n", "not YAML"),
    ("raycluster.yaml", "mountPath: /work}", "mountpath: /work}", "'mountPath' is a required"),
    ("raycluster.yaml", "- {name: work, mountPath", "- {name: wrok, mountPath", "no volume wrok"),
    ("raycluster.yaml", "fsGroup: 1000", "fsGroup: staff", "staff"),
    ("raycluster.yaml", "{name: mlflow-user, key: password}", "hunter2", "hunter2"),
    ("raycluster.yaml", "http://mlflow.sagsm.svc:5000", "http://me:hunter2@mlflow.sagsm.svc:5000", "holds a password"),
    ("raycluster.yaml", "{sizeLimit: 50Gi}", "{}", "sizeLimit"),
    ("mlflow.yaml", "--app-name=basic-auth", "--app-name=none", "not that of compose.yaml"),
    ("mlflow.yaml", "            - --app-name=basic-auth\n", "", "not that of compose.yaml"),
    ("mlflow.yaml", "--allowed-hosts=mlflow.sagsm.svc:5000", "--allowed-hosts=*", "exact hosts"),
    ("mlflow.yaml", "--allowed-hosts=mlflow.sagsm.svc:5000", "--allowed-hosts=10.*", "exact hosts"),
    ("mlflow.yaml", 'DESERIALIZATION, value: "false"', 'DESERIALIZATION, value: "true"', "DESERIALIZATION is not false"),
    ("mlflow.yaml", 'DESERIALIZATION, value: "false"', "DESERIALIZATION, value: false", "False is not of type"),
    (
        "mlflow.yaml",
        "            - {name: PGUSER, value: mlflow}",
        "            - {name: PGPASSWORD, value: hunter2}",
        "PGPASSWORD is in clear",
    ),
    ("mlflow.yaml", "type: ClusterIP", "type: NodePort", "reached from outside"),
    ("mlflow.yaml", "containerPort: 5000", "containerPort: 50000000", "50000000"),
    ("mlflow.yaml", "apiVersion: apps/v1", "apiVersion: extensions/v1beta1", "Couldn't find schema"),
    ("mlflow.yaml", "postgres:17.6-bookworm", "postgres:latest", "not of one version"),
    ("mlflow.yaml", "runAsUser: 999", "runAsUser: 0", "root"),
    ("mlflow.yaml", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "can write to its image"),
    ("mlflow.yaml", "selector: {app.kubernetes.io/name: mlflow}", "selector: {app: mlflow}", "chooses no pod"),
    ("mlflow.yaml", "admin_username = admin\n", "", "is not the file's"),
    ("mlflow.yaml", "kind: ConfigMap", "kind: Secret", "secrets do not belong"),
    ("mlflow.yaml", "memory: 4Gi", "memroy: 4Gi", "no limits.memory"),
    ("mlflow.yaml", "memory: 4Gi", "memory: 4 GB", "is no quantity"),
]


@pytest.mark.parametrize(
    "name, right, wrong, said", MISTAKES, ids=[f"{name}: {wrong.strip()[:40]}" for name, _, wrong, _ in MISTAKES]
)
def test_a_mistake_is_found(name, right, wrong, said):
    assert right in TEXTS[name]
    found = problems({**TEXTS, name: TEXTS[name].replace(right, wrong, 1)})
    assert [problem for problem in found if said in problem], found


@pytest.mark.parametrize("name", TEXTS)
def test_misspelt_fields_are_found(name):
    """Twenty of each file, drawn by a fixed seed; labels, variables and the like are free and not among them."""
    fields = [
        match.span(1)
        for match in re.finditer(r"^[^#\n]*?(?<=[\s{-])([a-z][A-Za-z]+):(?=[ \n])", TEXTS[name], flags=re.MULTILINE)
    ]
    for start, end in random.Random(0).sample(fields, 20):
        misspelt = TEXTS[name][: end - 1] + TEXTS[name][end:]
        assert file_problems(misspelt), TEXTS[name][start:end]
