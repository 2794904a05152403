"""What `lora launch` writes, judged by those who read it: bash, Kubeflow's models, SkyPilot's schema,
Hugging Face's command line.

SLURM's script is run, with stand-ins for srun and scontrol. No network but the loopback. Alone:
pytest tests/distributed/test_jobs.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from lora_cli.common import UsageError
from lora_cli.distributed import jobs, place
from tests.distributed.jobs import PATIENCE, count_steps, write_recipe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the files are for bash")

ODD = 'it\'s "my" $HOME; recipe & more.yaml'
SBATCH = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
dependency distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid
gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags help hold ignore-pbs input
job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus
network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer priority profile
propagate qos quiet reboot requeue reservation resv-ports segment signal sockets-per-node spread-job stepmgr
switches test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid usage
use-min-nodes verbose version wait wait-all-nodes wckey wrap
""".split()
"""The long options of Slurm's sbatch, from its manual."""
VALUES = {
    "job-name": r"[a-z0-9-]+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "cpus-per-task": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+", "time": r"\d+-\d\d:\d\d:\d\d", "output": r"[\w%.-]+", "open-mode": "append|truncate",
    "requeue": None, "signal": r"([RB]:)?(TERM|USR1)@\d+",
}  # fmt: skip
"""The form that the manual has for the values of those that are used; None for no value."""

SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" > {folder}/srun.words
exit ${{STATUS:-0}}
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> {folder}/scontrol.calls
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' node03 node04; fi
if [ "$1 $2" = "show job" ] && [ "${{SLURM_TIME_FORMAT:-standard}}" = standard ]; then cat {folder}/job.txt; fi
"""


def write_program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def launch(kind: str, job: jobs.Job, folder: Path) -> Path:
    out = folder / f"{kind}.job"
    jobs.launch([kind], job, out)
    return out


def run_script(script: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script for SLURM where that is the two stand-ins; the job's number is 12345."""
    own = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "12345", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[03-04]", "SLURM_CPUS_PER_TASK": "16", **environment,
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(script)], cwd=folder, env={**os.environ, **own}, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip


def slurm(folder: Path) -> None:
    write_program(folder, "srun", SRUN.format(folder=shlex.quote(str(folder))))
    write_program(folder, "scontrol", SCONTROL.format(folder=shlex.quote(str(folder))))


