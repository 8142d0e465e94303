"""What cluster/ ships: valid, authenticated, closed by default, without secrets, pinned."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPO = Path(__file__).parents[2]
CLUSTER = REPO / "cluster"
MANIFESTS = sorted(CLUSTER.rglob("*.yaml"))
SCRIPTS = {"entrypoint.sh": "sh", "slurm/solvus.sbatch": "bash"}
TEXTS = sorted(p for p in CLUSTER.rglob("*") if p.is_file() and p.name != ".env")
VERSION = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPO / "constraints.txt").read_text(), re.M))


@cache
def documents(name: str) -> list[Any]:
    """The YAML documents of a file below cluster/."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def walk(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value with its path."""
    yield path, data
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from walk(value, (*path, key))


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """Schema of a mapping with these keys and no others; the first argument names those that must be there."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}


def listed(item: Any, at_least: int = 1) -> dict[str, Any]:
    """Schema of a list."""
    return {"type": "array", "items": item, "minItems": at_least}


# --- All files -------------------------------------------------------------------------------------------------------


def test_the_files_are_there() -> None:
    names = {str(path.relative_to(CLUSTER)) for path in TEXTS}
    assert names >= {
        "Dockerfile", "Dockerfile.dockerignore", "entrypoint.sh", "compose.yaml", ".env.example", ".gitignore",
        "kuberay/namespace.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/networkpolicy.yaml",
        "kuberay/secrets.example.yaml", "slurm/solvus.sbatch", "launcher/aws.yaml", "launcher/gcp.yaml",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".yml")]
    assert ".env" in (CLUSTER / ".gitignore").read_text().split()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: str(p.relative_to(CLUSTER)))
def test_yaml_parses_and_repeats_no_key(path: Path) -> None:
    raw = yaml.compose_all(path.read_text(), Loader=yaml.SafeLoader)
    for document in raw:
        for node in nodes(document):
            if isinstance(node, yaml.MappingNode):
                own = [key.value for key, _ in node.value if key.value != "<<"]
                assert len(own) == len(set(own)), f"line {node.start_mark.line + 1}: {own}"
    assert all(document is not None for document in documents(str(path.relative_to(CLUSTER))))


def nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    """A YAML node and all below it."""
    yield node
    children = node.value if isinstance(node.value, list) else []
    for child in children:
        for each in child if isinstance(child, tuple) else (child,):
            yield from nodes(each)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(CLUSTER)))
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", text), "an AWS key"
    assert not re.search(r"-----BEGIN", text), "a private key"
    assert not re.search(r"\b[0-9a-f]{32,}\b", text), "a token or a digest"
    assert not re.search(r"\b(?:ghp|gho|hf|glpat|xox[bp])[_-][A-Za-z0-9_-]{16,}", text), "a token of a service"
    assert not re.search(r"\b[A-Za-z][\w+.-]*://[^\s/:@\"']+:[^\s@/\"']+@", text), "a password in a URL"
    for value in re.findall(r"(?i)(?:password|secret|token|_key)\w*[\"']?[ \t]*[:=][ \t]*[\"']?([\w+/-]{12,})", text):
        assert value.startswith(("REPLACE_ME", "solvus-")) or not re.search(r"\d", value), (
            f"{value} looks like a secret"
        )


def images() -> Iterator[tuple[str, str]]:
    """Every image that a manifest or the Dockerfile names, with its file."""
    for path in MANIFESTS:
        for document in documents(str(path.relative_to(CLUSTER))):
            for where, value in walk(document):
                if where and where[-1] in ("image", "sourceImage") and isinstance(value, str):
                    yield str(path.relative_to(CLUSTER)), value
    text = (CLUSTER / "Dockerfile").read_text()
    for value in re.findall(r"^FROM (\S+)", text, re.M):
        yield "Dockerfile", re.sub(r"\$\{BASE\}", re.findall(r"^ARG BASE=(\S+)$", text, re.M)[0], value)


def test_every_image_is_pinned() -> None:
    found = list(images())
    assert len(found) > 10
    for name, image in found:
        if image.startswith("projects/"):  # an image of a cloud, by family
            assert re.search(r"/images/family/[\w-]*\d{4}", image), f"{name}: {image}"
            continue
        tag = image.rpartition(":")[2] if ":" in image else ""
        assert re.match(r"\d", tag), f"{name}: {image} has no version"
        if "solvus" in image:
            assert tag in (VERSION, f"{VERSION}-cuda"), f"{name}: {image} is not version {VERSION}"


@pytest.mark.parametrize(("name", "shell"), SCRIPTS.items())
def test_scripts_parse_and_stop_at_errors(name: str, shell: str) -> None:
    path = CLUSTER / name
    text = path.read_text()
    for each in {shell, "bash"}:
        subprocess.run([each, "-n", str(path)], check=True, timeout=10)
    assert text.startswith(f"#!/bin/{shell}\n")
    assert re.search(r"^set -eu", text, re.M)
    assert os.access(path, os.X_OK)
    assert "\t" not in text and not re.search(r" +$", text, re.M)
    code = re.sub(r"(?m)(^|\s)#.*$", "", text)
    assert not re.search(r"\b(pkill|killall|ray stop|eval)\b|\bkill -9 -1\b|`", code)
    assert not re.search(r"\[ [^]]*==", code) or shell == "bash", "sh has no =="
    # Every expansion of arguments is quoted.
    assert not re.search(r'(?<!")\$[@*](?!")', code)


def test_long_lines() -> None:
    for path in TEXTS:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 140, f"{path}:{number}"


# --- Image -----------------------------------------------------------------------------------------------------------


def test_the_image_runs_as_nobody_special_and_is_pinned_by_the_constraints() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    joined = re.sub(r"\\\n\s*", " ", text)
    final = joined.rsplit("\nFROM ", 1)[1]
    assert re.findall(r"^USER (\S+)$", final, re.M) == ["10001:10001"]
    assert final.index("USER ") > final.index("RUN echo")
    installs = re.findall(r"pip install (?!-c constraints\.txt)", joined)
    assert "pip install" in joined and not installs
    assert {"RAY_AUTH_MODE=token", "OMP_NUM_THREADS=1"} <= set(final.split())
    assert 'ENTRYPOINT ["/usr/local/bin/solvus-entrypoint"]' in final
    assert not re.search(r"(?i)^(ARG|ENV) .*(password|secret|_key|token=(?!\S*token))", joined, re.M)
    assert not re.search(r"^ADD ", joined, re.M)


def test_the_build_context_holds_what_the_image_copies_and_little_else() -> None:
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n")
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines, "everything else stays out"
    assert not [name for name in allowed if name.startswith((".git", ".env", "runs", "tests"))]
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", (CLUSTER / "Dockerfile").read_text(), re.M):
        words = [word for word in line.split() if not word.startswith("--")]
        copied |= set(words[:-1])
    assert copied == allowed
    assert all((REPO / name).exists() for name in copied)
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"^ARG EXTRAS=(\S+)$", (CLUSTER / "Dockerfile").read_text(), re.M)[0].split(",")
    assert {"s3", "postgres"} <= set(asked) <= set(extras)
    packages = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= copied


# --- KubeRay ---------------------------------------------------------------------------------------------------------

SECURE = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
ENV = {
    "oneOf": [
        closed("name value", name=TEXT, value={"type": "string"}),
        closed(
            "name valueFrom",
            name=TEXT,
            valueFrom=closed("secretKeyRef", secretKeyRef=closed("name key", name=TEXT, key=TEXT)),
        ),
    ]
}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}
RESOURCES = {"type": "object", "required": ["cpu", "memory"], "additionalProperties": QUANTITY}
PROBE = closed(
    "httpGet",
    httpGet=closed("path port", path={"const": "/api/healthz"}, port={"const": 52365}),
    **{name: COUNT for name in ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold")},
)
MOUNTS = listed(closed("name mountPath", name=TEXT, mountPath={"type": "string", "pattern": "^/"}))
CONTAINER = closed(
    "name image securityContext resources env volumeMounts",
    name={"type": "string", "pattern": "^[a-z0-9-]+$"},
    image=TEXT,
    securityContext={"const": SECURE},
    resources=closed("requests limits", requests=RESOURCES, limits=RESOURCES),
    env=listed(ENV),
    volumeMounts=MOUNTS,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    ports=listed(closed("name containerPort", name=TEXT, containerPort=COUNT)),
)
VOLUME = closed("name emptyDir", name=TEXT, emptyDir=closed("sizeLimit", sizeLimit=QUANTITY))
POD = closed(
    "containers volumes securityContext enableServiceLinks",
    containers={**listed(CONTAINER), "maxItems": 1},
    volumes=listed(VOLUME),
    securityContext=closed(
        "runAsNonRoot runAsUser seccompProfile",
        runAsNonRoot={"const": True},
        runAsUser={"const": 10001},
        runAsGroup={"const": 10001},
        fsGroup={"const": 10001},
        seccompProfile={"const": {"type": "RuntimeDefault"}},
    ),
    enableServiceLinks={"const": False},
    automountServiceAccountToken={"const": False},
    terminationGracePeriodSeconds={"type": "integer", "minimum": 45},
    tolerations=listed(closed("key operator effect", key=TEXT, operator={"const": "Exists"}, effect=TEXT)),
    restartPolicy={"const": "Never"},
)
TEMPLATE = closed("metadata spec", metadata=closed("labels", labels=LABELS), spec=POD)
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}  # KubeRay takes strings only
RAY_CLUSTER = closed(
    "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=closed("mode secretName", mode={"const": "token"}, secretName=TEXT),
    enableInTreeAutoscaling={"const": True},
    autoscalerOptions=closed(
        "version idleTimeoutSeconds securityContext volumeMounts",
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=COUNT,
        securityContext={"const": SECURE},
        volumeMounts=MOUNTS,
        resources=closed("requests limits", requests=RESOURCES, limits=RESOURCES),
    ),
    headGroupSpec=closed(
        "rayStartParams template",
        serviceType={"const": "ClusterIP"},
        rayStartParams=PARAMETERS,
        template=TEMPLATE,
    ),
    workerGroupSpecs=listed(
        closed(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName={"type": "string", "pattern": "^[a-z0-9-]+$"},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=PARAMETERS,
            template=TEMPLATE,
        ),
        at_least=2,
    ),
)
METADATA = closed(
    "name namespace",
    name={"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"},
    namespace={"const": "solvus"},
    labels=LABELS,
)
RAY_JOB = closed(
    "entrypoint submissionMode shutdownAfterJobFinishes backoffLimit submitterPodTemplate rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"const": "K8sJobMode"},
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"const": True},
    ttlSecondsAfterFinished=COUNT,
    submitterPodTemplate=TEMPLATE,
    rayClusterSpec=RAY_CLUSTER,
)


def kubernetes(kind: str, api: str, spec: Any) -> dict[str, Any]:
    """Schema of an object of that kind."""
    return closed(
        "apiVersion kind metadata spec", apiVersion={"const": api}, kind={"const": kind}, metadata=METADATA, spec=spec
    )


@cache
def ray_cluster() -> Any:
    """The specification of the cluster that stays."""
    return documents("kuberay/raycluster.yaml")[0]["spec"]


@cache
def ray_job() -> Any:
    """The specification of the job."""
    return documents("kuberay/rayjob.yaml")[0]["spec"]


def pods() -> Iterator[tuple[str, Any]]:
    """Every pod template of the cluster and the job's submitter."""
    yield "head", ray_cluster()["headGroupSpec"]["template"]
    for group in ray_cluster()["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    yield "submitter", ray_job()["submitterPodTemplate"]


def variables(template: Any) -> dict[str, Any]:
    """The environment of a pod's container: a string, or (secret, key)."""
    found = {}
    for entry in template["spec"]["containers"][0]["env"]:
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        found[entry["name"]] = (reference["name"], reference["key"]) if reference else entry["value"]
    assert len(found) == len(template["spec"]["containers"][0]["env"]), "a variable comes twice"
    return found


def test_raycluster_and_rayjob_have_the_form_that_kuberay_takes() -> None:
    for name, schema in (
        ("kuberay/raycluster.yaml", kubernetes("RayCluster", "ray.io/v1", RAY_CLUSTER)),
        ("kuberay/rayjob.yaml", kubernetes("RayJob", "ray.io/v1", RAY_JOB)),
    ):
        assert len(documents(name)) == 1
        jsonschema.validate(documents(name)[0], schema)


def test_the_job_brings_the_same_cluster() -> None:
    assert ray_job()["rayClusterSpec"] == ray_cluster()
    assert ray_job()["backoffLimit"] > 0, "a lost head is tried again"


def test_the_cluster_is_of_the_pinned_ray() -> None:
    assert ray_cluster()["rayVersion"] == PINS["ray"]


def test_there_are_gpu_and_cpu_workers_that_scale() -> None:
    groups = {group["groupName"]: group for group in ray_cluster()["workerGroupSpecs"]}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] and group["maxReplicas"] > 0
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"], "Ray counts the limits, Kubernetes the requests"
    has_gpu = {
        name: "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for name, group in groups.items()
    }
    assert has_gpu == {"gpu": True, "cpu": False}
    assert groups["gpu"]["template"]["spec"]["containers"][0]["image"].endswith("-cuda")
    assert ray_cluster()["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no tasks on the head"
    assert not 10002 <= int(ray_cluster()["headGroupSpec"]["rayStartParams"]["port"]) <= 19999


def test_every_pod_has_the_token_and_workers_have_no_more_than_they_need() -> None:
    storage = {"SOLVUS_STORAGE", "PGPASSWORD", "MLFLOW_TRACKING_URI"}
    for name, template in pods():
        found = variables(template)
        assert found["RAY_AUTH_MODE"] == "token", name
        assert found["RAY_AUTH_TOKEN"] == ("solvus-ray-auth", "auth_token"), name
        assert storage & set(found) == (storage if name == "head" else set()), name
        if name == "submitter":
            assert set(found) == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
            continue
        assert found["OMP_NUM_THREADS"] == "1"
        assert found["SOLVUS_ROOT"].startswith("s3://")
        assert found["AWS_ACCESS_KEY_ID"] == ("solvus-s3", "access_key_id")
        assert found["AWS_SECRET_ACCESS_KEY"] == ("solvus-s3", "secret_access_key")
        mounted = {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert {"/tmp", "/home/solvus"} <= mounted, "what Ray writes to under a read-only root"
    head = variables(dict(pods())["head"])
    assert re.fullmatch(r"postgresql\+psycopg://\w+@[\w.]+:5432/\w+", head["SOLVUS_STORAGE"])
    assert head["PGPASSWORD"] == ("solvus-postgres", "password")
    assert ray_cluster()["authOptions"]["secretName"] == "solvus-ray-auth"


def test_secrets_come_from_secrets_and_the_example_has_placeholders_only() -> None:
    secrets = {}
    for document in documents("kuberay/secrets.example.yaml"):
        jsonschema.validate(
            document,
            closed(
                "apiVersion kind metadata type stringData",
                apiVersion={"const": "v1"},
                kind={"const": "Secret"},
                metadata=METADATA,
                type={"const": "Opaque"},
                stringData={"type": "object", "additionalProperties": {"type": "string", "pattern": "^REPLACE_ME"}},
            ),
        )
        secrets[document["metadata"]["name"]] = set(document["stringData"])
    used: dict[str, set[str]] = {}
    for _, template in pods():
        for name, value in variables(template).items():
            if isinstance(value, tuple):
                used.setdefault(value[0], set()).add(value[1])
            else:
                assert not re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", name), f"{name} is written out"
    assert used == secrets


def test_the_namespace_enforces_restricted_pods() -> None:
    (namespace,) = documents("kuberay/namespace.yaml")
    assert namespace["kind"] == "Namespace" and namespace["metadata"]["name"] == "solvus"
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_jobs_command_is_one_that_solvus_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.config import compose

    for name in ("SOLVUS_ROOT", "SOLVUS_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    program, verb, *overrides = shlex.split(ray_job()["entrypoint"])
    assert (program, verb) == ("solvus", "run")
    executor = compose(overrides)["executor"]
    assert (executor["name"], executor["address"]) == ("ray", "auto")
    # What the Slurm script adds around the caller's words.
    around = ["executor.workers=8", "executor.gpus=1", "study=tiny", "executor.workers=6", "executor=ray"]
    executor = compose([*around, "executor.address=10.0.0.1:20001"])["executor"]
    assert (executor["workers"], executor["gpus"], executor["address"]) == (6, 1, "10.0.0.1:20001")


# --- Network policies ------------------------------------------------------------------------------------------------

SELECTOR = closed("", matchLabels={**LABELS, "minProperties": 1})
PEER = {
    "oneOf": [
        closed("podSelector", podSelector=SELECTOR, namespaceSelector=SELECTOR),
        closed("ipBlock", ipBlock=closed("cidr", cidr={"type": "string", "pattern": r"^[\d.]+/(2[4-9]|3[0-2])$"})),
    ]
}
PORTS = listed(
    closed("protocol port", protocol={"enum": ["TCP", "UDP"]}, port={"type": "integer", "minimum": 1, "maximum": 65535})
)
RULE_IN, RULE_OUT = closed("from", **{"from": listed(PEER)}, ports=PORTS), closed("to", to=listed(PEER), ports=PORTS)
POLICY = closed(
    "podSelector policyTypes",
    podSelector={"anyOf": [{"const": {}}, SELECTOR]},
    policyTypes={**listed({"enum": ["Ingress", "Egress"]}), "uniqueItems": True},
    ingress=listed(RULE_IN),
    egress=listed(RULE_OUT),
)


def policies() -> list[Any]:
    """All network policies."""
    return documents("kuberay/networkpolicy.yaml")


def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """Whether a selector takes something with these labels; none takes nothing, the empty one all."""
    return selector is not None and all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())


def passes(direction: str, pod: dict[str, str], peer: dict[str, str], port: int, protocol: str) -> bool:
    """What Kubernetes says: a pod that no policy selects is open; else some rule of some policy has to allow it."""
    kind, side = ("Ingress", "from") if direction == "ingress" else ("Egress", "to")
    chosen = [
        p["spec"] for p in policies() if selects(p["spec"]["podSelector"], pod) and kind in p["spec"]["policyTypes"]
    ]
    if not chosen:
        return True
    for rule in (rule for spec in chosen for rule in spec.get(direction, [])):
        ports = rule.get("ports")
        if ports and not any((entry["port"], entry["protocol"]) == (port, protocol) for entry in ports):
            continue
        for entry in rule[side]:
            if "ipBlock" in entry:
                if peer.get("ip") == entry["ipBlock"]["cidr"]:
                    return True
                continue
            namespace = {"kubernetes.io/metadata.name": peer.get("namespace", "solvus")}
            # Without a selector for namespaces a rule means its own.
            wanted = entry.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "solvus"}})
            if selects(wanted, namespace) and selects(entry["podSelector"], peer):
                return True
    return False


