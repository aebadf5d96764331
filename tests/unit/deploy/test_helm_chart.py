"""The chart by the real Helm engine: all documents valid, bad combinations refused, each part tied to the next."""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml

from router.tenants import read_tenants

Document = dict[str, Any]
Values = dict[str, Any]

CASES = ("cpu", "dev", "gpu", "ha")
OLDEST, NEWEST = "1.27", "1.37"
COMPONENT = "app.kubernetes.io/component"
TENANTS = {"tenants": {"existingSecret": "t"}}


def merged(*parts: Values) -> Values:
    out: Values = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def test_every_values_file_is_tested(folder: Path) -> None:
    assert {path.name for path in (folder / "ci").iterdir()} == {f"{case}-values.yaml" for case in CASES}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_document_is_valid_on_the_oldest_and_newest_kubernetes(release: Any, version: str, root: Path) -> None:
    schema = json.loads((root / "tests" / "unit" / "deploy" / "ray_cluster.schema.json").read_text())
    for document in release.documents:
        if document["kind"] == "RayCluster":
            jsonschema.validate(document, schema)
        else:
            assert kubernetes_validate.validate(document, version, strict=True) == version
    for name, pod in release.pods():
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | pod["metadata"], "spec": pod["spec"]}
        kubernetes_validate.validate(as_pod, version, strict=True)


def test_kubernetes_schemas_reach_as_far_as_the_chart_claims(chart: helm.Chart) -> None:
    assert chart.metadata["kubeVersion"] == f">={OLDEST}.0-0"
    assert kubernetes_validate.latest_version().startswith(NEWEST)


def test_lint_finds_nothing(folder: Path, release: Any) -> None:
    report = helm.lint(folder, release.values, strict=True, namespace="prod", kube_version=f"v{NEWEST}.0")
    findings = [finding for finding in report.get("messages", []) if "icon is recommended" not in str(finding)]
    assert not findings


