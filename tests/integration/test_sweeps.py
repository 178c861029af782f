"""Sweeps: W&B's own agent without its server, the shipped configs, and combinations as jobs of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fluxlab.checkpoints.random import write_random
from fluxlab.compose import compose
from fluxlab.experiment.spec import read_variants
from fluxlab.run import RunConfig

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))

AGENT = """
import json, multiprocessing, os, sys
from pathlib import Path

import wandb
from wandb import wandb_agent
from wandb.apis.public import sweeps

config, trials = Path(sys.argv[1]).read_text(), json.loads(sys.argv[2])
waiting = list(trials.items())

def heartbeat(api, agent, metrics, running):
    if running or not waiting:
        return []
    name, asked = waiting.pop(0)
    return [{"type": "run", "run_id": name, "program": "", "args": {key: {"value": v} for key, v in asked.items()}}]

sweeps._sweep_with_runs = lambda *_, **__: {"config": config}
sweeps._register_agent = lambda *_, **__: {"id": "agent"}
sweeps._agent_heartbeat = heartbeat
wandb.Api = lambda: None
agent = wandb_agent.Agent(None, multiprocessing.Queue(), sweep_id=os.environ["WANDB_SWEEP_ID"], count=len(trials))
agent.POLL_INTERVAL = 0.2
agent.run()
print(json.dumps({"finished": agent._finished, "failed": agent._failed}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("random") / "model")


def small(model: Path) -> list[str]:
    return ["model=local", f"model.path={model}", "height=16", "width=24", "steps=1", "threads=1"]


def test_trials_of_an_agent(model, tmp_path):
    sweep = yaml.safe_load((ROOT / "configs" / "sweeps" / "scale.yaml").read_text())
    sweep["command"].remove("model=tiny")
    sweep["command"][-1:-1] = [*small(model), "seeds=1"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    trials = {
        "first": {"variants.trial.a.factor": 0.5},
        "wrong": {"variants.trial.a.factor": 1.2, "height": 18},  # which the model has no tokens for
        "second": {"variants.trial.a.factor": 2},
    }
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("WANDB_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "grid",  # these three as `wandb agent` sets them
        "WANDB_PROJECT": "theirs",
        "WANDB_ENTITY": "lab",
    }
    command = [sys.executable, "-c", AGENT, "sweep.yaml", json.dumps(trials)]
    agent = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert agent.returncode == 0, agent.stderr
    assert json.loads(agent.stdout.splitlines()[-1]) == {"finished": 3, "failed": 1}, agent.stderr
    told = {}
    for name in trials:
        (folder,) = (tmp_path / "runs" / "sweep_scale").glob(f"*/wandb/offline-run-*-{name}")
        inspect = [BIN / "wandb", "leet", "inspect", "--json", folder]
        summary, records = (
            subprocess.run([*inspect, *more], capture_output=True, text=True, check=True).stdout
            for more in (["--summary"], [])
        )
        told[name] = json.loads(summary)
        opened = next(one["run"] for one in map(json.loads, records.splitlines()) if one["type"] == "run")
        assert (opened["sweep_id"], opened["project"], opened["entity"]) == ("grid", "theirs", "lab")
    assert {name: one["exit_code"] for name, one in told.items()} == {"first": 0, "wrong": 1, "second": 0}
    for name in ("first", "second"):
        factor = trials[name]["variants.trial.a.factor"]
        assert told[name]["config"]["variants"]["trial"]["a"]["factor"] == factor
        assert told[name]["config"]["variants.trial.a.factor"] == factor  # as the sweep asked
        assert 0 < told[name]["summary"][sweep["metric"]["name"]] < 1


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_shipped_sweeps_compose(file):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load(file.read_text())
    assert sweep["metric"]["name"].startswith("metric.trial.")
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "fluxlab.run"]
    for pick in (0, -1):
        asked = {
            key: (values.get("values") or [values.get("min"), values.get("max")])[pick]
            for key, values in sweep["parameters"].items()
        }
        given = create_sweep_command_args({"args": {key: {"value": value} for key, value in asked.items()}})
        command = [word for word in sweep["command"][4:-1] if word != "model=tiny"]
        composed = compose("config", RunConfig, "schema", [*command, *given[sweep["command"][-1][2:-1]]])
        variants = read_variants(composed.variants)
        assert list(variants) == ["baseline", "trial"]
        shown = json.dumps(variants["trial"].to_config())
        assert all(str(value) in shown for value in asked.values())
        assert composed.tracking["name"] == "wandb"


def test_combinations_as_jobs(model, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    jobs = ["hydra/launcher=submitit_local", "hydra.launcher.submitit_folder=jobs/%j"]
    command = [sys.executable, "-m", "fluxlab.run", "-m", "+exp=hello", *small(model), "tracking=none", *jobs]
    done = subprocess.run(
        [*command, "seeds=[0],[1]"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "hello").glob("*/manifest.jsonl"))) == 2
    assert len(list((tmp_path / "jobs").glob("*/*_result.pkl"))) == 2


def test_the_preset_for_slurm():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=RunConfig)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = ["+exp=hello", "hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
        launcher = hydra_compose("config", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert launcher.submitit_folder == "runs/slurm/%j"
    assert (launcher.partition, launcher.gpus_per_node, launcher.max_num_timeout) == ("gpu", 1, 10)
