"""cluster.yaml and jobs/rayjob.yaml: what Ray and Kubernetes would say, and what they owe us."""

import copy
import importlib.metadata
import json
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from zsplg_ray.cli import parse
from zsplg_ray.config import LabelConfig

ROOT = Path(__file__).parents[1]
CLUSTER, JOB = ROOT / "cluster.yaml", ROOT / "jobs" / "rayjob.yaml"
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
ASKED = {"label_node": "label", "train_node": "train"}
"""Custom resource that jobs ask for -> the node type that has it."""


def cluster() -> dict:
    return yaml.safe_load(CLUSTER.read_text())


def check_with_ray(config: dict) -> None:
    jsonschema.validate(config, SCHEMA)
    validate_config(prepare_config(copy.deepcopy(config)))


def check_ours(config: dict) -> None:
    """What Ray does not look at."""
    types, head = config["available_node_types"], config["head_node_type"]
    workers = {name: what for name, what in types.items() if name != head}
    for name, what in workers.items():
        assert what["min_workers"] <= what["max_workers"] <= config["max_workers"], name
        assert what["min_workers"] == 0, f"{name} costs while nobody works"
    assert "GPU" not in types[head]["resources"], "the head takes no GPU"
    assert types[head]["max_workers"] == 0, "there is one head"
    for resource, name in ASKED.items():
        having = [n for n, what in types.items() if resource in what["resources"]]
        assert having == [name], f"{resource} is to choose {name}"
        assert types[name]["resources"]["GPU"] >= 1, f"{name} has no GPU"
    assert "InstanceMarketOptions" in types["label"]["node_config"], "label nodes are spot"
    assert "InstanceMarketOptions" not in types["train"]["node_config"], "train nodes are not"
    profiles = {
        name: what["node_config"]["IamInstanceProfile"]["Arn"] for name, what in types.items()
    }
    assert all(profiles[name] != profiles[head] for name in workers), "workers start no nodes"
    for starts in ("head_start_ray_commands", "worker_start_ray_commands"):
        command = config[starts][-1]
        assert "RAY_AUTH_MODE=token" in command, f"{starts}: nobody is asked for a token"
        assert "ulimit -n 65535" in command, starts
        assert "0.0.0.0" not in command, f"{starts}: open to all"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "~/.ray/auth_token" in config["file_mounts"], "nodes get no token"


def test_ray_takes_cluster_yaml_and_it_fits_what_jobs_ask_for():
    check_with_ray(cluster())
    check_ours(cluster())


def broken(path: str, value: object) -> dict:
    """cluster.yaml with one value changed, or taken out (None)."""
    config = copy.deepcopy(cluster())  # anchors make parts of it one object
    *way, last = path.split("/")
    part = config
    for key in way:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("idle_timeout_minuts", 5),  # the schema
        ("available_node_types/label/resources/GPU", 0.5),
        ("available_node_types/label/node_config", None),
        ("available_node_types/decode/instance", "c7i.4xlarge"),
        ("head_node_type", "nobody"),  # the validation
        ("available_node_types/decode/min_workers", 21),
        ("docker", {"image": "an/image"}),
    ],
)
def test_ray_would_refuse_a_broken_copy(path, value):
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError, KeyError)):
        check_with_ray(broken(path, value))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("available_node_types/label/max_workers", 30, "label"),
        ("available_node_types/train/min_workers", 1, "train costs"),
        ("available_node_types/head/resources", {"CPU": 0, "GPU": 1}, "no GPU"),
        ("available_node_types/label/resources/label_node", None, "label_node is to choose"),
        ("available_node_types/decode/resources/train_node", 1, "train_node is to choose"),
        ("available_node_types/train/resources/GPU", 0, "train has no GPU"),
        ("available_node_types/train/node_config/InstanceMarketOptions", {}, "train nodes"),
        ("worker_start_ray_commands", ["ulimit -n 65535; ray start"], "token"),
        ("file_mounts", {}, "nodes get no token"),
        (
            "available_node_types/label/node_config/IamInstanceProfile/Arn",
            "arn:aws:iam::ACCOUNT:instance-profile/zsplg-head",
            "workers start no nodes",
        ),
    ],
)
def test_we_would_refuse_a_broken_copy(path, value, told):
    config = broken(path, value)
    jsonschema.validate(config, SCHEMA)
    with pytest.raises(AssertionError, match=told):
        check_ours(config)


