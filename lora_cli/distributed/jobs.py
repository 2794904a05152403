"""Write the file that has a cluster train a recipe: SLURM, Kubernetes, SkyPilot or HF Jobs.

Nothing is submitted. What is the user's stands in the files quoted; the hub's token by name alone.
The files go on with a run whose folder holds a record, so that a job may be started again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from lora_cli import __version__
from lora_cli.common import UsageError, escape, files, find_nearest, privacy, quote, ui
from lora_cli.distributed.place import PORT

NAME = re.compile(r"(?=.{1,40}$)[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""What each of the four takes for a job's name. Kubernetes' pods have at most 63 characters: the
name, `-node-0-`, the pod's number and five characters of its own."""
GPU = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]*", re.ASCII)
TIME = re.compile(r"([1-9]\d{0,5})([smhd])", re.ASCII)
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
USUAL_TIME = "24h"
LEAD = 120
"""Seconds before its time limit that SLURM has a job save. It may come 60 s sooner (sbatch's
manual)."""
PER_GPU = 2
"""Processors: a thread launches a GPU's forward pass, another its backward pass."""
TOKEN = "hf-token"
"""Kubernetes' secret with the key HF_TOKEN."""


class Job(NamedTuple):
    """What is to be trained, and on what."""

    recipe: str
    """As it is named on the command line, and will be on each machine."""
    overrides: Sequence[str]
    folder: str
    """The run's."""
    nodes: int = 1
    gpus: int = 1
    """Of each machine."""
    gpu: str | None = None
    """Their kind."""
    image: str | None = None
    time: str | None = None
    """The longest, as 90m, 24h or 3d."""
    name: str | None = None

    def get_name(self) -> str:
        """Return the name that was given, or one made of the recipe's."""
        if self.name is not None:
            return self.name
        words = re.findall("[a-z0-9]+", Path(self.recipe).stem.lower())
        return "-".join(["lora", *words])[:40].rstrip("-")

    def write_command(self, *options: str) -> str:
        """Return `lora train` as a shell reads it, going on where `write_resume` has found a run;
        the options are the shell's already, a line for each."""
        recipe = f"./{self.recipe}" if self.recipe.startswith("-") else self.recipe
        given = [word for each in self.overrides for word in ("--set", each)]
        words = shlex.join(["lora", "train", recipe, *given])
        return " \\\n    ".join([words, *options, "${resume:+--resume}"])

    def write_resume(self) -> str:
        """Return the line by which a shell finds out whether there is a run to go on with."""
        record = shlex.quote(str(Path(self.folder) / "record.json"))
        return f"resume=; if [ -e {record} ]; then resume=--resume; fi"


SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@{lead}
{resume}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
status=0
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
    {command} || status=$?

# Will SLURM end this job, at its time limit or for another one? What a user ends stays ended.
is_ending() {{
    job=$(SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$SLURM_JOB_ID") || return 1
    say() {{ grep -o " $1=[^ ]*" <<< "$job" | head -n 1 | cut -d = -f 2; }}
    [ "$(say JobState)" = RUNNING ] || return 1
    [ "$(say PreemptTime)" = None ] || return 0
    end=$(date -d "$(say EndTime)" +%s) && [ $((end - $(date +%s))) -le {soon} ]
}}
if [ "$status" -eq 143 ] && is_ending; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def _write_slurm(job: Job) -> str:
    """Return a script for sbatch: a launcher on each machine, saved and queued again at the time
    limit."""
    seconds = _parse_time(job.time or USUAL_TIME)
    clock = f"{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    endpoint = '"$host:$((20000 + SLURM_JOB_ID % 20000))"'  # no two jobs of a machine meet
    return SLURM.format(
        name=job.get_name(),
        nodes=job.nodes,
        cpus=PER_GPU * job.gpus,
        gpus=f"{job.gpu}:{job.gpus}" if job.gpu else job.gpus,
        time=f"{seconds // 86400}-{clock}",
        lead=LEAD,
        soon=LEAD + 60,
        resume=job.write_resume(),
        command=job.write_command(
            f'--nproc {job.gpus} --nnodes "$SLURM_NNODES" --rdzv-endpoint {endpoint}'
        ),
    )


def _write_kubernetes(job: Job) -> str:
    """Return a TrainJob of Kubeflow Trainer 2, whose runtime tells each pod its place (PET_…)."""
    token = {"secretKeyRef": {"name": TOKEN, "key": "HF_TOKEN", "optional": True}}
    script = f"{job.write_resume()}\nexec {job.write_command()}\n"
    spec: dict[str, object] = {
        "runtimeRef": {"name": "torch-distributed"},
        "trainer": {
            "image": job.image,
            "command": ["sh", "-c", script],
            "numNodes": job.nodes,
            "numProcPerNode": job.gpus,
            "resourcesPerNode": {"limits": {"nvidia.com/gpu": str(job.gpus)}},
            "env": [{"name": "HF_TOKEN", "valueFrom": token}],
        },
    }
    if job.time:
        spec["activeDeadlineSeconds"] = _parse_time(job.time)
    told = "# Kubeflow Trainer 1 has no TrainJob: there the same command stands in a PyTorchJob.\n"
    return told + _dump(
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": job.get_name()},
            "spec": spec,
        }
    )


