"""Dockerfile, compose, chart, units and the fleet's configuration, by what judges such files."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml

from deploy import fleet
from tests.deployment.conftest import DEPLOY, ROOT, Program, run
from vllm_kvcrush import gate
from vllm_kvcrush.config import Settings
from vllm_kvcrush.server import rules as server_rules

CHART = DEPLOY / "helm" / "vllm-kvcrush"
CONFIGS = {
    "nginx": "nginx/nginx.conf",
    "haproxy": "haproxy/haproxy.cfg",
    "prometheus": "prometheus/prometheus.yml",
    "alertmanager": "alertmanager/alertmanager.yml",
}
SERVE = yaml.safe_load((DEPLOY / "vllm" / "serve.yaml").read_text(encoding="utf-8"))


@functools.cache
def options() -> set[str]:
    """Options of `vllm serve` with this plugin's, without dashes."""
    script = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
load_general_plugins()
parser = make_arg_parser(FlexibleArgumentParser())
print(*(o for a in parser._actions for o in a.option_strings), sep="\\n")
"""
    done = run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    return {line.removeprefix("--") for line in done.stdout.splitlines() if line.startswith("--")}


def test_serve_yaml_is_understood_and_true_to_the_release() -> None:
    known = options()
    assert {"kv-policy", "max-model-len"} <= known
    assert set(SERVE) <= known
    # Flags of compose's grace period.
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    for grace in re.findall(r"stop_grace_period: (\d+)s", compose):
        assert int(grace) > SERVE["shutdown-timeout"]
    unit = (DEPLOY / "systemd" / "vllm-kvcrush@.service").read_text(encoding="utf-8")
    (timeout,) = re.findall(r"TimeoutStopSec=(\d+)", unit)
    assert int(timeout) > SERVE["shutdown-timeout"]


# -- fleet -----------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: pathlib.Path) -> fleet.Fleet:
    return fleet.Fleet("/somewhere/model", tmp_path)


def test_only_addresses_models_and_folders_change(made: fleet.Fleet) -> None:
    """What `make fleet` runs is what the files say."""
    for name, path in {**CONFIGS, "replica-0": "vllm/serve.yaml"}.items():
        before = (DEPLOY / path).read_text(encoding="utf-8").splitlines()
        after = made.local(path, name).read_text(encoding="utf-8").splitlines()
        assert len(before) == len(after)
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert changed
        for old, new in changed:
            assert fleet.ADDRESS.search(old) or "/tmp/" in old or old.startswith("model:"), old
            assert "127.0.0.1" in new or str(made.folder) in new or "/somewhere/model" in new
        assert not any(fleet.ADDRESS.search(line) for line in after)
    # The same name is the same port in every file.
    nginx = (made.folder / "nginx.conf").read_text(encoding="utf-8")
    haproxy = (made.folder / "haproxy.cfg").read_text(encoding="utf-8")
    watched = (made.folder / "prometheus.yml").read_text(encoding="utf-8")
    for replica in ("replica-0", "replica-1"):
        address = f"127.0.0.1:{made.port(replica)}"
        assert address in nginx and address in haproxy and address in watched
    assert len(set(made.ports.values())) == len(made.ports)


def test_clocks_run_faster() -> None:
    text = "for: 5m\nrate(x[5m]) name:rate5m 1.5h 15s\nrepeat_interval: 12h"
    assert fleet.faster(text, 15) == (
        "for: 20000ms\nrate(x[20000ms]) name:rate5m 1.5h 1000ms\nrepeat_interval: 2880000ms"
    )
    assert fleet.faster(text, 1) == text


def test_a_process_that_does_not_start_is_told(made: fleet.Fleet) -> None:
    with pytest.raises(fleet.FleetError, match="apt-get install nginx-light haproxy"):
        made.run("nothing", "no-such-program")
    made.run("early", "sh", "-c", "echo it broke; exit 3")
    with pytest.raises(fleet.FleetError, match="early did not start:\nit broke"):
        made.wait("early", "/", 10)
    made.close()
    assert not made.running


def test_what_is_missing_is_named(
    made: fleet.Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet, "PATH", str(made.folder))
    line = "apt-get install nginx-light haproxy prometheus prometheus-alertmanager"
    with pytest.raises(fleet.FleetError, match=line):
        made.start()
    (made.folder / "haproxy").touch(0o755)
    assert fleet.missing() == ["nginx-light", "prometheus", "prometheus-alertmanager"]
    monkeypatch.setattr(sys, "argv", ["fleet"])
    monkeypatch.setenv("MODEL", "/somewhere/model")
    assert fleet.main() == 1
    assert "apt-get install nginx-light prometheus" in capsys.readouterr().err
    assert not made.running


def test_processes_end_with_all_they_started(made: fleet.Fleet) -> None:
    made.run("parent", "sh", "-c", "trap '' TERM; sleep 600 & echo $!; wait; sleep 600")
    log = made.folder / "parent.log"
    while not log.read_text().strip():
        pass
    child = int(log.read_text())
    made.stop("parent", seconds=0.5)
    state = pathlib.Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_fronts_take_their_configuration(made: fleet.Fleet, debian: Program, name: str) -> None:
    config = made.local(CONFIGS[name], name)
    if name == "nginx":
        # The port that a fleet would log to is not there without its processes.
        done = debian("nginx-light", "nginx", "-t", "-p", made.folder, "-c", config, "-e", "stderr")
    else:
        done = debian("haproxy", "haproxy", "-c", "-f", config)
    assert done.returncode == 0, done.stdout + done.stderr


# -- containers ------------------------------------------------------------------------------------


def test_dockerfile(tools: pathlib.Path) -> None:
    done = run(tools / "bin" / "hadolint", "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    releases = {str(row) for row in gate.SUPPORTED if row.warning is None}
    for version in re.findall(r"^ARG \w+_IMAGE=.*:v(\d+\.\d+)\.\d+$", text, re.M):
        assert version in releases
    # The last stage is what a plain build makes.
    assert re.findall(r"^FROM (\S+) AS (\S+)$", text, re.M)[-1] == ("runtime", "cpu")
    # What is copied is not ignored.
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        for name in source.split():
            assert f"!{name}" in kept and (ROOT / name).exists(), name


def test_compose(tools: pathlib.Path) -> None:
    binary = tools / "bin" / "docker-compose"
    done = run(
        binary, "-f", DEPLOY / "compose.yaml", "config", "--format=json", GRAFANA_PASSWORD="x"
    )
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert run(binary, "-f", DEPLOY / "compose.yaml", "config", "-q").returncode != 0  # no password
    for name, service in services.items():
        for volume in service["volumes"]:
            if volume["type"] == "bind" and "/models" not in volume["target"]:
                source = pathlib.Path(volume["source"])
                assert (
                    source.is_file()
                    or (name == "grafana" and source.is_dir())
                    or (
                        # Where the image and serve.yaml look for them.
                        volume["target"] == "/etc/kvcrush"
                        and {"serve.yaml", "rules.yaml"} <= {path.name for path in source.iterdir()}
                    )
                )
        assert service["cap_drop"] == ["ALL"] and service["read_only"]
    # Names and ports are those that the configuration files speak of.
    spoken = set()
    for path in CONFIGS.values():
        spoken |= set(fleet.ADDRESS.findall((DEPLOY / path).read_text(encoding="utf-8")))
    hosts = {address.split(":")[0] for address in spoken}
    assert hosts - {"0.0.0.0", "alert-receiver"} <= set(services)
    source = (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text("utf-8")
    assert yaml.safe_load(source)["datasources"][0]["url"] == "http://prometheus:9090"


def test_yaml_is_tidy(tools: pathlib.Path) -> None:
    rules = "{extends: default, rules: {line-length: {max: 130}, document-start: disable, "
    rules += "comments: {min-spaces-from-content: 1}, braces: {max-spaces-inside: 0}}}"
    paths = [p for p in DEPLOY.rglob("*.y*ml") if "templates" not in p.parts]
    done = run(
        *(sys.executable, "-m", "yamllint", "-s", "-d", rules, *paths),
        PYTHONPATH=str(tools),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_units(debian: Program, tmp_path: pathlib.Path) -> None:
    for path in (DEPLOY / "systemd").iterdir():
        text = path.read_text(encoding="utf-8")
        # The one program that is not on this machine.
        own = tmp_path / path.name.replace("@.", "@8000.")
        own.write_text(text.replace("/opt/vllm-kvcrush/bin/vllm", shutil.which("true") or ""))
    done = debian("systemd", "systemd-analyze", "verify", "--man=no", *tmp_path.iterdir())
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr


# -- chart -----------------------------------------------------------------------------------------

ALL: dict[str, Any] = {
    "model": {"volume": {"persistentVolumeClaim": {"claimName": "models"}}},
    "tables": {"file": "t.safetensors", "configMap": "tables"},
    "rules": {"text": (DEPLOY / "vllm" / "rules.yaml").read_text(encoding="utf-8")},
    "policy": {"config": {"window": 16, "kvcrush": {"anchor": "mean"}}, "minTokens": 0},
    "image": {"digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "secret"}],
    "env": {"A": "b", "C": {"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}},
    "apiKeySecret": "key",
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "autoscaling": {"kind": "hpa"},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {}}],
        "monitoring": [{"podSelector": {}}],
        "egress": None,
    },
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboards": {"enabled": True},
}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": ALL,
    "keda": {"autoscaling": {"kind": "keda"}, "rules": {"configMap": "own"}},
    "plain": {
        "policy": {"name": ""},
        "networkPolicy": {"enabled": False},
        "disruptionBudget": {"enabled": False},
        "topologySpread": False,
        "tables": {"file": "t.safetensors", "volume": {"emptyDir": {}}},
    },
}
# Kinds of operators', whose schemas no registry offers.
FOREIGN = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
KUBERNETES = ("1.27", "1.32", "1.37")


def rendered(tools: pathlib.Path, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    script = (
        "import json, sys; from helm_python.chart import Chart\n"
        "with Chart.load(sys.argv[1]) as chart:\n"
        "    found = chart.render(values=json.loads(sys.argv[2]), name='demo', namespace='llm')\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", script, str(CHART), json.dumps(values)]
    environment = {**os.environ, "PYTHONPATH": str(tools)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def documents(tools: pathlib.Path, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the chart makes, by kind and name's ending."""
    done = rendered(tools, values)
    assert done.returncode == 0, done.stderr
    found = {}
    for path, text in json.loads(done.stdout).items():
        if path.endswith(".yaml"):
            for document in filter(None, yaml.safe_load_all(text)):
                ending = document["metadata"]["name"].removeprefix("demo-vllm-kvcrush")
                found[document["kind"] + ending] = document
    return found


