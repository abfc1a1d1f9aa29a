"""launch/retrieval: every manifest is valid for Kubernetes, and what it starts takes those flags and files."""

import re
import shlex
import subprocess

import kubernetes_validate
import pytest
import yaml
from small_run import ROOT

FOLDER = ROOT / "launch" / "retrieval"
DOCUMENTS = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
PROGRAM = (ROOT / "launch" / "serve_retrieval.py").read_text()
FLAGS = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', PROGRAM))


def named(kind: str, name: str) -> dict:
    (document,) = [d for d in DOCUMENTS if d["kind"] == kind and d["metadata"]["name"] == name]
    return document


def pods() -> list[dict]:
    return [named("StatefulSet", "retro-shards"), named("Deployment", "retro-front")]


@pytest.mark.parametrize("version", ["1.28", "1.33"])
def test_every_document_is_valid(version):
    assert [document["kind"] for document in DOCUMENTS] == [
        "Service", "StatefulSet", "PodDisruptionBudget", "Service", "Deployment", "NetworkPolicy"
    ]  # fmt: skip
    for document in DOCUMENTS:
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_field_would_be_found():
    broken = yaml.safe_load(yaml.safe_dump(DOCUMENTS[1]))
    broken["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.33", strict=True)


def test_flags_ports_volumes_and_probes_belong_together():
    for document in pods():
        pod = document["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        arguments = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
        assert arguments.keys() <= FLAGS
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        for value in arguments.values():
            assert not value.startswith("/") or any(value.startswith(f"{path}/") for path in paths), value
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["health"] == int(arguments["health_port"]) and ports["metrics"] == int(arguments["metrics_port"])
        probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
        for name, probe in probes.items():
            service = "readiness" if name == "readinessProbe" else "liveness"
            assert probe["grpc"] == {"port": ports["health"], "service": service}
        drained = float(arguments["drain_seconds"]) + float(arguments["grace_seconds"])
        assert drained < pod["terminationGracePeriodSeconds"]
        service = named("Service", document["metadata"]["name"])
        labels = document["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"] == labels == document["spec"]["selector"]["matchLabels"]


def test_the_front_asks_every_pod_and_every_pod_has_a_part():
    shards, front = (document["spec"] for document in pods())
    (container,) = shards["template"]["spec"]["containers"]
    (asked,) = [a for a in front["template"]["spec"]["containers"][0]["args"] if a.startswith("--backends=")]
    count = shards["replicas"]
    expected = [f"retro-shards-{i}.{shards['serviceName']}:50051" for i in range(count)]
    assert asked == f"--backends={','.join(expected)}"
    parts = container["env"][0]["value"]
    held = []
    for i in range(count):
        script = container["command"][2].replace("exec python", "echo")
        result = subprocess.run(
            ["sh", "-c", script, "sh", *container["args"]],
            env={"PARTS": parts, "POD_NAME": f"retro-shards-{i}"},
            capture_output=True,
            text=True,
            check=True,
        )
        words = shlex.split(result.stdout)
        assert words[2:] == container["args"]
        held.append(words[1])
    assert held == ["--shards=0/2", "--shards=1/2"] * 2


def test_the_image_holds_what_the_program_needs():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert instructions[0] == ["FROM", "python:3.11-slim-bookworm"]
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {instruction for instruction, _ in instructions} <= known
    for instruction, rest in instructions:
        if instruction == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
    user = next(rest for instruction, rest in instructions if instruction == "USER")
    for document in pods():
        assert document["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(user)
    assert "extras_require" in (ROOT / "setup.py").read_text() and '"serve": SERVE' in (ROOT / "setup.py").read_text()