def _write_skypilot(job: Job) -> str:
    """Return a task of SkyPilot's, run in a copy of the current folder on each machine."""
    command = job.write_command(
        '--nproc "$SKYPILOT_NUM_GPUS_PER_NODE" --nnodes "$SKYPILOT_NUM_NODES"',
        f'--rdzv-endpoint "$host:{PORT}"',
    )
    host = 'host=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)'
    image = {"image_id": f"docker:{job.image}"} if job.image else {}
    return _dump(
        {
            "name": job.get_name(),
            "num_nodes": job.nodes,
            "resources": {"accelerators": f"{job.gpu}:{job.gpus}", **image},
            "workdir": ".",
            "setup": f"command -v lora || pip install lora-cli=={quote(__version__)}\n",
            "run": f"{host}\n{job.write_resume()}\nexec {command}\n",
        }
    )


def _write_hf(job: Job) -> str:
    """Return a script that calls `hf jobs run`, with what else it is given."""
    assert job.gpu is not None
    assert job.image is not None
    script = f"{job.write_resume()}\nexec {job.write_command(f'--nproc {job.gpus}')}"
    options = ["--name", job.get_name(), "--flavor", _find_flavor(job.gpu, job.gpus)]
    options += ["--timeout", job.time or USUAL_TIME, "--secrets", "HF_TOKEN"]
    run = f'{shlex.join(["hf", "jobs", "run", *options])} "$@" {job.image}'
    return f"#!/usr/bin/env bash\nexec {run} \\\n    sh -c {shlex.quote(script)}\n"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def _dump(data: Mapping[str, object]) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def _find_flavor(gpu: str, gpus: int) -> str:
    """Return the name that HF Jobs has for a machine with these GPUs; UsageError where there is
    none."""
    from huggingface_hub import JobHardware

    machines = dict[tuple[str, int], str]()
    for each in JobHardware:
        found = re.fullmatch(r"(.+?)(?:x(\d+))?", each.value)
        if found and not each.value.startswith("cpu"):
            kind = re.sub(r"-(small|medium|large)$", "", found[1])
            machines.setdefault((kind, int(found[2] or 1)), each.value)
    wanted = gpu.lower()
    if flavor := machines.get((wanted, gpus)):
        return flavor
    numbers = [str(number) for kind, number in machines if kind == wanted]
    kinds = list(dict.fromkeys(kind for kind, _ in machines))
    hint = f"--gpus {' or '.join(numbers)}" if numbers else f"--gpu {' or '.join(kinds)}"
    if not numbers and (nearest := find_nearest(wanted, kinds)):
        hint = f"--gpu {nearest}? hf jobs hardware lists them"
    raise UsageError(f"HF Jobs has no machine with {gpus} {gpu}", hint)


def _parse_time(text: str) -> int:
    """Return the seconds of 90m, 24h or 3d."""
    found = TIME.fullmatch(text)
    assert found is not None, text
    return int(found[1]) * SECONDS[found[2]]


class Kind(NamedTuple):
    """A scheduler, as its option names it."""

    name: str
    write: Callable[[Job], str]
    submit: str
    """The command that takes the file."""
    takes: tuple[str, ...]
    """Options that say something to it."""
    requires: tuple[str, ...]
    needed: tuple[str, ...]
    """What has to be there, or is worth knowing."""


