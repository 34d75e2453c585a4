"""The compose file, the Kubernetes manifests and the Helm values agree with the images, the server and each other.

`make lint` checks their schemas; here is what no schema knows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.dockerfile import instructions
from tests.deploy.image import ROOT
from vllm_toptheta.server.config import ServerConfig
from vllm_toptheta.settings import Settings

DEPLOY = ROOT / "deploy"
CONFIG_FILE = "/etc/toptheta/config.yaml"
GRACE_FIELD = "shutdown-timeout"


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / path).read_text())


def image_setting(dockerfile: str, name: str) -> str:
    return [step for step in instructions(DEPLOY / "docker" / dockerfile) if step.name == name][-1].text


@pytest.fixture
def compose() -> dict[str, Any]:
    return read("compose/compose.yaml")


@pytest.fixture
def pod() -> dict[str, Any]:
    return read("kubernetes/deployment.yaml")["spec"]["template"]["spec"]


def config(text: str, folder: Path) -> ServerConfig:
    """Check a configuration as `toptheta serve --config` does."""
    file = folder / "config.yaml"
    file.write_text(text)
    loaded = ServerConfig.load(file)
    Settings.load(loaded.options)
    return loaded


class TestCompose:
    def test_configurations_are_valid_and_mounted_where_the_image_looks(
        self, compose: dict[str, Any], tmp_path: Path
    ) -> None:
        for name in ("cpu", "gpu"):
            service = compose["services"][f"server-{name}"]
            assert f"./config-{name}.yaml:{CONFIG_FILE}:ro" in service["volumes"]
            settings = config((DEPLOY / f"compose/config-{name}.yaml").read_text(), tmp_path)
            grace = int(service["stop_grace_period"].removesuffix("s"))
            assert grace > settings.vllm[GRACE_FIELD] > 0
            assert any(volume.split(":")[1] == "/models" for volume in service["volumes"])
            assert settings.model is not None
            assert settings.model.startswith("/models/")

    def test_the_demo_model_is_made_where_the_server_expects_it(self, compose: dict[str, Any], tmp_path: Path) -> None:
        settings = config((DEPLOY / "compose/config-cpu.yaml").read_text(), tmp_path)
        assert compose["services"]["demo-model"]["entrypoint"] == ["toptheta", "demo-model", "--out", settings.model]

    def test_every_image_is_pinned_and_every_port_local(self, compose: dict[str, Any]) -> None:
        for name, service in compose["services"].items():
            tag = service["image"].partition(":")[2]
            assert tag.removeprefix("v")[:1].isdigit(), name
            assert "no-new-privileges:true" in service.get("security_opt", ["no-new-privileges:true"])
            for port in service.get("ports", []):
                assert port.startswith("127.0.0.1:")

    def test_mounted_files_exist(self, compose: dict[str, Any]) -> None:
        for service in compose["services"].values():
            for source in (volume.split(":")[0] for volume in service.get("volumes", [])):
                if source == "./models":  # the operator's
                    continue
                assert source in compose["volumes"] or (DEPLOY / "compose" / source).exists(), source

    def test_prometheus_finds_the_server(self, compose: dict[str, Any]) -> None:
        (job,) = read("compose/prometheus.yaml")["scrape_configs"]
        host, port = job["static_configs"][0]["targets"][0].split(":")
        for name in ("cpu", "gpu"):
            assert host in compose["services"][f"server-{name}"]["networks"]["default"]["aliases"]
            assert port == image_setting(f"Dockerfile.{name}", "EXPOSE")
        assert job["metrics_path"] == "/metrics"


class TestKubernetes:
    def test_the_pod_is_restricted(self, pod: dict[str, Any]) -> None:
        """Kubernetes' pod security standard `restricted`, and no writable root."""
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert f"{pod['securityContext']['runAsUser']}:0" == image_setting("Dockerfile.gpu", "USER")
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }

    def test_no_variable_of_a_service_reaches_the_server(self, pod: dict[str, Any]) -> None:
        assert pod["enableServiceLinks"] is False

    def test_what_must_be_writable_is(self, pod: dict[str, Any]) -> None:
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        home = [word for word in image_setting("Dockerfile.gpu", "ENV").split() if word.startswith("HOME=")]
        for path in ("/tmp", "/dev/shm", home[0].removeprefix("HOME=")):  # noqa: S108
            assert "emptyDir" in mounts[path]

    def test_requests_and_limits(self, pod: dict[str, Any]) -> None:
        resources = pod["containers"][0]["resources"]
        assert set(resources["requests"]) == {"cpu", "memory", "nvidia.com/gpu"}
        assert set(resources["limits"]) == {"memory", "nvidia.com/gpu"}

    def test_probes(self, pod: dict[str, Any]) -> None:
        (container,) = pod["containers"]
        (port,) = container["ports"]
        assert str(port["containerPort"]) == image_setting("Dockerfile.gpu", "EXPOSE")
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[name]["httpGet"] == {"path": "/health", "port": port["name"]}
        assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] >= 1800

    def test_the_configuration_is_valid_and_mounted(self, pod: dict[str, Any], tmp_path: Path) -> None:
        manifest = read("kubernetes/configmap.yaml")
        settings = config(manifest["data"]["config.yaml"], tmp_path)
        (container,) = pod["containers"]
        assert container["args"] == ["--config", CONFIG_FILE]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        (volume,) = [volume for volume in pod["volumes"] if "configMap" in volume]
        assert volume["configMap"]["name"] == manifest["metadata"]["name"]
        assert mounted[volume["name"]] == str(Path(CONFIG_FILE).parent)
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] >= pause + settings.vllm[GRACE_FIELD] + 10
        (claim,) = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert claim["persistentVolumeClaim"]["claimName"] == read("kubernetes/pvc.yaml")["metadata"]["name"]
        assert str(settings.model).startswith(mounted[claim["name"]])

    def test_selectors(self) -> None:
        deployment, service = read("kubernetes/deployment.yaml"), read("kubernetes/service.yaml")
        monitor = read("kubernetes/monitoring/servicemonitor.yaml")
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert service["spec"]["selector"].items() <= labels.items()
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        (port,) = service["spec"]["ports"]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert port["targetPort"] == container["ports"][0]["name"]
        assert [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]] == [port["name"]]


