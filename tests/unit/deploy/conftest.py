"""What the tests of the deployment files share: flag parsers, our own and Ray's, and the rendered chart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from pando.command_line import Parser, read_settings
from pando.commands import serve
from pando.settings import CrewSettings, RouterSettings

Argv = Sequence[str]
Document = dict[str, Any]
Values = dict[str, Any]

CASES = ("cpu", "dev", "gpu", "ha")
COMPONENT = "app.kubernetes.io/component"


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def parse_pando() -> Callable[..., Any]:
    """Settings that a `pando ...` or `python -m worker` command line gives, by our own parsers; exits on a mistake."""

    def parse(argv: Argv, env: Mapping[str, str] | None = None) -> Any:
        assert argv[0] == "pando", argv
        name, rest = argv[1], argv[2:]
        parser = Parser(prog=f"pando {name}")
        if name == "health":
            from pando.commands import look

            look.add_health(parser)
            return parser.parse_args(rest)
        if name == "generate":
            from pando.commands import talk

            talk.add_generate(parser)
            return parser.parse_args(rest)
        add, cls = {"router": (serve.add_router, RouterSettings), "workers": (serve.add_workers, CrewSettings)}[name]
        add(parser)
        return read_settings(cls, parser.parse_args(rest), env=env or {})

    return parse


@pytest.fixture(scope="session")
def parse_ray_start() -> Callable[[Argv], dict[str, Any]]:
    """Parameters of a `ray start` command line by Ray's own parser, which exits on a flag it does not know."""

    def parse(argv: Argv) -> dict[str, Any]:
        from ray.scripts.scripts import start

        assert list(argv[:2]) == ["ray", "start"], argv
        parameters: dict[str, Any] = start.make_context("ray start", list(argv[2:])).params
        return parameters

    return parse


@pytest.fixture(scope="session")
def folder(root: Path) -> Path:
    return root / "deploy" / "helm" / "pando"


@pytest.fixture(scope="session")
def chart(folder: Path) -> Iterator[helm.Chart]:
    with helm.Chart.load(folder) as loaded:
        yield loaded


@dataclass(frozen=True)
class Release:
    """What one values file renders to."""

    case: str
    values: Values
    documents: list[Document]

    def kind(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] in kinds]

    def pods(self) -> list[tuple[str, Document]]:
        """Name and template of every pod that the release makes."""
        found = [(d["metadata"]["name"], d) for d in self.kind("Pod")]
        found += [(d["metadata"]["name"], d["spec"]["template"]) for d in self.kind("Deployment", "StatefulSet")]
        for cluster in self.kind("RayCluster"):
            groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
            found += [(cluster["metadata"]["name"], group["template"]) for group in groups]
        return found

    def pod(self, component: str) -> Document:
        (found,) = [pod for _, pod in self.pods() if pod["metadata"]["labels"][COMPONENT] == component]
        return found

    def components(self) -> set[str]:
        return {pod["metadata"]["labels"][COMPONENT] for _, pod in self.pods()}


@pytest.fixture(scope="session")
def render(chart: helm.Chart) -> Callable[..., Release]:
    """What the chart makes of values that its schema takes."""

    def render(values: Values, name: str = "demo", case: str = "own") -> Release:
        chart.validate_schema(values)
        rendered = chart.render(values, name=name, namespace="prod")
        texts = [text for path, text in sorted(rendered.items()) if path.endswith(".yaml")]
        return Release(case, values, [document for text in texts for document in yaml.safe_load_all(text) if document])

    return render


@pytest.fixture(scope="session", params=CASES)
def release(request: pytest.FixtureRequest, folder: Path, render: Callable[..., Release]) -> Release:
    """Each values file of the chart's `ci` folder, rendered."""
    values = yaml.safe_load((folder / "ci" / f"{request.param}-values.yaml").read_text())
    return render(values, case=request.param)