@pytest.mark.parametrize("name", VALUES)
def test_chart_makes_valid_objects(
    tools: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tools))
    import kubernetes_validate

    found = documents(tools, VALUES[name])
    assert {"ConfigMap", "Deployment", "Service"} <= set(found)
    for kind, document in found.items():
        if kind not in FOREIGN:
            for version in KUBERNETES:
                kubernetes_validate.validate(document, version, strict=True)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    selector = found["Deployment"]["spec"]["selector"]["matchLabels"].items()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert selector <= labels
    assert found["Service"]["spec"]["selector"].items() == selector
    assert pod["terminationGracePeriodSeconds"] > SERVE["shutdown-timeout"] + 10
    scaled = VALUES[name].get("autoscaling", {}).get("kind")
    assert ("replicas" in found["Deployment"]["spec"]) is not bool(scaled)
    kinds = {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}
    assert [kind for kind in kinds.values() if kind in found] == [kinds[k] for k in [scaled] if k]
    config = yaml.safe_load(found["ConfigMap"]["data"]["serve.yaml"])
    assert set(config) <= options()


def test_chart_serves_what_compose_serves(tools: pathlib.Path) -> None:
    (text,) = documents(tools, {})["ConfigMap"]["data"].values()
    tools_only = {"enable-auto-tool-choice", "tool-call-parser", "enforce-eager"}
    served = {key: str(value) for key, value in yaml.safe_load(text).items()}
    assert served == {k: str(v) for k, v in SERVE.items() if k not in tools_only}


