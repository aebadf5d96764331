"""Who finds whom in the rendered chart: Services, their pods and ports, and network policies pod by pod."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Document = dict[str, Any]


def test_services_find_pods_and_their_ports(release: Any) -> None:
    pods = [pod for _, pod in release.pods()]
    for service in release.kind("Service"):
        selector = service["spec"]["selector"]
        found = [pod for pod in pods if selector.items() <= pod["metadata"]["labels"].items()]
        assert len(found) == 1, service["metadata"]["name"]
        names = {port["name"] for container in found[0]["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    by_name = {service["metadata"]["name"]: service["spec"] for service in release.kind("Service")}
    full = "pando-ha" if release.case == "ha" else "demo-pando"
    assert by_name[f"{full}-headless"]["clusterIP"] == "None"
    assert by_name[full]["type"] == ("LoadBalancer" if release.case == "ha" else "ClusterIP")
    assert {port["name"] for port in by_name[full]["ports"]} == {"grpc", "http"}, (
        "the admin port has a Service of its own"
    )
    assert by_name[full]["ports"][0]["appProtocol"] == "kubernetes.io/h2c"
    for stateful in release.kind("StatefulSet"):
        assert stateful["spec"]["serviceName"] in by_name


def test_network_policies_cover_every_pod(release: Any) -> None:
    policies = release.kind("NetworkPolicy")
    if release.case == "dev":
        assert not policies
        return
    default = next(p for p in policies if p["metadata"]["name"].endswith("-default"))
    assert default["spec"]["policyTypes"] == ["Ingress", "Egress"] and "ingress" not in default["spec"]
    for name, pod in release.pods():
        labels = pod["metadata"]["labels"]
        assert selects(default["spec"]["podSelector"], labels), name
        assert [p for p in policies if p is not default and selects(p["spec"]["podSelector"], labels)], name
    for policy in policies:
        assert [
            name for name, pod in release.pods() if selects(policy["spec"]["podSelector"], pod["metadata"]["labels"])
        ]


@pytest.mark.parametrize(
    ("source", "target", "port", "may"),
    [
        ("router", "redis", 6379, True),
        ("router", "ray-worker", 40000, True),
        ("router", "ray-head", 6379, False),
        ("router", "control", 40000, False),
        ("ray-worker", "ray-head", 6379, True),
        ("control", "ray-head", 6379, True),
        ("control", "redis", 6379, True),
        ("ray-worker", "redis", 6379, True),
        ("redis", "router", 8470, False),
        ("ray-worker", "router", 8470, False),
        ("smoke", "router", 8470, True),
        ("smoke", "router", 8472, False),
        ("smoke", "redis", 6379, False),
        ("smoke", "ray-worker", 40000, False),
    ],
)
def test_who_may_speak_to_whom(render: Callable[..., Any], source: str, target: str, port: int, may: bool) -> None:
    release = render({"tenants": {"existingSecret": "t"}})
    pods = {name: release.pod(name) for name in (source, target)}
    sides = {"egress": ("to", pods[source], pods[target]), "ingress": ("from", pods[target], pods[source])}
    allowed = []
    for side, (peers, owner, other) in sides.items():
        rules = [
            rule
            for policy in release.kind("NetworkPolicy")
            if selects(policy["spec"]["podSelector"], owner["metadata"]["labels"])
            for rule in policy["spec"].get(side, [])
        ]
        allowed.append(any(matches(rule, peers, other, port, pods[target]) for rule in rules))
    assert all(allowed) is may, dict(zip(sides, allowed, strict=True))


def matches(rule: Document, peers: str, other: Document, port: int, target: Document) -> bool:
    """Whether a rule of a network policy lets a pair of pods use a TCP port."""
    if peers in rule and not any(
        selects(peer.get("podSelector", {}), other["metadata"]["labels"]) for peer in rule[peers]
    ):
        return False
    names = {
        p["name"]: p["containerPort"] for container in target["spec"]["containers"] for p in container.get("ports", [])
    }
    for entry in rule.get("ports", [{"port": 0, "endPort": 65535}]):
        low = names.get(entry["port"], -1) if isinstance(entry["port"], str) else entry["port"]
        if entry.get("protocol", "TCP") == "TCP" and low <= port <= entry.get("endPort", low):
            return True
    return False


def selects(selector: Document, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []))
