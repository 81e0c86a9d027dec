"""The manifests: valid, restricted, consistent with each other, and about the application as it is."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from marketflow import __version__
from marketflow.cli.main import parse
from marketflow.model import Mode
from tests.api.world import World
from tests.deploy.configuration import DEPLOY, documents, load_with, program

FOLDER = DEPLOY / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
APPLIED = documents(*(FOLDER / name for name in KUSTOMIZATION["resources"]))
SECRET = documents(FOLDER / "secret.example.yaml")[0]
VERSIONS = ("1.30", "1.37")
"""The oldest that they are meant for, and the newest of which the schema is at hand."""

VARIABLES = {
    "http-token": "MARKETFLOW_HTTP__TOKEN",
    "redis-password": "MARKETFLOW_REDIS__PASSWORD",
    "postgres-password": "MARKETFLOW_POSTGRES__PASSWORD",
}


def name_of(document: dict[str, Any]) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in APPLIED if document["kind"] == kind}


DEPLOYMENTS = of_kind("Deployment")


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, deployment in DEPLOYMENTS.items():
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            yield name, container


def matches(selector: dict[str, str], deployment: dict[str, Any]) -> bool:
    labels: dict[str, str] = deployment["spec"]["template"]["metadata"]["labels"]
    return selector.items() <= labels.items()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", [*APPLIED, SECRET], ids=name_of)
def test_manifests_follow_the_schemas(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_validation_finds_an_unknown_key() -> None:
    wrong = DEPLOYMENTS["marketflow-api"] | {"spec": DEPLOYMENTS["marketflow-api"]["spec"] | {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_kustomization_applies_all_but_the_example_secret() -> None:
    there = {path.name for path in FOLDER.glob("*.yaml")}
    assert there == {*KUSTOMIZATION["resources"], "kustomization.yaml", "secret.example.yaml"}
    assert {image["name"]: image["newTag"] for image in KUSTOMIZATION["images"]} == {"marketflow": __version__}


def test_kustomize_builds_the_manifests() -> None:
    done = subprocess.run([program("kubectl"), "kustomize", str(FOLDER)], capture_output=True, text=True, check=True)
    made = list(yaml.safe_load_all(done.stdout))
    assert sorted(map(name_of, made)) == sorted(map(name_of, APPLIED))
    for document in made:
        assert document["metadata"].get("namespace", "marketflow") == "marketflow"
        if document["kind"] == "Deployment":
            image = document["spec"]["template"]["spec"]["containers"][0]["image"]
            assert image == f"registry.example.com/marketflow:{__version__}"


def test_roles_are_arguments_of_the_command_line() -> None:
    parsed = {name: parse(container["args"]) for name, container in containers()}
    assert {name: (context.info_name, context.params["role"]) for name, context in parsed.items()} == {
        "marketflow-feeds": ("marketflow", "ingest"),
        "marketflow-api": ("marketflow", "api"),
    }


def test_pods_follow_the_restricted_standard() -> None:
    level = of_kind("Namespace")["marketflow"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == "restricted"
    for deployment in DEPLOYMENTS.values():
        pod = deployment["spec"]["template"]["spec"]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert (security["runAsUser"], security["runAsGroup"]) == (10001, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        assert pod["terminationGracePeriodSeconds"] >= 10
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["image"] == f"marketflow:{__version__}"
            assert container["resources"]["limits"]["memory"]
            assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/etc/marketflow", "/tmp"}
        assert pod["volumes"][0] == {"name": "settings", "configMap": {"name": "marketflow"}}


def test_settings_and_secrets_are_valid_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nothing_set: None
) -> None:
    path = tmp_path / "mounted.toml"
    path.write_text(of_kind("ConfigMap")["marketflow"]["data"]["settings.toml"])
    given: dict[str, dict[str, str]] = {name: {} for name in DEPLOYMENTS}
    for name, container in containers():
        for variable in container["env"]:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == SECRET["metadata"]["name"]
            assert VARIABLES[reference["key"]] == variable["name"]
            given[name][variable["name"]] = SECRET["stringData"][reference["key"]]
    environment = given["marketflow-api"]
    assert environment.keys() == {*VARIABLES.values()}
    assert given["marketflow-feeds"].keys() == environment.keys() - {"MARKETFLOW_HTTP__TOKEN"}
    assert SECRET["stringData"].keys() == VARIABLES.keys()
    environment["MARKETFLOW_HTTP__TOKEN"] = "one-of-our-own-16"  # the example's is refused
    # What Kubernetes would say of the service, were the links on.
    links = {"MARKETFLOW_API_SERVICE_HOST": "10.0.0.1", "MARKETFLOW_API_PORT": "tcp://10.0.0.1:8080"}
    found = load_with(monkeypatch, environment | links, path)
    assert found.mode is Mode.LIVE
    assert found.redis.host == ""
    assert len(found.redis.nodes) == 3
    assert all(node.startswith("redis-cluster-") for node in found.redis.nodes)
    assert found.postgres.host.startswith("postgres")
    assert found.http.allowed_hosts == ()
    assert found.log.format == "json"
    port = DEPLOYMENTS["marketflow-api"]["spec"]["template"]["spec"]["containers"][0]["ports"][0]
    assert port == {"name": "http", "containerPort": found.http.port}


def test_probes_use_existing_routes() -> None:
    pods = dict(containers())
    probes = [pods["marketflow-api"][f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert [probe["path"] for probe in probes] == ["/livez", "/livez", "/readyz"]
    assert {probe["port"] for probe in probes} == {"http"}
    assert [World().ask(probe["path"]).status_code for probe in probes] == [200] * 3
    assert not [key for key in pods["marketflow-feeds"] if key.endswith("Probe") or key == "ports"]
    annotations = DEPLOYMENTS["marketflow-api"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(pods["marketflow-api"]["ports"][0]["containerPort"]),
        "prometheus.io/path": "/metrics",
    }


def test_selectors_match_their_pods() -> None:
    for name, deployment in DEPLOYMENTS.items():
        assert deployment["spec"]["replicas"] == 2
        assert matches(deployment["spec"]["selector"]["matchLabels"], deployment)
        others = [other for other in DEPLOYMENTS if other != name]
        assert not any(matches(deployment["spec"]["selector"]["matchLabels"], DEPLOYMENTS[other]) for other in others)
        pod = deployment["spec"]["template"]["spec"]
        if name == "marketflow-feeds":
            (preferred,) = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
            spread = preferred["podAffinityTerm"]
        else:
            (spread,) = pod["topologySpreadConstraints"]
        assert spread["topologyKey"] == "kubernetes.io/hostname"
        assert matches(spread["labelSelector"]["matchLabels"], deployment)
        budget = of_kind("PodDisruptionBudget")[name]
        assert budget["spec"]["selector"] == deployment["spec"]["selector"]
        assert budget["spec"]["maxUnavailable"] == 1
    api, feeds = DEPLOYMENTS["marketflow-api"], DEPLOYMENTS["marketflow-feeds"]
    service = of_kind("Service")["marketflow-api"]["spec"]
    assert matches(service["selector"], api)
    assert not matches(service["selector"], feeds)
    assert service["ports"] == [{"name": "http", "port": 8080, "targetPort": "http"}]
    policies = of_kind("NetworkPolicy")
    closed, opened = (policies[name]["spec"] for name in ("marketflow", "marketflow-api"))
    assert matches(closed["podSelector"]["matchLabels"], feeds)
    assert "ingress" not in closed
    assert matches(opened["podSelector"]["matchLabels"], api)
    assert not matches(opened["podSelector"]["matchLabels"], feeds)
    assert opened["ingress"][0]["ports"] == [{"protocol": "TCP", "port": "http"}]