@pytest.mark.parametrize("name", ["head", "decode", "label", "train"])
def test_no_node_is_left_without_a_role(name):
    """Ray gives a default to the head alone, and that one may start no node that has a role."""
    path = f"available_node_types/{name}/node_config/IamInstanceProfile"
    with pytest.raises(KeyError, match="IamInstanceProfile"):
        check_ours(broken(path, None))
    comments = CLUSTER.read_text().partition("cluster_name:")[0]
    assert all(right in comments for right in ("iam:PassRole", "ssm:GetParameters", "s3:GetObject"))


def shell_commands(config: dict) -> list[str]:
    """All that a node's shell gets, in brackets as Ray puts it."""
    found = [c for name, what in config.items() if name.endswith("_commands") for c in what]
    return [f"({command})" for command in found]


def syntax_error(command: str) -> str:
    return subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True).stderr


def test_a_shell_takes_each_command_as_yaml_leaves_it():
    commands = shell_commands(cluster())
    assert len(commands) >= 10
    for command in (*commands, job()["spec"]["entrypoint"]):
        assert not syntax_error(command), command
    assert any("zsplg-venv' ~/.bashrc" in command for command in commands)
    cut = yaml.safe_load("- grep -q a b || sed '1i A  # a' b")[0]  # a comment, for YAML
    assert "unexpected EOF" in syntax_error(cut)


def test_apt_asks_nobody():
    (apt,) = [command for command in shell_commands(cluster()) if "apt-get install" in command]
    assert "DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get install" in apt


def test_nodes_get_the_package_whole_and_no_data():
    """The patterns as rsync takes them: `**` goes across folders, and none at all."""

    def stays(path: str) -> bool:
        return any(fnmatch(f"/{path}", p.replace("**", "*")) for p in cluster()["rsync_exclude"])

    package = [p for p in (ROOT / "zsplg_ray").rglob("*") if "__pycache__" not in p.parts]
    ours = [p.relative_to(ROOT).as_posix() for p in package if p.is_file()]
    assert any(p.endswith(".safetensors") for p in ours)
    assert not [p for p in (*ours, "pyproject.toml", "README.md") if stays(p)]
    data = ("photos/a.jpg", "sam_vit_h.pth", "run/segments/a.parquet", "run/labels/a.parquet")
    assert all(stays(p) for p in data)


@pytest.mark.parametrize("path", [CLUSTER, JOB])
def test_nothing_secret_and_no_public_address_stands_in_the_files(path):
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|0\.0\.0\.0", text)
    assert not re.search(r"(?i)(secret_access_key|password|auth_token): *['\"]?\w{8}", text)


def test_every_setting_of_cluster_yaml_has_a_comment():
    """On its line, or on the lines before."""
    lines = CLUSTER.read_text().splitlines()
    section = before = ""
    for line in lines:
        if re.match(r"\S.*:$", line):
            section = line
        told = "#" in line or before.lstrip().startswith("#")
        opens = line.rstrip().endswith(":")
        assert told or opens or not line.strip(), f"{section} {line}"
        before = line


# KubeRay -----------------------------------------------------------------------------------------

TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}]
    },
}


def fields(required: tuple[str, ...] = (), **known: dict) -> dict:
    """A mapping of these fields and no others."""
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


