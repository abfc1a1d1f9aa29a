"""launch/gke_jobset.sh makes a JobSet that Kubernetes takes and that starts the program as JAX expects it."""

import pytest
import yaml
from script_run import dry_run, run

IMAGE = "us-docker.pkg.dev/p/r/retro_jax:1"
TPU = ("--name=retro", f"--image={IMAGE}", "--accelerator=v4", "--topology=2x2x4")
PROGRAM = ("--", "python", "launch/train.py", "--config=a.py", '--workdir=/mnt/"x" y: {z} $A #1')

# The fields of jobset.x-k8s.io/v1alpha2, batch/v1 and v1 that the manifest may have, and their types.
STRINGS = {str: str}
REQUIREMENT = {"key": str, "operator": str, "effect": str}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "resources": {"requests": {str: int}, "limits": {str: int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": STRINGS,
    "tolerations": [REQUIREMENT],
    "containers": [CONTAINER],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
FAILURE_RULE = {
    "action": str,
    "onPodConditions": [{"type": str}],
    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
}
JOB = {
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [FAILURE_RULE]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "annotations": STRINGS},
    "spec": {
        "network": {"enableDNSHostnames": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check(value, schema, path="manifest"):
    """Every field is one of the schema's and has its type."""
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value, path
        for key, item in value.items():
            kind = schema.get(key, schema.get(str))
            assert kind is not None, f"{path}.{key} is no field"
            check(item, kind, f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for i, item in enumerate(value):
            check(item, schema[0], f"{path}[{i}]")
    else:
        assert type(value) is schema, f"{path} is {value!r}"


def manifest(*arguments):
    lines = dry_run("gke_jobset.sh", *arguments, "--dry_run", *PROGRAM)
    assert lines[0] == "kubectl apply --filename=- <<'MANIFEST'" and lines[-1] == "MANIFEST"
    document = yaml.safe_load("\n".join(lines[1:-1]))
    check(document, JOBSET)
    return document


def job_and_pod(document):
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return job, job["template"]["spec"]


@pytest.mark.parametrize(
    ("flags", "hosts", "chips", "label"),
    [
        (("--accelerator=v4", "--topology=2x2x4"), 4, 4, "tpu-v4-podslice"),
        (("--accelerator=v4", "--topology=8x8x8"), 128, 4, "tpu-v4-podslice"),
        (("--accelerator=v5p", "--topology=2x2x1"), 1, 4, "tpu-v5p-slice"),
        (("--accelerator=v5e", "--topology=16x16"), 64, 4, "tpu-v5-lite-podslice"),
        (("--accelerator=v5e", "--topology=2x4", "--chips_per_host=8"), 1, 8, "tpu-v5-lite-podslice"),
        (("--accelerator=v6e", "--topology=1x1"), 1, 1, "tpu-v6e-slice"),
    ],
)
def test_one_pod_runs_on_every_host_of_the_slice(flags, hosts, chips, label):
    document = manifest(*TPU[:2], *flags)
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, pod = job_and_pod(document)
    assert document["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == hosts
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": flags[1].removeprefix("--topology="),
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}


def test_a_mistake_fails_the_jobset_and_everything_else_restarts_all_of_it():
    document = manifest(*TPU, "--max_restarts=7", "--grace=60")
    job, pod = job_and_pod(document)
    assert document["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    preempted, mistake = job["podFailurePolicy"]["rules"]
    assert preempted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert mistake["action"] == "FailJob"
    assert mistake["onExitCodes"] == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [1]}
    assert pod["terminationGracePeriodSeconds"] == 60


def test_the_program_gets_its_arguments_as_they_are_and_the_files():
    document = manifest(*TPU, "--volume=retro-files:/mnt/retro", "--namespace=research")
    _, pod = job_and_pod(document)
    (container,) = pod["containers"]
    assert container["command"] == list(PROGRAM[1:]) and container["image"] == IMAGE
    assert container["volumeMounts"] == [{"name": "files", "mountPath": "/mnt/retro"}]
    assert pod["volumes"] == [{"name": "files", "persistentVolumeClaim": {"claimName": "retro-files"}}]
    assert document["metadata"]["namespace"] == "research"


def test_pods_with_gpus_are_told_of_the_first_one():
    document = manifest(*TPU[:2], "--gpu=nvidia-h100-80gb", "--hosts=4")
    job, pod = job_and_pod(document)
    (container,) = pod["containers"]
    assert job["completions"] == job["parallelism"] == 4
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    cluster = ["--coordinator=retro-hosts-0-0.retro:8476", "--num_processes=4"]
    shell = ["bash", "-c", 'exec "$@" --process_id="$JOB_COMPLETION_INDEX"', "bash"]
    assert container["command"] == [*shell, *PROGRAM[1:], *cluster]
    assert document["spec"]["network"] == {"enableDNSHostnames": True}
    assert document["spec"]["replicatedJobs"][0]["name"] == "hosts"


def test_the_manifest_goes_to_kubectl(tmp_path):
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\necho "$*" >{tmp_path}/call\ncat >{tmp_path}/manifest\n')
    (tmp_path / "kubectl").chmod(0o755)
    status, _, stderr = run("gke_jobset.sh", *TPU, *PROGRAM, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert status == 0 and "kubectl logs --namespace=default --follow" in stderr
    assert (tmp_path / "call").read_text() == "apply --filename=-\n"
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == manifest(*TPU)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TPU[1:], "--name is missing"),
        (TPU[:1], "--image is missing"),
        (TPU[:3], "--topology is missing"),
        (TPU[:2], "--accelerator is missing: v4, v5e, v5p or v6e; or --gpu"),
        ((*TPU, "--accelerator=v9"), "--accelerator is v4, v5e, v5p or v6e, is 'v9'"),
        ((*TPU, "--accelerator=v5e"), "--topology '2x2x4' is not one of v5e"),
        ((*TPU, "--topology=3x1x2"), "has 6 chips, no multiple of --chips_per_host=4"),
        ((*TPU, "--gpu=nvidia-h100-80gb"), "--gpu goes with --hosts"),
        ((*TPU[:2], "--gpu=nvidia-h100-80gb"), "--hosts is missing"),
        ((*TPU, "--volume=files"), "--volume is CLAIM:/PATH"),
        ((*TPU, "--image=a b"), "--image has characters"),
        ((*TPU, "--nodes=4"), "--nodes is unknown; flags: --accelerator"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, message):
    status, stdout, stderr = run("gke_jobset.sh", *arguments, "--dry_run", *PROGRAM)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ") and message in stderr and len(stderr.splitlines()) == 1


def test_an_argument_that_yaml_cannot_hold_is_refused():
    status, _, stderr = run("gke_jobset.sh", *TPU, "--dry_run", "--", "python", "-c", "a\nb")
    assert status == 1 and "has a line break" in stderr