def say_job(state: str = "RUNNING", preempted: str = "None", left: int = 100) -> str:
    """What `scontrol show job --oneliner` says, of a job whose time is up in so many seconds."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + left))
    return (
        f"JobId=12345 JobName=lora-x UserId=me(1) JobState={state} Reason=None Requeue=1 Restarts=0 "
        f"TimeLimit=1-00:00:00 StartTime=2026-01-01T00:00:00 EndTime={end} Deadline=N/A "
        f"PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={preempted} Command=/a JobState=b EndTime=c\n"
    )


def test_slurms_options_are_those_of_its_manual(tmp_path: Path) -> None:
    script = launch("slurm", jobs.Job("r.yaml", [], "runs/r", 2, 8, "h100", time="90m"), tmp_path)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH ")
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE)
    assert len(options) == text.count("#SBATCH") == len(dict(options))
    for name, value in options:
        assert name in SBATCH
        form = VALUES[name]
        assert value == "" if form is None else re.fullmatch(form, value), name
    given = dict(options)
    assert (given["nodes"], given["gpus-per-node"], given["time"]) == ("2", "h100:8", "0-01:30:00")
    assert given["ntasks-per-node"] == "1"
    assert given["job-name"] == "lora-r"


@pytest.mark.parametrize("recipe", ["r.yaml", ODD, "-r.yaml", "naïve 模型.yaml"])
def test_slurms_script_calls_srun_with_what_was_given(recipe: str, tmp_path: Path) -> None:
    slurm(tmp_path)
    overrides = ["data.path=it's here.jsonl", 'training.run_name="a b"']
    script = launch("slurm", jobs.Job(recipe, overrides, "runs/a 'b'", 2, 8), tmp_path)
    done = run_script(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "scontrol.calls").read_text().count("requeue")
    words = (tmp_path / "srun.words").read_text().split("\0")[:-1]
    expected = [
        "--cpus-per-task=16", "lora", "train", f"./{recipe}" if recipe[0] == "-" else recipe,
        "--set", overrides[0], "--set", overrides[1],
        "--nproc", "8", "--nnodes", "2", "--rdzv-endpoint", "node03:32345",
    ]  # fmt: skip
    assert words == expected
    (tmp_path / "runs" / "a 'b'").mkdir(parents=True)
    (tmp_path / "runs" / "a 'b'" / "record.json").write_text("{}")
    run_script(script, tmp_path)
    assert (tmp_path / "srun.words").read_text().split("\0")[:-1] == [*expected, "--resume"]


@pytest.mark.parametrize(
    ("status", "job", "again"),
    [
        (143, say_job(), True),
        (143, say_job(preempted="2026-11-26T10:00:00", left=40_000), True),
        (143, say_job(left=179), True),
        (143, say_job(left=40_000), False),  # scancel --signal=TERM, or kill
        (143, say_job("COMPLETING"), False),  # scancel
        (143, say_job().replace("EndTime=2", "EndTime=Unknown"), False),
        (143, "", False),
        (0, say_job(), False),
        (1, say_job(), False),
        (137, say_job(), False),
    ],
)
def test_a_job_is_queued_again_where_slurm_ends_it(
    status: int, job: str, again: bool, tmp_path: Path
) -> None:
    slurm(tmp_path)
    (tmp_path / "job.txt").write_text(job)
    script = launch("slurm", jobs.Job("r.yaml", [], "runs/r", 2, 8), tmp_path)
    done = run_script(script, tmp_path, STATUS=str(status), SLURM_TIME_FORMAT="relative")
    assert done.returncode == status
    calls = (tmp_path / "scontrol.calls").read_text().splitlines()
    assert ("requeue 12345" in calls) == again, (calls, done.stderr)


NODES = """#!/usr/bin/env bash
shift
export SLURM_STEP_NUM_TASKS=2 PMI_SIZE=2 SLURM_STEP_NODELIST=node[03-04] SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE='1(x2)'
pids=()
for SLURM_PROCID in 0 1; do SLURM_PROCID=$SLURM_PROCID "$@" & pids+=($!); done
printf '%s ' "${{pids[@]}}" > {folder}/tasks.tmp; mv {folder}/tasks.tmp {folder}/tasks
status=0
for pid in "${{pids[@]}}"; do wait "$pid"; own=$?; status=$((own > status ? own : status)); done
exit "$status"
"""


@pytest.mark.slow
def test_a_job_of_two_machines_is_saved_at_its_time_limit_and_goes_on(
    tiny: Path, tmp_path: Path
) -> None:
    """Two tasks of srun's on this machine, one launcher each."""
    slurm(tmp_path)
    write_program(tmp_path, "srun", NODES.format(folder=shlex.quote(str(tmp_path))))
    write_program(
        tmp_path, "lora", f'#!/usr/bin/env bash\nexec {sys.executable} -m lora_cli "$@"\n'
    )
    hosts = (tmp_path / "bin" / "scontrol").read_text().replace("node03 node04", "localhost node04")
    (tmp_path / "bin" / "scontrol").write_text(hosts)
    (tmp_path / "job.txt").write_text(say_job())
    recipe = write_recipe(tmp_path, tiny, max_steps=40, save_strategy="no")
    script = launch("slurm", jobs.Job(str(recipe), [], str(tmp_path / "out"), 2, 1), tmp_path)
    own = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[03-04]", "SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
    }  # fmt: skip
    given = {"env": {**os.environ, **own}, "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["bash", str(script)], **given)
    until = time.monotonic() + PATIENCE
    while count_steps(tmp_path / "out") < 3:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)
    for task in (tmp_path / "tasks").read_text().split():  # as --signal=TERM@120 does
        os.kill(int(task), signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, said
    assert f"requeue {os.getpid()}" in (tmp_path / "scontrol.calls").read_text()
    steps = count_steps(tmp_path / "out")
    assert 3 <= steps < 40
    assert json.loads((tmp_path / "out" / "record.json").read_text())["processes"] == 2
    again = subprocess.run(["bash", str(script)], **given, timeout=2 * PATIENCE)
    assert again.returncode == 0, again.stderr
    assert count_steps(tmp_path / "out") == 41  # each step once, and the end


def read_words(script: str) -> list[str]:
    """The words of the `lora` that a script for sh calls."""
    called = script.replace("exec lora", "printf '%s\\0'")
    done = subprocess.run(
        ["sh", "-c", called], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("given", [{}, {"time": "3d"}, {"nodes": 4, "gpus": 1, "name": "x-2"}])
def test_kubeflows_own_models_take_the_trainjob(given: dict[str, object], tmp_path: Path) -> None:
    job = jobs.Job(ODD, ["lora.r=8"], "runs/r", 2, 8, image="ghcr.io/me/lora:1")._replace(**given)
    data = yaml.safe_load(launch("kubernetes", job, tmp_path).read_text())
    read = TrainerV1alpha1TrainJob.from_dict(data)
    assert read is not None
    assert read.to_dict() == data  # what it does not know, it leaves out
    trainer = read.spec.trainer
    assert (trainer.num_nodes, trainer.num_proc_per_node) == (job.nodes, job.gpus)
    assert data["spec"]["trainer"]["resourcesPerNode"]["limits"] == {
        "nvidia.com/gpu": str(job.gpus)
    }
    assert read.spec.active_deadline_seconds == (3 * 86400 if job.time else None)
    assert data["metadata"]["name"] == (job.name or "lora-it-s-my-home-recipe-more")
    assert data["spec"]["trainer"]["command"][:2] == ["sh", "-c"]
    script = data["spec"]["trainer"]["command"][2]
    assert read_words(script) == ["train", ODD, "--set", "lora.r=8"]
    variables = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1"}
    variables |= {"PET_MASTER_ADDR": "x-node-0-0.x", "PET_MASTER_PORT": "29500"}
    assert place.take_place(variables) is None
    assert place.find_nodes(variables) == place.Nodes(8, 2, "x-node-0-0.x:29500", "lora")


SKY = {
    "name": str, "num_nodes": int, "workdir": str, "setup": str, "run": str,
    "resources": {"accelerators": str, "image_id": str},
}  # fmt: skip
"""What `lora launch` uses of SkyPilot 0.14.1's schema of tasks (sky.utils.schemas.get_task_schema)."""


@pytest.mark.parametrize("image", [None, "ghcr.io/me/lora:1"])
def test_skypilots_task_is_as_its_schema_says(image: str | None, tmp_path: Path) -> None:
    job = jobs.Job(ODD, ["lora.r=8"], "runs/r", 2, 8, "A100-80GB", image)
    data = yaml.safe_load(launch("skypilot", job, tmp_path).read_text())
    assert data.keys() == SKY.keys()
    assert all(type(data[key]) is kind for key, kind in SKY.items() if key != "resources")
    assert data["resources"].keys() == SKY["resources"].keys() - (
        {"image_id"} if image is None else set()
    )
    assert data["resources"]["accelerators"] == "A100-80GB:8"
    given = "export SKYPILOT_NODE_IPS='10.0.0.1\n10.0.0.2' SKYPILOT_NUM_NODES=2 SKYPILOT_NUM_GPUS_PER_NODE=8\n"
    assert read_words(given + data["run"]) == [
        "train", ODD, "--set", "lora.r=8", "--nproc", "8", "--nnodes", "2", "--rdzv-endpoint", "10.0.0.1:29500",
    ]  # fmt: skip


def test_hfs_own_command_line_takes_the_script(tmp_path: Path) -> None:
    job = jobs.Job(ODD, ["lora.r=8"], "runs/r", 1, 4, "A100", "ghcr.io/me/lora:1")
    script = launch("hf-jobs", job, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("hf", "lora"):
        write_program(tmp_path, name, "#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    given = {
        "timeout": 60,
        "capture_output": True,
        "text": True,
        "env": {**os.environ, "PATH": path},
    }
    words = subprocess.run(["bash", str(script)], **given).stdout.split("\0")[:-1]
    assert words[:3] == ["jobs", "run", "--name"]
    assert words[-4:-1] == ["ghcr.io/me/lora:1", "sh", "-c"]
    ran = subprocess.run(words[-3:], **given).stdout.split("\0")[:-1]
    assert ran == ["train", ODD, "--set", "lora.r=8", "--nproc", "4"]
    # hf itself, which shows what it would send
    real = "from huggingface_hub.cli.hf import main\nmain()"
    hf = f'#!/usr/bin/env bash\nexec {sys.executable} -c {shlex.quote(real)} "$@"\n'
    write_program(tmp_path, "hf", hf)
    given["env"]["HF_TOKEN"] = "hf_" + "x" * 34
    dry = ["--dry-run", "-v", "hf://buckets/me/b:/data"]
    done = subprocess.run(["bash", str(script), *dry], **given)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    for line in (
        "image    ghcr.io/me/lora:1",
        "flavor   a100x4",
        "timeout  24h",
        "secrets  HF_TOKEN=",
        "Job not submitted",
    ):
        assert line in shown
    assert "hf_x" not in script.read_text()


@pytest.mark.parametrize(
    ("gpu", "gpus", "flavor"),
    [("h200", 8, "h200x8"), ("H200", 1, "h200"), ("a10g", 2, "a10g-largex2"), ("L4", 1, "l4x1"), ("a100", 1, "a100-large"),
     ("rtx-pro-6000", 4, "rtx-pro-6000x4"), ("t4", 1, "t4-small")],
)  # fmt: skip
def test_a_machine_of_hfs_is_found(gpu: str, gpus: int, flavor: str, tmp_path: Path) -> None:
    job = jobs.Job("r.yaml", [], "runs/r", 1, gpus, gpu, "lora")
    assert f" --flavor {flavor} " in launch("hf-jobs", job, tmp_path).read_text()


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("alpaca", "lora-alpaca"), (ODD, "lora-it-s-my-home-recipe-more"), ("模型.yaml", "lora"),
     ("a/B_2.1.yaml", "lora-b-2-1"), ("x" * 34 + "-y.yaml", "lora-" + "x" * 34)],
)  # fmt: skip
def test_a_job_is_named_after_its_recipe(recipe: str, name: str) -> None:
    found = jobs.Job(recipe, [], "runs/r").get_name()
    assert found == name
    assert jobs.NAME.fullmatch(found)


@pytest.mark.parametrize(
    "odd", ["a\nb.yaml", "\x1b[1m.yaml", "\u202ecod.yaml", "hf_" + "aB3dE6" * 6]
)
@pytest.mark.parametrize("field", ["recipe", "folder", "overrides"])
def test_a_word_that_a_screen_would_change_is_refused(odd: str, field: str, tmp_path: Path) -> None:
    value = [f"data.path={odd}"] if field == "overrides" else odd
    job = jobs.Job("r.yaml", [], "runs/r")._replace(**{field: value})
    with pytest.raises(UsageError, match="holds what a job file cannot show"):
        jobs.launch(["slurm"], job, tmp_path / "x.sh")
    assert not list(tmp_path.iterdir())


def test_stdout_and_out_are_the_same_bytes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lora_cli",
        "launch",
        "alpaca",
        "--slurm",
        "--set",
        "data.path=" + "a b" * 9000,
    ]
    given = {"cwd": tmp_path, "capture_output": True, "timeout": 60}
    given["env"] = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    shown = subprocess.run(command, **given)
    kept = subprocess.run([*command, "--out", "x.sh"], **given)
    assert (shown.returncode, kept.returncode, kept.stdout) == (0, 0, b"x.sh\n")
    assert shown.stdout == (tmp_path / "x.sh").read_bytes()
    assert b"submit it with: sbatch x.sh\n" in kept.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.sh"]
