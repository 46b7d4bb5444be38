"""The deployment examples: they are well formed, and none of them gives up what the documents say they keep."""

from __future__ import annotations

import configparser
import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedpt_secure.network.folder import ClientFolder, ServerFolder

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SWITCHED_OFF = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
SECRET_NAME = re.compile(r"key|secret|token|passphrase|password|credential", re.IGNORECASE)
PINNED = re.compile(r"^[\w./-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?$")
USER = 10001
FOLDER = "/federation"


def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def manifests():
    return [
        document
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def of_kind(kind, documents=None):
    return {entry["metadata"]["name"]: entry for entry in documents or manifests() if entry["kind"] == kind}


def unit(name):
    """Settings of a unit, each as a list: systemd repeats keys."""
    parser = configparser.RawConfigParser(
        strict=False, dict_type=Repeated, delimiters=("=",), comment_prefixes=("#", ";")
    )
    parser.optionxform = str
    parser.read_string((DEPLOY / "systemd" / name).read_text())
    return {section: {key: str(value).split("\n") for key, value in parser.items(section)} for section in parser}


class Repeated(dict):
    """Keeps every value of a key that stands twice, as `configparser` hands them over: lists of lines."""

    def __setitem__(self, key, value):
        if isinstance(value, list) and isinstance(self.get(key), list):
            self[key].extend(value)
        else:
            super().__setitem__(key, value)


def faults_of_service(service):
    """What a Compose service gives up."""
    faults = []
    if service.get("user", "0").split(":")[0] in ("0", "root"):
        faults.append("root")
    if not service.get("read_only"):
        faults.append("writable root file system")
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
        faults.append("capabilities")
    if "no-new-privileges:true" not in service.get("security_opt", []):
        faults.append("privileges can be gained")
    if any(SECRET_NAME.search(name) for name in service.get("environment", {})):
        faults.append("secret in the environment")
    if not PINNED.match(service.get("image", "")):
        faults.append("image not pinned")
    if service.get("ports"):
        faults.append("published port")
    if service.get("network_mode") == "host" or service.get("pid") == "host" or service.get("ipc") == "host":
        faults.append("the host's name spaces")
    if service.get("ulimits", {}).get("core") != 0:
        faults.append("core dumps")
    if any(not isinstance(volume, str) and "docker.sock" in volume["source"] for volume in service.get("volumes", [])):
        faults.append("the host's Docker")
    if any("noexec" not in entry for entry in service.get("tmpfs", [])):
        faults.append("programs in /tmp")
    return faults


def faults_of_pod(pod):
    """What a Kubernetes pod gives up."""
    faults = []
    whole = pod.get("securityContext", {})
    if not whole.get("runAsNonRoot") or not whole.get("runAsUser"):
        faults.append("root")
    if whole.get("seccompProfile") != {"type": "RuntimeDefault"}:
        faults.append("seccomp")
    if pod.get("automountServiceAccountToken", True):
        faults.append("service account token")
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        faults.append("the host's name spaces")
    if any("hostPath" in volume for volume in pod["volumes"]):
        faults.append("host path")
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        own = container.get("securityContext", {})
        if not own.get("readOnlyRootFilesystem"):
            faults.append("writable root file system")
        if own.get("allowPrivilegeEscalation", True):
            faults.append("privileges can be gained")
        if own.get("capabilities") != {"drop": ["ALL"]} or own.get("privileged"):
            faults.append("capabilities")
        limits = container.get("resources", {}).get("limits", {})
        if not {"cpu", "memory"} <= set(limits):
            faults.append("no limits")
        if not PINNED.match(container["image"]):
            faults.append("image not pinned")
        entries = container.get("env", [])
        if container.get("envFrom") or any(SECRET_NAME.search(one["name"]) or "valueFrom" in one for one in entries):
            faults.append("secret in the environment")
    return faults


@pytest.mark.parametrize("name", compose()["services"])
def test_a_compose_service_gives_up_nothing(name):
    assert faults_of_service(compose()["services"][name]) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"user": "0:0"}, "root"),
        ({"read_only": False}, "writable root file system"),
        ({"cap_add": ["SYS_PTRACE"]}, "capabilities"),
        ({"privileged": True}, "capabilities"),
        ({"security_opt": []}, "privileges can be gained"),
        ({"environment": {"NODE_KEY": "x"}}, "secret in the environment"),
        ({"image": "fedpt-secure:latest"}, "image not pinned"),
        ({"image": "fedpt-secure"}, "image not pinned"),
        ({"ports": ["8000:8000"]}, "published port"),
        ({"network_mode": "host"}, "the host's name spaces"),
        ({"ulimits": {}}, "core dumps"),
        ({"volumes": [{"type": "bind", "source": "/var/run/docker.sock"}]}, "the host's Docker"),
        ({"tmpfs": ["/tmp"]}, "programs in /tmp"),  # noqa: S108
    ],
)
def test_a_compose_service_that_gives_something_up_is_found(change, fault):
    assert faults_of_service(compose()["services"]["client-a"] | change) == [fault]