def test_versions_are_the_package_version(chart: helm.Chart, root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert chart.metadata["appVersion"] == chart.version == project["version"]


def test_schema_is_closed_and_covers_every_value(chart: helm.Chart) -> None:
    schema = chart.schema
    assert schema is not None

    def check(part: Document, values: Any, path: str) -> None:
        if "properties" not in part:
            return
        assert part["additionalProperties"] is False, path
        if path.endswith(".resources") or path.endswith(".image"):
            return
        assert set(part["properties"]) - {"global"} == set(values), path
        for key, below in part["properties"].items():
            check(below, values.get(key), f"{path}.{key}")

    check(schema, chart.values, "")


@pytest.mark.parametrize(
    "values",
    [
        {"unknown": 1},
        {"router": {"replcas": 3}},
        {"ray": {"kuberay": {"version": "x"}}},
        {"router": {"image": {"repository": "x", "name": "y"}}},
        {"router": {"replicas": 1}},
        {"router": {"replicas": "2"}},
        {"ray": {"mode": "cloud"}},
        {"worker": {"gpus": -1}},
        {"router": {"image": {"digest": "sha256:12"}}},
        {"commonLabels": {"app.kubernetes.io/name": "other"}},
        {"router": {"extraArgs": ["pando"]}},
    ],
    ids=str,
)
def test_schema_refuses(render: Callable[..., Any], values: Values) -> None:
    with pytest.raises(helm.HelmError):
        render(merged(TENANTS, values))


EXTERNAL_RAY = {"mode": "external", "external": {"address": "head:6379", "workers": 2, "cidrs": ["10.0.0.0/8"]}}
OWN_SECRET = {"auth": {"existingSecret": "a"}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tenants": {"existingSecret": ""}}, "set tenants.config or tenants.existingSecret"),
        ({"tenants": {"config": "x"}}, "not both"),
        ({"fullnameOverride": "x" * 41}, "at most 40 characters"),
        ({"router": {"image": {"tag": "latest"}}}, "router.image.tag"),
        ({"worker": {"image": {"tag": "latest"}}}, "worker.image.tag"),
        ({"redis": {"image": {"tag": "latest"}}}, "redis.image.tag"),
        ({"router": {"preStopSeconds": 60}}, "terminationGracePeriodSeconds must be more"),
        ({"router": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "maxReplicas must be minReplicas or more"),
        ({"worker": {"deviceBlocks": 0}}, "worker.deviceBlocks"),
        ({"ray": {"mode": "external"}} | OWN_SECRET, "ray.external.address: needed"),
        (merged({"ray": EXTERNAL_RAY}, OWN_SECRET, {"ray": {"external": {"workers": 0}}}), "ray.external.workers"),
        (merged({"ray": EXTERNAL_RAY}, OWN_SECRET, {"ray": {"external": {"cidrs": []}}}), "ray.external.cidrs"),
        ({"ray": {"external": {"address": "head:6379"}}}, "ray.mode is not external"),
        ({"ray": EXTERNAL_RAY}, "that cluster's ray-token"),
        ({"ray": {"mode": "kuberay", "kuberay": {"maxReplicas": 1}}}, "ray.kuberay.maxReplicas"),
        ({"ray": {"mode": "kuberay", "kuberay": {"minReplicas": 3}}}, "ray.kuberay.minReplicas"),
        ({"redis": {"mode": "external"}} | OWN_SECRET, "redis.external.host or redis.external.urls: needed"),
        ({"redis": {"external": {"host": "r"}}}, "redis.mode is not external"),
        ({"redis": {"external": {"host": "r", "urls": True}}}, "one of host and urls"),
        ({"redis": {"mode": "external", "external": {"host": "r"}}}, "that server's passwords or URLs"),
        ({"redis": {"tls": {"existingSecret": "s"}}}, "redis.tls.enabled is false"),
        (merged({"ray": EXTERNAL_RAY, "redis": {"tls": {"enabled": True}}}, OWN_SECRET), "no file of this CA"),
        ({"modelCache": {"existingClaim": "c"}}, "modelCache.enabled is false"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_combinations_are_refused_with_one_line(render: Callable[..., Any], values: Values, said: str) -> None:
    with pytest.raises(helm.HelmError, match=said):
        render(merged(TENANTS, values))


def test_each_refusal_in_the_chart_has_its_test(folder: Path) -> None:
    rules = (folder / "templates" / "validate.yaml").read_text().count("fail ")
    cases = test_bad_combinations_are_refused_with_one_line.pytestmark[0].args[1]
    assert rules == len(cases) - 2, "the rule on image tags stands for three images"


def test_readme_table_is_that_of_the_values(root: Path, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("values_table", root / "deploy" / "helm" / "values_table.py")
    assert spec is not None and spec.loader is not None
    values_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(values_table)
    text = (folder / "values.yaml").read_text()
    readme = (folder / "README.md").read_text()
    assert values_table.readme_with(readme, text) == readme, "run deploy/helm/values_table.py"
    keys = [key for key, _ in values_table.described(text)]
    assert set(keys) == set(_leaves(yaml.safe_load(text)))


def _leaves(values: Values, path: str = "") -> Iterator[str]:
    for key, value in values.items():
        here = f"{path}{key}"
        if isinstance(value, dict) and value and key not in ("resources",):
            yield from _leaves(value, f"{here}.")
        else:
            yield here


def test_names_and_labels(release: Any, render: Callable[..., Any]) -> None:
    for document in release.documents:
        name = document["metadata"]["name"]
        assert len(name) <= 63
        if name != "pando-ha-note":
            assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "pando", name
    long = render(TENANTS, name="a-release-with-quite-a-long-name-of-fifty-characters").documents
    assert max(len(d["metadata"]["name"]) for d in long) <= 63


def test_selectors_never_name_a_version(release: Any) -> None:
    for document in release.kind("Deployment", "StatefulSet"):
        selector = document["spec"]["selector"]["matchLabels"]
        assert set(selector) == {"app.kubernetes.io/name", "app.kubernetes.io/instance", COMPONENT}
        labels = document["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert not {"app.kubernetes.io/version", "helm.sh/chart"} & set(labels), "pods restart on every chart version"


def test_pods_are_restricted(release: Any) -> None:
    for name, pod in release.pods():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, "service links set PANDO_* variables that settings refuse"
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and security["runAsNonRoot"], name
            assert security["allowPrivilegeEscalation"] is False and security["privileged"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"], name
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts <= {volume["name"] for volume in spec.get("volumes", [])}, name


def test_images_have_a_version_or_digest(release: Any, render: Callable[..., Any]) -> None:
    for name, pod in release.pods():
        for container in pod["spec"]["containers"]:
            image = container["image"]
            assert "@sha256:" in image or not image.endswith((":latest", ":")), name
    own = render(merged(TENANTS, {"router": {"image": {"tag": "latest", "digest": f"sha256:{'0' * 64}"}}}))
    assert f"pando-router@sha256:{'0' * 64}" in yaml.safe_dump(own.documents)


def test_router_rolls_without_a_gap(release: Any) -> None:
    (deployment,) = [d for d in release.kind("Deployment") if d["metadata"]["name"].endswith("-router")]
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["terminationGracePeriodSeconds"] > int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert container["readinessProbe"]["grpc"]["port"] == 8470
    assert "grpc" not in container["livenessProbe"], (
        "a router without workers is not ready, and must not be killed for it"
    )
    scalers = release.kind("HorizontalPodAutoscaler")
    if release.case == "ha":
        assert "replicas" not in deployment["spec"] and scalers[0]["spec"]["minReplicas"] == 3
    else:
        assert deployment["spec"]["replicas"] >= 2 and not scalers
    spread = {rule["topologyKey"]: rule for rule in spec["topologySpreadConstraints"]}
    assert set(spread) == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
    budgets = {d["metadata"]["name"] for d in release.kind("PodDisruptionBudget")}
    assert (release.case == "dev") == (deployment["metadata"]["name"] not in budgets)


def test_router_arguments_and_environment_are_ours(release: Any, parse_pando: Callable[..., Any]) -> None:
    (container,) = release.pod("router")["spec"]["containers"]
    settings = parse_pando(container["args"], environment_of(container))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings.port, "http": settings.http_port, "admin": settings.admin_port}
    assert settings.host == "0.0.0.0" and settings.cluster_secret and settings.admin_key
    assert settings.model == release.values.get("model", "pando-tiny")
    mount = next(m for m in container["volumeMounts"] if m["name"] == "tenants")
    assert settings.tenants == f"{mount['mountPath']}/tenants.toml"
    assert settings.max_in_flight == (4096 if release.case == "ha" else 1024)


def test_control_arguments_are_ours_and_match_the_routers_and_nodes(
    release: Any, parse_pando: Callable[..., Any]
) -> None:
    (container,) = release.pod("control")["spec"]["containers"]
    (router,) = release.pod("router")["spec"]["containers"]
    assert container["args"][0] == "/app/deploy/join_ray.sh"
    settings = parse_pando(container["args"][1:], environment_of(container))
    other = parse_pando(router["args"], environment_of(router))
    for name in ("model", "cluster", "block_size", "link_token"):
        assert getattr(settings, name) == getattr(other, name), name
    assert settings.ray == "auto" and settings.host == "0.0.0.0" and settings.link_token
    for named in (container, router):
        (token,) = (entry for entry in named["env"] if entry["name"] == "PANDO_LINK_TOKEN")
        assert token["valueFrom"]["secretKeyRef"]["key"] == "link-token"
    assert settings.workers == {"cpu": 2, "dev": 1, "gpu": 8, "ha": 8}[release.case]
    assert settings.device == ("cuda" if release.case == "gpu" else "cpu")
    head = {"cpu": "demo-pando-ray-head", "dev": "demo-pando-ray-head", "gpu": "demo-pando-head-svc"}
    wanted = f"{head[release.case]}:6379" if release.case in head else "ray-head.ray.svc:6379"
    assert {"name": "RAY_HEAD", "value": wanted} in container["env"]


def environment_of(container: Document) -> dict[str, str]:
    """The container's variables, references filled with their names."""
    variables = {entry["name"]: entry.get("value", f"from-{entry['name'].lower()}") for entry in container["env"]}
    return {name: value.replace("$(REDIS_PASSWORD)", "secret") for name, value in variables.items()}


def test_ray_nodes(release: Any, parse_ray_start: Callable[..., Any]) -> None:
    expected = {"control", "router", "smoke"} | ({"ray-head", "ray-worker", "redis"} if release.case != "ha" else set())
    assert release.components() == expected
    for component in release.components() & {"ray-head", "ray-worker", "control"}:
        (container,) = release.pod(component)["spec"]["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "ray-token"
        assert {"/dev/shm", "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        if component != "control" and release.case in ("cpu", "dev"):
            flags = parse_ray_start(container["args"])
            agent = next(port for port in container["ports"] if port["name"] == "agent")
            assert flags["block"] and flags["dashboard_agent_listen_port"] == agent["containerPort"]
            assert flags["head"] is (component == "ray-head")
            if component == "ray-worker":
                assert flags["address"] == "demo-pando-ray-head:6379"


def test_kuberay_start_parameters_are_rays(
    render: Callable[..., Any], parse_ray_start: Callable[..., Any], folder: Path
) -> None:
    values = yaml.safe_load((folder / "ci" / "gpu-values.yaml").read_text())
    (cluster,) = render(values).kind("RayCluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 2, 4)
    for part in (cluster["spec"]["headGroupSpec"], group):
        flags = [
            f"--{k}" if v == "true" and k == "disable-usage-stats" else f"--{k}={v}"
            for k, v in part["rayStartParams"].items()
        ]
        assert parse_ray_start(["ray", "start", *flags])["disable_usage_stats"] is True
    (container,) = group["template"]["spec"]["containers"]
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == 4
    )
    assert group["rayStartParams"]["num-gpus"] == "4"


def test_secrets_are_made_once_or_given(render: Callable[..., Any]) -> None:
    (secret,) = render(TENANTS).kind("Secret")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    redis = {f"redis-{part}password" for part in ("", "router-", "worker-")}
    assert set(secret["data"]) == {"cluster-secret", "link-token", "admin-key", "ray-token"} | redis
    values = {base64.b64decode(value).decode() for value in secret["data"].values()}
    assert len(values) == 7 and all(len(value) == 48 and value.isalnum() for value in values)
    given = render(merged(TENANTS, OWN_SECRET))
    assert not given.kind("Secret")
    assert "demo-pando-auth" not in yaml.safe_dump(given.documents)


def test_tenants_of_the_values_are_a_secret_file(release: Any, tmp_path: Path) -> None:
    secrets = [d for d in release.kind("Secret") if d["metadata"]["name"].endswith("-tenants")]
    volume = next(v for v in release.pod("router")["spec"]["volumes"] if v["name"] == "tenants")
    if release.case == "dev":
        assert volume["secret"]["secretName"] == secrets[0]["metadata"]["name"]
        path = tmp_path / "tenants.toml"
        path.write_text(secrets[0]["stringData"]["tenants.toml"])
        assert {tenant.id for tenant in read_tenants(path).by_digest.values()} == {"a", "b"}
    else:
        assert not secrets and volume["secret"]["secretName"] == "pando-tenants"


def test_model_cache(release: Any) -> None:
    claims = release.kind("PersistentVolumeClaim")
    assert len(claims) == (release.case == "gpu")
    for _, pod in release.pods():
        for volume in pod["spec"].get("volumes", []):
            if volume["name"] == "models":
                assert ("persistentVolumeClaim" in volume) == (release.case == "gpu")


def test_smoke_pod_is_a_test_that_our_cli_understands(release: Any, parse_pando: Callable[..., Any]) -> None:
    (pod,) = release.kind("Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    containers = {container["name"]: container for container in pod["spec"]["containers"]}
    assert set(containers) == ({"health", "generate"} if release.case == "ha" else {"health"})
    for container in containers.values():
        given = parse_pando(container["args"], environment_of(container) if "env" in container else {})
        assert given.target.endswith(":8470")


def test_notes_say_where_to_go(chart: helm.Chart) -> None:
    rendered = chart.render(TENANTS, name="demo", namespace="prod")
    notes = rendered["pando/templates/NOTES.txt"]
    assert "demo-pando.prod:8470" in notes and "helm test demo" in notes and "{{" not in notes