def reaches(source: dict[str, str], target: dict[str, str], port: int, protocol: str = "TCP") -> bool:
    """Whether a connection gets through; pods outside of the namespace have no policies here."""
    out = "namespace" in source or passes("egress", source, target, port, protocol)
    return out and ("namespace" in target or "ip" in target or passes("ingress", target, source, port, protocol))


HEAD = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}
WORKER = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
SUBMITTER = ray_job()["submitterPodTemplate"]["metadata"]["labels"]
SERVICES = {name: {"app.kubernetes.io/name": name} for name in ("postgres", "mlflow", "s3")}
DNS = {"k8s-app": "kube-dns", "namespace": "kube-system"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator", "namespace": "kuberay-system"}
STRANGER = {"app.kubernetes.io/name": "curious"}
INTERNET = {"ip": "93.184.215.14/32"}


def test_network_policies_have_their_form_and_one_denies_everything() -> None:
    for policy in policies():
        jsonschema.validate(policy, kubernetes("NetworkPolicy", "networking.k8s.io/v1", POLICY))
        for direction in ("ingress", "egress"):
            assert direction not in policy["spec"] or direction.capitalize() in policy["spec"]["policyTypes"]
    names = [policy["metadata"]["name"] for policy in policies()]
    assert len(names) == len(set(names))
    default = next(p["spec"] for p in policies() if p["metadata"]["name"] == "default-deny")
    assert default == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (WORKER, HEAD, 6379), (HEAD, WORKER, 12345), (WORKER, WORKER, 40000), (WORKER, SERVICES["s3"], 8333),
        (HEAD, SERVICES["s3"], 8333), (HEAD, SERVICES["postgres"], 5432), (HEAD, SERVICES["mlflow"], 5000),
        (SERVICES["mlflow"], SERVICES["postgres"], 5432), (SERVICES["mlflow"], SERVICES["s3"], 8333),
        (SUBMITTER, HEAD, 8265), (OPERATOR, HEAD, 8265), (HEAD, {"ip": "192.0.2.1/32"}, 6443),
    ],
)  # fmt: skip
def test_what_a_study_needs_gets_through(source: dict[str, str], target: dict[str, str], port: int) -> None:
    assert reaches(source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (STRANGER, HEAD, 8265), (STRANGER, HEAD, 6379), (STRANGER, WORKER, 52365),
        (STRANGER, SERVICES["postgres"], 5432), (SERVICES["postgres"], SERVICES["s3"], 8333),
        (STRANGER | {"namespace": "other"}, HEAD, 8265), (WORKER | {"namespace": "other"}, HEAD, 6379),
        (STRANGER | {"namespace": "kuberay-system"}, HEAD, 8265), (OPERATOR | {"namespace": "other"}, HEAD, 8265),
        (OPERATOR, HEAD, 6379), (OPERATOR, WORKER, 52365), (SUBMITTER, HEAD, 6379), (SUBMITTER, WORKER, 8265),
        (WORKER, SERVICES["postgres"], 5432), (WORKER, SERVICES["mlflow"], 5000), (WORKER, SERVICES["s3"], 8888),
        (WORKER, {"ip": "192.0.2.1/32"}, 6443), (SERVICES["s3"], HEAD, 6379),
        *[(source, INTERNET, 443) for source in (HEAD, WORKER, SUBMITTER, STRANGER, *SERVICES.values())],
        (HEAD, {"ip": "169.254.169.254/32"}, 80),
    ],
)  # fmt: skip
def test_everything_else_is_denied(source: dict[str, str], target: dict[str, str], port: int) -> None:
    assert not reaches(source, target, port)