def test_compose_clients_reach_the_server_alone():
    content = compose()
    networks = {name: set(service["networks"]) for name, service in content["services"].items()}
    for name in ("client-a", "client-b"):
        assert all(content["networks"][network]["internal"] for network in networks[name])
        assert {other for other in networks if other != name and networks[other] & networks[name]} == {"server"}
    assert all(content["networks"][network]["internal"] for network in networks["server"])


def test_compose_binds_folders_and_runs_the_commands_on_them():
    services = compose()["services"]
    for name, command in (("server", "server"), ("client-a", "client"), ("client-b", "client")):
        service = services[name]
        assert service["command"] == ["federation", command, FOLDER]
        assert service["environment"] == SWITCHED_OFF
        targets = {volume["target"]: volume.get("read_only", False) for volume in service["volumes"]}
        assert targets.pop(FOLDER) is False
        assert all(targets.values())  # all else is read only, records above all
    volumes = [volume for one in services.values() for volume in one["volumes"] if not isinstance(volume, str)]
    folders = [volume["source"] for volume in volumes if volume["source"].startswith("./")]
    assert len(folders) == len(set(folders))  # no two processes share a folder


@pytest.mark.parametrize("name", [*of_kind("StatefulSet"), *of_kind("Pod")])
def test_a_pod_gives_up_nothing(name):
    entry = (of_kind("StatefulSet") | of_kind("Pod"))[name]["spec"]
    assert faults_of_pod(entry.get("template", {}).get("spec", entry)) == []