KINDS = {
    "slurm": Kind(
        "--slurm",
        _write_slurm,
        "sbatch",
        ("gpu", "time"),
        (),
        (
            "lora in PATH, {recipe}, its data and {folder}: on each machine as in the folder where "
            "sbatch is called",
            "HF_TOKEN, where base or data need it, in the environment of sbatch",
            "sbatch's own options, before the file, come first: --account, --partition, --mem, …",
        ),
    ),
    "kubernetes": Kind(
        "--kubernetes",
        _write_kubernetes,
        "kubectl create -f",
        ("image", "time"),
        ("image",),
        (
            "Kubeflow Trainer 2 with its runtime torch-distributed",
            "{recipe}, its data and {folder} on a volume that the runtime mounts, at the same path "
            "in each pod; what is in a pod goes with it",
            "HF_TOKEN, where base or data need it, as a secret: kubectl create secret generic "
            f"{TOKEN} --from-env-file=FILE, with a line HF_TOKEN=…",
        ),
    ),
    "skypilot": Kind(
        "--skypilot",
        _write_skypilot,
        "sky launch",
        ("gpu", "image"),
        ("gpu",),
        (
            "{recipe} and its data in the folder where sky is called: it is copied to each machine",
            "{folder} in a bucket that file_mounts: names, or it goes with the first machine",
            "--secret HF_TOKEN, where base or data need it",
        ),
    ),
    "hf-jobs": Kind(
        "--hf-jobs",
        _write_hf,
        "bash",
        ("gpu", "image", "time"),
        ("gpu", "image"),
        (
            "hf auth login: HF_TOKEN goes along as a secret",
            "{recipe}, its data and {folder} on a volume; what is in the container goes with it",
            "options of hf jobs run, after the file: -v hf://buckets/OWNER/NAME:/data, …",
        ),
    ),
}


SHAPES = {
    "name": (NAME, "at most 40 of a-z, 0-9 and single dashes between, a letter first"),
    "gpu": (GPU, "--gpu H100"),
    "image": (IMAGE, "--image REGISTRY/IMAGE:TAG"),
    "time": (TIME, "--time 24h"),
}
"""How options have to look, and what is said otherwise."""


def launch(kinds: Sequence[str], job: Job, out: Path | None) -> None:
    """Write the job's file for one of `KINDS`, to stdout or as `out`, and say how it is submitted.

    UsageError for several kinds or none, for what the kind cannot have, and for an `out` that
    exists or cannot be made; then nothing is written.
    """
    kind = _choose(kinds)
    _check_options(kind, job)
    _check_words(job)
    text = kind.write(job)
    if out is None:
        ui.report_file(text)
    else:
        files.write_new(out, text, f"--out {quote(files.find_free(out))} takes another name")
        ui.report_path(out)
    ui.say(f"submit it with: {kind.submit} {quote(out) if out else 'FILE'}", "what it needs:")
    for line in kind.needed:
        ui.say("  " + line.format(recipe=job.recipe, folder=job.folder))


def _choose(kinds: Sequence[str]) -> Kind:
    """Return the one that is named; UsageError for several and none."""
    if len(kinds) == 1:
        return KINDS[kinds[0]]
    named = " and ".join(KINDS[kind].name for kind in kinds) or "none"
    options = " or ".join(kind.name for kind in KINDS.values())
    raise UsageError(f"a job file is for one scheduler, and here is {named}", options)


def _check_options(kind: Kind, job: Job) -> None:
    """Raise UsageError for an option that is missing, or says nothing to this scheduler."""
    for option, (shape, hint) in SHAPES.items():
        value = getattr(job, option)
        if value is None and option in kind.requires:
            raise UsageError(f"{kind.name} needs --{option}", hint)
        if value is not None and option not in ("name", *kind.takes):
            raise UsageError(f"{kind.name} has no use for --{option}", "leave it out")
        if value is not None and not shape.fullmatch(value):
            raise UsageError(f"--{option} {value} is none that a job may have", hint)
    if job.nodes > 1 and kind.write is _write_hf:
        raise UsageError(
            f"{kind.name} trains on one machine, and --nodes is {job.nodes}", "--nodes 1"
        )


def _check_words(job: Job) -> None:
    """Raise UsageError for a word that no file can show."""
    for word in (job.recipe, *job.overrides, job.folder):
        if escape(privacy.mask_secrets(word)) != word:
            raise UsageError(
                f"{word} holds what a job file cannot show",
                "rename it, or write in the recipe what --set says",
            )