def test_names_can_be_looked_up() -> None:
    for pod in (HEAD, WORKER, SUBMITTER, *SERVICES.values()):
        assert reaches(pod, DNS, 53, "UDP") and reaches(pod, DNS, 53, "TCP")
        assert not reaches(pod, DNS, 443)


# --- Compose ---------------------------------------------------------------------------------------------------------

REQUIRED = re.compile(r"\$\{([A-Z0-9_]+):\?[^}]+\}")
DURATION = {"type": "string", "pattern": r"^\d+(ms|s|m)$"}
SERVICE = closed(
    "image restart networks security_opt",
    image=TEXT,
    build=closed(
        "context dockerfile",
        context={"const": ".."},
        dockerfile={"const": "cluster/Dockerfile"},
        args=LABELS,
    ),
    restart={"enum": ["unless-stopped", "on-failure:5"]},
    init={"const": True},
    user={"type": "string", "pattern": r"^[1-9]\d*:[1-9]\d*$"},
    read_only={"const": True},
    cap_drop={"const": ["ALL"]},
    security_opt={"const": ["no-new-privileges:true"]},
    tmpfs=listed(TEXT),
    shm_size=TEXT,
    mem_limit=TEXT,
    cpus={"type": "number"},
    stop_grace_period=DURATION,
    logging={"type": "object"},
    entrypoint=listed(TEXT),
    command=listed(TEXT),
    environment=LABELS,
    ports=listed({"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}),
    networks={"anyOf": [listed({"enum": ["inside", "edge"]}), {"type": "object"}]},
    volumes=listed(TEXT),
    profiles=listed({"const": "gpu"}),
    deploy={"type": "object"},
    depends_on={
        "type": "object",
        "additionalProperties": closed(
            "condition", condition={"enum": ["service_healthy", "service_completed_successfully"]}
        ),
    },
    healthcheck=closed(
        "test interval timeout retries start_period",
        test={"type": "array", "prefixItems": [{"enum": ["CMD", "CMD-SHELL"]}], "items": TEXT, "minItems": 2},
        interval=DURATION,
        timeout=DURATION,
        retries=COUNT,
        start_period=DURATION,
    ),
)


@cache
def compose_file() -> Any:
    """The compose file."""
    return documents("compose.yaml")[0]


def interpolate(text: str, values: dict[str, str]) -> str:
    """What compose does with ${NAME:?message}: an error when the variable is missing or empty."""

    def value(found: re.Match[str]) -> str:
        if not values.get(found.group(1)):
            raise LookupError(found.group(0))
        return values[found.group(1)]

    return REQUIRED.sub(value, text)


def networks_of(service: Any) -> set[str]:
    """The names of a service's networks."""
    return set(service["networks"])


def test_compose_has_its_form() -> None:
    extensions = {key for key in compose_file() if key.startswith("x-")}
    assert set(compose_file()) - extensions == {"name", "services", "networks", "volumes"}
    services = compose_file()["services"]
    for name, service in services.items():
        try:
            jsonschema.Draft202012Validator(SERVICE).validate(service)
        except jsonschema.ValidationError as error:
            raise AssertionError(f"{name}: {error.message}") from None
        assert set(service.get("depends_on", {})) <= set(services)
        assert networks_of(service) <= set(compose_file()["networks"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose_file()["volumes"] or (CLUSTER / source).is_file(), volume
    assert {"ray-head", "ray-worker", "ray-worker-gpu", "postgres", "mlflow", "s3", "buckets"} == set(services)


def test_compose_publishes_on_loopback_only_and_keeps_services_inside() -> None:
    services = compose_file()["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"ray-head": ["127.0.0.1:8265:8265"], "mlflow": ["127.0.0.1:5000:5000"]}
    assert compose_file()["networks"]["inside"] == {"internal": True}
    assert {name for name, service in services.items() if "edge" in networks_of(service)} == set(published)
    assert all("inside" in networks_of(service) for service in services.values())
    assert not any("network_mode" in service or "privileged" in service for service in services.values())


def test_everything_that_stays_up_is_watched() -> None:
    for name, service in compose_file()["services"].items():
        assert ("healthcheck" in service) != (name == "buckets"), name
        for other, condition in service.get("depends_on", {}).items():
            once = other == "buckets"
            assert condition["condition"] == ("service_completed_successfully" if once else "service_healthy")


def test_compose_refuses_to_start_without_its_secrets() -> None:
    text = (CLUSTER / "compose.yaml").read_text()
    code = re.sub(r"(?m)^\s*#.*$", "", text)
    assert set(re.findall(r"\$\{?(\w+)", code)) == set(REQUIRED.findall(code)), "every variable is required"
    example = dict(
        line.split("=", 1) for line in (CLUSTER / ".env.example").read_text().splitlines() if re.match(r"\w", line)
    )
    assert set(example) == set(REQUIRED.findall(code))
    assert set(example.values()) == {""}, "an example that nobody filled in must not start"
    with pytest.raises(LookupError):
        interpolate(code, example)
    filled = dict.fromkeys(example, "x")
    for name in example:
        with pytest.raises(LookupError, match=name):
            interpolate(code, filled | {name: ""})
    assert "${" not in interpolate(code, filled)


def test_compose_takes_every_secret_from_the_environment_and_ray_has_its_token() -> None:
    secret = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")
    for name, service in compose_file()["services"].items():
        environment = service.get("environment", {})
        for variable, value in environment.items():
            assert not secret.search(variable) or REQUIRED.fullmatch(value), f"{name}: {variable} is written out"
        if name.startswith("ray-"):
            assert environment["RAY_AUTH_MODE"] == "token"
            assert REQUIRED.findall(environment["RAY_AUTH_TOKEN"]) == ["RAY_AUTH_TOKEN"]
            assert environment["OMP_NUM_THREADS"] == "1"
            assert environment["SOLVUS_ROOT"].startswith("s3://")
            assert service["command"][0] == ("head" if name == "ray-head" else "worker")
            assert "entrypoint" not in service, "the entry point checks the token"
    head = compose_file()["services"]["ray-head"]["environment"]
    assert head["SOLVUS_STORAGE"] == "postgresql+psycopg://solvus@postgres:5432/solvus"
    assert "PGPASSWORD" not in compose_file()["services"]["ray-worker"]["environment"]
    assert compose_file()["services"]["postgres"]["image"].startswith("postgres:17.")


def test_compose_serves_s3_alone_and_mlflow_to_known_hosts() -> None:
    s3 = compose_file()["services"]["s3"]["command"]
    assert {"-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0", "-master.telemetry=false"} <= set(s3)
    mlflow = compose_file()["services"]["mlflow"]["command"]
    hosts = next(word for word in mlflow if word.startswith("--allowed-hosts="))
    assert "*" not in hosts and "mlflow:5000" in hosts
    assert "--workers=1" in mlflow
    compile(compose_file()["services"]["buckets"]["command"][0], "buckets", "exec")
    assert "CREATE DATABASE mlflow;" in (CLUSTER / "postgres" / "mlflow.sql").read_text()


# --- Cluster launcher ------------------------------------------------------------------------------------------------


@cache
def launcher_schema() -> Any:
    """The schema that `ray up` checks, of the installed Ray."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    return json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_launcher_files_are_what_ray_up_takes(cloud: str) -> None:
    (config,) = documents(f"launcher/{cloud}.yaml")
    jsonschema.validate(config, launcher_schema())
    assert config["provider"]["type"] == cloud
    types = config["available_node_types"]
    assert config["head_node_type"] == "head" and types["head"]["resources"] == {"CPU": 0}
    workers = {name: kind for name, kind in types.items() if name != "head"}
    assert any(kind["resources"].get("GPU") for kind in workers.values())
    for kind in workers.values():
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_launched_nodes_have_the_token_and_open_nothing(cloud: str) -> None:
    (config,) = documents(f"launcher/{cloud}.yaml")
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        assert "ray start" not in command or command.startswith("export RAY_AUTH_MODE=token;")
    assert sum("ray start" in command for command in starts) == 2
    assert "--dashboard-host=127.0.0.1" in starts[1] and "--port=6379" in starts[1]
    assert any("RAY_AUTH_MODE=token" in command for command in config["initialization_commands"])
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token ~/.solvus.env" in config["setup_commands"]
    assert config["auth"] == {"ssh_user": "ubuntu"}, "ssh with a key of its own"
    text = (CLUSTER / "launcher" / f"{cloud}.yaml").read_text()
    assert "0.0.0.0" not in text
    for kind in config["available_node_types"].values():
        if cloud == "aws":
            # Without a group of yours Ray makes one that lets in ssh from anywhere.
            assert kind["node_config"]["SecurityGroupIds"] == ["sg-REPLACE_ME"]
            assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        else:
            assert "REPLACE-ME" in kind["node_config"]["networkInterfaces"][0]["subnetwork"]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_commands_of_the_launcher_parse_and_pin(cloud: str) -> None:
    (config,) = documents(f"launcher/{cloud}.yaml")
    keys = [key for key in config if key.endswith("_commands")]
    commands = [command for key in keys for command in config[key]]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)
        assert "pip install" not in command or "-c constraints.txt" in command
    clone = next(command for command in commands if "git clone" in command)
    assert f"--branch v{VERSION}" in clone and "REPLACE" in clone


# --- Documentation ---------------------------------------------------------------------------------------------------


def test_the_guide_names_every_file_and_every_variable() -> None:
    guide = (REPO / "docs" / "cluster.md").read_text()
    for path in TEXTS:
        name = path.name
        if name in (".gitignore", "Dockerfile.dockerignore", "mlflow.sql"):
            continue
        assert name in guide, name
    for target in re.findall(r"\]\(\.\./([^)]+)\)", guide):
        assert (REPO / target).exists(), target
    described = guide + (CLUSTER / "slurm" / "solvus.sbatch").read_text() + (CLUSTER / "entrypoint.sh").read_text()
    for path in TEXTS:
        # RAY_HEAD_IP is set by `ray up`, RAY_USAGE_STATS_ENABLED and RAY_ACCEL_... are settings of Ray, not of yours.
        used = set(re.findall(r"\b(?:SOLVUS|RAY)_[A-Z_]+\b", path.read_text()))
        for variable in used - {"RAY_HEAD_IP", "RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"}:
            assert variable in described, f"{path.name} uses {variable}, which is described nowhere"