class TestHelm:
    """The chart's keys, as of vllm-stack 0.1.16; it ignores those that it does not know."""

    ENGINE = {
        "runtimeClassName": str,
        "imagePullPolicy": str,
        "modelSpec": list,
        "startupProbe": dict,
        "securityContext": dict,
        "containerSecurityContext": dict,
        "serviceMonitor": dict,
    }
    MODEL = {
        "name": str,
        "repository": str,
        "tag": str,
        "modelURL": str,
        "replicaCount": int,
        "requestCPU": int,
        "requestMemory": str,
        "requestGPU": int,
        "pvcStorage": str,
        "pvcAccessMode": list,
        "shmSize": str,
        "env": list,
        "vllmConfig": dict,
        "extraVolumes": list,
        "extraVolumeMounts": list,
    }
    VLLM = {
        "enablePrefixCaching": bool,
        "maxModelLen": int,
        "tensorParallelSize": int,
        "gpuMemoryUtilization": float,
        "extraArgs": list,
    }

    @pytest.fixture
    def engine(self) -> dict[str, Any]:
        values = read("helm/values-toptheta.yaml")
        assert set(values) == {"servingEngineSpec"}
        return values["servingEngineSpec"]

    def test_keys_and_types(self, engine: dict[str, Any]) -> None:
        (model,) = engine["modelSpec"]
        for values, known in ((engine, self.ENGINE), (model, self.MODEL), (model["vllmConfig"], self.VLLM)):
            assert {key: type(value) for key, value in values.items()} == {key: known[key] for key in values}
        assert all(isinstance(argument, str) for argument in model["vllmConfig"]["extraArgs"])

    def test_the_plugin_is_named_and_the_options_are_valid(self, engine: dict[str, Any]) -> None:
        (model,) = engine["modelSpec"]
        assert {"name": "VLLM_PLUGINS", "value": "toptheta"} in model["env"]
        arguments = model["vllmConfig"]["extraArgs"]
        flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert flags["--attention-backend"] == "toptheta"
        Settings.load(json.loads(flags["--additional-config"])["toptheta"])

    @pytest.mark.e2e
    def test_vllm_accepts_the_arguments(self, engine: dict[str, Any]) -> None:
        (model,) = engine["modelSpec"]
        parse = (
            "import sys; from vllm.entrypoints.launchers.cli_args import make_arg_parser;"
            "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser;"
            "print(make_arg_parser(Parser()).parse_args(sys.argv[1:]).shutdown_timeout)"
        )
        done = subprocess.run(
            [sys.executable, "-c", parse, "--model", model["modelURL"], *model["vllmConfig"]["extraArgs"]],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split()[-1] == "120"