RESOURCES = fields(requests=QUANTITIES, limits=QUANTITIES)
CONTAINER = fields(
    ("name", "image", "resources"),
    name=TEXT,
    image=TEXT,
    ports={"type": "array", "items": fields(("containerPort",), containerPort=NUMBER, name=TEXT)},
    envFrom={"type": "array", "items": fields(("secretRef",), secretRef=fields(name=TEXT))},
    env={"type": "array", "items": fields(("name", "value"), name=TEXT, value=TEXT)},
    resources=RESOURCES,
    volumeMounts={
        "type": "array",
        "items": fields(("name", "mountPath"), name=TEXT, mountPath=TEXT),
    },
)
POD = fields(
    ("spec",),
    spec=fields(
        ("containers",),
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={
            "type": "array",
            "items": fields(("name",), name=TEXT, emptyDir=fields(medium=TEXT, sizeLimit=TEXT)),
        },
        tolerations={
            "type": "array",
            "items": fields(
                key=TEXT, operator={"enum": ["Exists", "Equal"]}, value=TEXT, effect=TEXT
            ),
        },
    ),
)
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    rayStartParams=TEXTS,
    template=POD,
)
RAYJOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(("name",), name={"type": "string", "maxLength": 47}),
    spec=fields(
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=fields(backoffLimit=NUMBER),
        backoffLimit=NUMBER,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
        rayClusterSpec=fields(
            ("headGroupSpec",),
            rayVersion=TEXT,
            enableInTreeAutoscaling=FLAG,
            authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
            autoscalerOptions=fields(
                version={"enum": ["v1", "v2"]},
                idleTimeoutSeconds=NUMBER,
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
                resources=RESOURCES,
            ),
            headGroupSpec=fields(
                ("template",), serviceType=TEXT, rayStartParams=TEXTS, template=POD
            ),
            workerGroupSpecs={"type": "array", "items": WORKERS},
        ),
    ),
)
"""What jobs/rayjob.yaml uses of RayJob and of Kubernetes' pods; no other field may stand there.

Source: KubeRay, ray-operator/apis/ray/v1, rayjob_types.go and raycluster_types.go (Apache-2.0)."""


def job() -> dict:
    return yaml.safe_load(JOB.read_text())


def test_rayjob_has_the_fields_of_a_rayjob():
    jsonschema.validate(job(), RAYJOB)
    for path in ("spec/entrypoints", "spec/rayClusterSpec/autoscaling"):
        wrong = job()
        part = wrong["spec"] if path.count("/") == 1 else wrong["spec"]["rayClusterSpec"]
        part[path.rpartition("/")[2]] = "x"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, RAYJOB)
    wrong = job()
    del wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAYJOB)


def test_pods_are_like_the_node_types_and_safe():
    spec = job()["spec"]
    ray_cluster = spec["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] and ray_cluster["enableInTreeAutoscaling"]
    assert ray_cluster["authOptions"]["mode"] == "token"
    assert ray_cluster["rayVersion"] == importlib.metadata.version("ray")
    groups = {g["groupName"]: g for g in ray_cluster["workerGroupSpecs"]}
    types = cluster()["available_node_types"]
    assert groups.keys() == types.keys() - {"head"}
    assert ray_cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for name, group in groups.items():
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        custom = {k for k in types[name]["resources"] if k not in ("CPU", "GPU")}
        (told,) = shlex.split(group["rayStartParams"].get("resources", '"{}"'))  # as the shell does
        assert json.loads(told).keys() == custom
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == ("GPU" in types[name]["resources"])
    pods = [ray_cluster["headGroupSpec"]["template"], *(g["template"] for g in groups.values())]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounts = {m["name"] for m in container["volumeMounts"]}
        assert mounts == {v["name"] for v in pod["spec"]["volumes"]}
        assert "nvidia.com/gpu" not in container["resources"]["limits"] or pod is not pods[0]


def test_the_entrypoint_is_a_command_of_ours_that_asks_for_a_group_there_is():
    spec = job()["spec"]
    program, verb, *arguments = shlex.split(spec["entrypoint"])
    assert (program, verb) == ("zsplg", "label")
    config = parse(LabelConfig, arguments, verb)
    assert list(config.actors.resources) == ["label_node"] and config.actors.gpus == 1
    groups = {g["groupName"]: g for g in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert config.actors.max == groups["label"]["maxReplicas"]


def test_what_is_told_of_train_uses_a_pod_whole():
    groups = {g["groupName"]: g for g in job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    pod = groups["train"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    told = re.search(r"--workers\.cpus (\d+)", JOB.read_text())
    assert told and int(told[1]) == int(pod["cpu"]) // pod["nvidia.com/gpu"]