def test_chart_says_policy_tables_and_rules(tools: pathlib.Path) -> None:
    found = documents(tools, ALL)
    config = yaml.safe_load(found["ConfigMap"]["data"]["serve.yaml"])
    assert config["kv-policy-config"] == {
        "window": 16,
        "kvcrush": {"anchor": "mean"},
        "tables": "/tables/t.safetensors",
    }
    assert config["kv-min-tokens"] == 0
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    assert found["PrometheusRule"]["spec"] == rules
    for name in ("fleet", "server"):
        own = found["ConfigMap-dashboards"]["data"][f"kvcrush-{name}.json"]
        assert json.loads(own) == json.loads((DEPLOY / "grafana" / f"{name}.json").read_text())
    (metric,) = found["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["target"]["averageValue"] == "600m"
    image = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "vllm-kvcrush@sha256:" + "0" * 64

    # Other settings are another pod.
    def checksum(values: dict[str, Any]) -> str:
        template = documents(tools, values)["Deployment"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum({}) != checksum({"policy": {"budget": 0.5}})
    assert not any(
        key.startswith("kv-policy")
        for key in yaml.safe_load(
            documents(tools, VALUES["plain"])["ConfigMap"]["data"]["serve.yaml"]
        )
    )


def test_chart_mounts_rules(tools: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found = documents(tools, ALL)
    config = yaml.safe_load(found["ConfigMap"]["data"]["serve.yaml"])
    # As the server would read them, with its own limits.
    rules_file = tmp_path / "rules.yaml"
    rules_file.write_text(found["ConfigMap-rules"]["data"]["rules.yaml"], encoding="utf-8")
    given = {"policy": "policy", "budget": "budget", "budget_max": "budget-max"}
    own = {key: config[f"kv-{flag}"] for key, flag in given.items()}
    settings = Settings.from_dict({**own, "allow": config["kv-policy-allow"]})
    sizes = config["block-size"], config["max-model-len"]
    assert [rule.name for rule in server_rules.load(str(rules_file), settings, *sizes).rules] == [
        *("gold", "acme", "short-answers"),
    ]
    for values, name in ((ALL, "demo-vllm-kvcrush-rules"), (VALUES["keda"], "own")):
        found = documents(tools, values)
        config = yaml.safe_load(found["ConfigMap"]["data"]["serve.yaml"])
        pod = found["Deployment"]["spec"]["template"]["spec"]
        (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "rules")
        assert config["kv-budget-rules"] == f"{mount['mountPath']}/rules.yaml"
        assert "subPath" not in mount  # it would never change
        (volume,) = (v for v in pod["volumes"] if v["name"] == "rules")
        assert volume["configMap"] == {"name": name}

    # Rules change in running pods.
    def pods(text: str) -> dict[str, Any]:
        found = documents(tools, {"rules": {"text": text}})
        assert found["ConfigMap-rules"]["data"]["rules.yaml"] == text
        return dict(found["Deployment"])

    assert pods("rules: []\n") == pods("default: {budget: 0.125}\n")
    assert "kv-budget-rules" not in documents(tools, {})["ConfigMap"]["data"]["serve.yaml"]


@pytest.mark.parametrize(
    ("budget", "written"), [(1, "1.0"), (1.0, "1.0"), (0.125, "0.125"), (4096, 4096)]
)
def test_budgets_are_written_as_they_are_meant(
    tools: pathlib.Path, budget: float, written: Any
) -> None:
    config = documents(tools, {"policy": {"budget": budget}})["ConfigMap"]["data"]["serve.yaml"]
    assert str(yaml.safe_load(config)["kv-budget"]) == str(written)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"policy": {"budget": 1.5}}, "budget"),
        ({"polcy": {}}, "polcy"),
        ({"autoscaling": {"kind": "vpa"}}, "kind"),
        ({"image": {"digest": "md5:0"}}, "digest"),
        ({"tables": {"file": "t.safetensors"}}, "say where it is"),
        ({"rules": {"text": "rules: []", "configMap": "own"}}, "only one of them"),
        ({"rules": {"configMap": "own"}, "policy": {"name": ""}}, "give policy.name"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    tools: pathlib.Path, values: dict[str, Any], says: str
) -> None:
    done = rendered(tools, values)
    assert done.returncode != 0 and says in done.stderr