@pytest.mark.parametrize(
    ("where", "change", "fault"),
    [
        ("pod", {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}, "root"),
        ("pod", {"securityContext": {"runAsNonRoot": True, "runAsUser": USER}}, "seccomp"),
        ("pod", {"automountServiceAccountToken": True}, "service account token"),
        ("pod", {"hostNetwork": True}, "the host's name spaces"),
        ("pod", {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "host path"),
        ("container", {"image": "fedpt-secure:latest"}, "image not pinned"),
        ("container", {"resources": {}}, "no limits"),
        ("container", {"env": [{"name": "IDENTITY_SECRET", "value": "x"}]}, "secret in the environment"),
        ("container", {"envFrom": [{"secretRef": {"name": "client-a-keys"}}]}, "secret in the environment"),
        ("security", {"readOnlyRootFilesystem": False}, "writable root file system"),
        ("security", {"allowPrivilegeEscalation": True}, "privileges can be gained"),
        ("security", {"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}}, "capabilities"),
    ],
)
def test_a_pod_that_gives_something_up_is_found(where, change, fault):
    pod = copy.deepcopy(of_kind("StatefulSet")["client-a"]["spec"]["template"]["spec"])
    container = pod["containers"][0]
    target = {"pod": pod, "container": container, "security": container["securityContext"]}[where]
    # An anchor made the init container share it; only this one is to change.
    if where == "security":
        container["securityContext"] = target = dict(target)
    target.update(change)
    assert faults_of_pod(pod) == [fault]


def test_pods_run_the_commands_as_the_images_user_with_flowers_calls_home_off():
    for name, command in (("server", "server"), ("client-a", "client")):
        entry = of_kind("StatefulSet")[name]["spec"]
        pod = entry["template"]["spec"]
        (container,) = pod["containers"]
        assert container["args"] == ["federation", command, FOLDER]
        assert {one["name"]: one["value"] for one in container["env"]} == SWITCHED_OFF
        assert entry["replicas"] == 1  # a ledger, a journal has one writer
        assert pod["securityContext"]["runAsUser"] == USER
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claims = {claim["metadata"]["name"]: claim for claim in entry.get("volumeClaimTemplates", ())}
        if "state" in volumes:
            claims["state"] = of_kind("PersistentVolumeClaim")[volumes["state"]["persistentVolumeClaim"]["claimName"]]
        assert claims["state"]["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert f"USER {USER}:{USER}" in (DEPLOY / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("name", "secrets"),
    [
        ("client-a", {str(ClientFolder(Path(FOLDER)).identity), str(ClientFolder(Path(FOLDER)).node_key)}),
        (
            "server",
            {str(ServerFolder(Path(FOLDER)).tls("server.pem")), str(ServerFolder(Path(FOLDER)).tls("server.key"))},
        ),
    ],
)
def test_secrets_of_a_pod_lie_in_memory_where_the_program_looks_and_nowhere_else(name, secrets):
    pod = of_kind("StatefulSet")[name]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["secrets"]["emptyDir"]["medium"] == "Memory"
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert {path for path, mount in mounts.items() if mount["name"] == "secrets"} == secrets
    assert all(mounts[path]["readOnly"] for path in secrets)
    # The cluster's secret itself is seen only by what copies it, and its script closes the copies to others.
    assert "given-secret" not in {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    (script,) = pod["initContainers"][0]["args"]
    assert "umask 077" in script
    for path in secrets:
        assert re.search(rf"install -m 0600 [^\n]*/given/secret/{re.escape(Path(path).name)}[ /]", script), path


def test_what_init_containers_place_is_what_the_folders_hold():
    client, server = ClientFolder(Path(FOLDER)), ServerFolder(Path(FOLDER))
    scripts = {
        name: entry["spec"]["template"]["spec"]["initContainers"][0]["args"][0]
        for name, entry in of_kind("StatefulSet").items()
    }
    for path in (client.certificate, client.path / "config.toml", client.path / "roster.json"):
        assert f"/given/public/{path.name}" in scripts["client-a"]
    for path in (server.tls("ca.crt"), server.path / "config.toml", server.path / "roster.json"):
        assert f"/given/public/{path.name}" in scripts["server"]
    assert str(server.nodes) in scripts["server"]
    assert str(server.tls("x").parent) in scripts["server"]


def test_a_client_does_not_start_without_its_ledger_nor_goes_its_ledger_with_it():
    client = of_kind("StatefulSet")["client-a"]["spec"]
    (script,) = client["template"]["spec"]["initContainers"][0]["args"]
    ledger = ClientFolder(Path(FOLDER)).ledger / "ledger.sqlite"
    assert re.search(rf"if \[ ! -f {ledger} \]; then\n.*\n +exit 1", script)
    assert "volumeClaimTemplates" not in client  # its volume is nobody's to delete but its owner's
    state = "client-a-state"
    assert state in of_kind("PersistentVolumeClaim")
    for pod in (client["template"]["spec"], of_kind("Pod")["client-a-ledger"]["spec"]):
        assert [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v["name"] == "state"] == [state]


def test_policies_let_clients_reach_the_superlink_and_nobody_reach_a_client():
    policies = of_kind("NetworkPolicy")
    nothing = policies["nothing-by-default"]["spec"]
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    server, client = policies["server"]["spec"], policies["client-a"]["spec"]
    assert server["policyTypes"] == client["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in server
    assert "ingress" not in client
    (reached,) = server["ingress"]
    assert reached["ports"] == [{"protocol": "TCP", "port": 8000}]
    assert reached["from"] == [{"podSelector": {"matchLabels": {"app": "fedpt-secure", "role": "client"}}}]
    ports = [(rule["to"][0].keys(), [port["port"] for port in rule["ports"]]) for rule in client["egress"]]
    assert ports[0] == ({"podSelector": None}.keys(), [8000])
    assert ports[1][1] == [53, 53]
    assert len(ports) == 2
    pods = {name: entry["spec"]["template"]["metadata"]["labels"] for name, entry in of_kind("StatefulSet").items()}
    assert server["podSelector"]["matchLabels"].items() <= pods["server"].items()
    assert client["podSelector"]["matchLabels"].items() <= pods["client-a"].items()
    assert of_kind("Service")["server"]["spec"]["type"] == "ClusterIP"
    labels = of_kind("Namespace")["fedpt-secure"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("name", "command"),
    [("fedpt-secure-client@.service", "client"), ("fedpt-secure-server.service", "server")],
)
def test_a_unit_is_confined(name, command):
    service = unit(name)["Service"]
    wanted = {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "PrivateDevices": "yes",
        "CapabilityBoundingSet": "",
        "LimitCORE": "0",
        "MemorySwapMax": "0",
        "UMask": "0077",
        "StateDirectoryMode": "0700",
        "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6",
        "SystemCallArchitectures": "native",
        "IPAddressDeny": "any",
    }
    assert {key: service[key][0] for key in wanted} == wanted
    assert service["User"] == ["fedpt-secure"]
    assert f"federation {command} /var/lib/fedpt-secure/" in service["ExecStart"][0]
    environment = dict(line.split("=", 1) for line in service["Environment"])
    assert environment.items() >= SWITCHED_OFF.items()
    assert not any(SECRET_NAME.search(key) for key in environment)
    assert service["SystemCallFilter"] == ["@system-service", "~@privileged @resources"]


def test_units_pass_systemds_own_check(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for path in (DEPLOY / "systemd").glob("*.service"):
        program = "/opt/fedpt-secure/bin/fedpt-secure"  # not installed there where tests run
        copied = tmp_path / path.name
        copied.write_text(path.read_text().replace(program, sys.executable))
        found = subprocess.run(["systemd-analyze", "verify", str(copied)], capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, "")


def test_the_image_is_pinned_and_runs_as_nobody_in_particular():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert bases
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm", base) for base in bases)
    assert [line for line in lines if line.startswith("USER ")][-1] == f"USER {USER}:{USER}"
    text = "\n".join(lines)
    assert all(f"{name}={value}" in text for name, value in SWITCHED_OFF.items())
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored  # nothing but what is named goes into the build
    assert {"**/*.secret.json", "**/node.key"} <= set(ignored)


def test_manifests_fit_kubernetes_schemas():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in manifests():
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_compose_fits_the_compose_specification():
    pytest.importorskip("check_jsonschema", reason="pip install check-jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*command, str(DEPLOY / "compose.yaml")], check=True, capture_output=True)
