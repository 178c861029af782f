"""`engine=ray` computes what `engine=inline` computes, whatever happens to its workers. One Ray for the module."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from fluxlab import engines
from fluxlab import run as command_line
from fluxlab.engines import cluster as cluster_module
from fluxlab.experiment import runner
from fluxlab.experiment.reading import read_store
from fluxlab.positions import registry
from tests import tiny

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install ray")
ROOT = Path(__file__).parents[2]

SLOW = '''
import time
from fluxlab.positions import op

@op("slow", {})
def slow(ids, scope):
    """Take some time."""
    time.sleep(0.2)
    return ids
'''

FAILING = """
import os, sys
from fluxlab.experiment import runner

real = runner.run_batch

def run_batch(pipe, settings, store, batch, folder, experiment):
    if any(cell.variant == "half" and cell.seed == 0 for cell in batch):
        raise KeyError("no luck")
    if any(cell.variant == "half" and cell.prompt == "a red dog" for cell in batch):
        os._exit(9)
    return real(pipe, settings, store, batch, folder, experiment)

if "default_worker" in sys.argv[0]:
    runner.run_batch = run_batch
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with plugins, which is on the import path."""
    path = tmp_path_factory.mktemp("plugins")
    (path / "slow_op.py").write_text(SLOW)
    (path / "failing_batches.py").write_text(FAILING)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))


@pytest.fixture(autouse=True)
def no_plugins_of_other_tests(monkeypatch):
    monkeypatch.setattr(registry, "_plugins", {})


@pytest.fixture(scope="module")
def cluster(folder):
    """Start a Ray as a run does; runs in this process use it."""
    from fluxlab.engines.cluster import Cluster

    started = Cluster(None, 2, None, on_cpu=True)
    yield started
    started.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), guidance=True)


def arguments(model, out, *more, capture="words"):
    """Return the arguments of a run of 2 variants × 2 prompts × 2 seeds and 2 controls, one cell per batch."""
    return [
        "+exp=hello",
        "model=local",
        f"model.path={model}",
        "model.max_sequence_length=16",
        "tracking=none",
        "device=cpu",
        "height=16",
        "width=24",
        "steps=1",
        "seeds=2",
        "prompts=['a cat','a red dog']",
        "batch_tokens=40",
        "threads=1",
        "+variants.half={a: {op: slow}, b: {op: scale, factor: 0.5}}",
        "plugins=[slow_op]",
        f"capture={capture}",
        f"out={out}",
        *more,
    ]


RAY = ("engine=ray", "engine.workers=2")


def contents(folder):
    parts = [folder / name for name in ("grid.png", "metrics.csv", "references.csv", "summary.csv")]
    parts += [*folder.glob("cells/*"), *folder.glob("references/*"), *folder.glob("attention/*/*")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in parts}


@pytest.fixture(scope="module")
def inline(model, folder, tmp_path_factory, request):
    """Return the folder of an undisturbed run in this process, with the parameter as its capture."""
    out = tmp_path_factory.mktemp("inline") / "run"
    assert command_line.main(arguments(model, out, capture=getattr(request, "param", "words"))) == 0
    return out


def workers():
    """Return the processes of the workers of this process's Ray."""

    def title(process):
        try:
            return next(iter(process.cmdline()), "")
        except psutil.Error:  # it has ended, or is a zombie
            return ""

    return [process for process in psutil.Process().children(recursive=True) if "Worker" in title(process)]


def when_some_images_exist(out, count, act):
    """Call `act` in another thread once `count` images are complete."""

    def work():
        while len(list(out.glob("cells/*.json"))) < count:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("inline", "capture"), [("none", "none"), ("words", "words")], indirect=["inline"])
def test_a_killed_worker_is_replaced(cluster, model, inline, capture, tmp_path):
    out, killed = tmp_path / "run", []

    def kill():
        victim = workers()[0]
        victim.kill()
        killed.append(victim.pid)

    watching = when_some_images_exist(out, 3, kill)
    assert command_line.main(arguments(model, out, *RAY, capture=capture)) == 0
    watching.join(5)
    assert killed
    assert contents(out) == contents(inline)
    assert not list(out.rglob("*.part"))
    assert not psutil.wait_procs(workers(), timeout=10)[1]  # none is left when the run has ended


def test_workers_without_the_folder_send_files(cluster, model, inline, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda file: None)  # the file by which workers recognise the folder
    out = tmp_path / "run"
    assert command_line.main(arguments(model, out, *RAY)) == 0
    assert contents(out) == contents(inline)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak)]
)
def test_an_interrupted_run_is_continued(cluster, model, inline, tmp_path, capsys, number, code):
    out = tmp_path / "run"
    when_some_images_exist(out, 2, lambda: os.kill(os.getpid(), number))
    assert command_line.main(arguments(model, out, *RAY)) == code
    assert "the same command continues from here" in capsys.readouterr().err
    assert len(list(out.glob("cells/*.json"))) < 8
    if number == signal.SIGTERM:
        assert not list(out.rglob("*.part"))  # batches at hand were finished
    assert command_line.main(arguments(model, out)) == 0
    assert contents(out) == contents(inline)


def test_batches_that_keep_failing_are_set_aside(cluster, model, inline, tmp_path, capsys):
    out = tmp_path / "run"
    command = arguments(model, out, *RAY, "engine.retries=1", "plugins=[slow_op,failing_batches]")
    assert command_line.main(command) == 1
    message = capsys.readouterr().err
    assert "3 images not written, because their batches failed:" in message
    assert "half, prompt 'a cat', seed 0: failed 2 times: KeyError: 'no luck'" in message
    assert "half, prompt 'a red dog', seed 0: failed 2 times: KeyError" in message
    assert "half, prompt 'a red dog', seed 1: failed 2 times" in message
    assert 'raise KeyError("no luck")' in message  # the traceback
    complete = {file.name for file in out.glob("cells/*.json")}
    assert len(complete) == 5
    run = read_store(out)
    assert sum(row["ssim"] != row["ssim"] for row in run.metrics) == 3
    assert command_line.main(arguments(model, out)) == 0
    assert contents(out) == contents(inline)


def failed(capsys, model, out, *more):
    assert command_line.main(arguments(model, out, "engine=ray", "engine.workers=1", *more)) == 2
    message = capsys.readouterr().err
    assert 1 <= len(message.splitlines()) <= 3
    assert not out.exists()
    return message


def test_another_model_in_a_worker(cluster, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fluxlab.api.fingerprint", lambda *given: "0" * 64)
    assert "has other files in" in failed(capsys, model, tmp_path / "run")


def test_a_worker_that_cannot_load(cluster, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ghost", types.ModuleType("ghost"))
    message = failed(capsys, model, tmp_path / "run", "plugins=[slow_op,ghost]")
    assert "engine=ray, a worker: plugins[" in message
    assert "'ghost'" in message


def test_a_worker_that_cannot_import(cluster, model, tmp_path, monkeypatch, capsys):
    module = types.ModuleType("ghost_worker")
    module.Worker = type(
        "Worker",
        (),
        {"__module__": "ghost_worker", "__init__": lambda self, *given: None, "open": lambda self, *given: None},
    )
    monkeypatch.setitem(sys.modules, "ghost_worker", module)
    monkeypatch.setattr("fluxlab.engines.cluster.Worker", module.Worker)
    message = failed(capsys, model, tmp_path / "run")
    assert "a worker ended before it had loaded the model" in message
    assert "No module named 'ghost_worker'" in message


def test_too_many_workers(cluster, model, tmp_path, capsys):
    message = failed(capsys, model, tmp_path / "run", "engine.workers=999")
    assert "engine.workers=999: each needs a CPU" in message
    assert "GPU" in failed(capsys, model, tmp_path / "run", "engine.gpus_per_worker=64")


def test_only_this_machine_and_this_run_can_reach_ray(cluster):
    assert not cluster.ray._private.worker.global_worker.node.webui_url  # no dashboard
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [address for process in processes for address in _listening(process)]
    assert len(listening) > 3
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}
    folder = Path(cluster.ray._private.worker.global_worker.node.get_session_dir_path()).parent.parent
    assert folder.name.startswith("fluxlab-")
    assert folder.stat().st_mode & 0o777 == 0o700  # nor can other users open its sockets
    assert _joins(cluster, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster_module._TOKEN})
    assert not _joins(cluster, {"RAY_AUTH_MODE": "disabled"})


def _listening(process) -> list[str]:
    """Return the addresses at which a process listens. One that has ended since it was found has none."""
    try:
        return [found.laddr.ip for found in process.net_connections() if found.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def _joins(cluster, environment):
    """Return whether another process of this machine can join this Ray."""
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(ray.cluster_resources())"
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": "5", **environment}
    address = cluster.ray.get_runtime_context().gcs_address
    other = subprocess.run(
        [sys.executable, "-c", code, address], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    return other.returncode == 0 and "CPU" in other.stdout


# ---- without Ray


def test_ray_is_not_installed(model, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    for more in ((), ("plan=true",)):
        assert command_line.main(arguments(model, tmp_path / "run", *RAY, *more)) == 2
        printed = capsys.readouterr()
        assert printed.out + printed.err == 'engine=ray: Ray is not installed; pip install "fluxlab[ray]"\n'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "rai"}, "engine.name=rai: expected inline or ray"),
        ({"name": "inline", "workers": 2}, "engine.workers: 2, unknown key of engine=inline"),
        ({"name": "ray", "workers": 0}, "engine.workers=0: expected a whole number"),
        ({"name": "ray", "workers": 1.5}, "engine.workers=1.5: expected a whole number"),
        ({"name": "ray", "gpus_per_worker": -1}, "engine.gpus_per_worker=-1: expected a number from 0"),
        ({"name": "ray", "address": 5}, "engine.address=5: expected auto, an address"),
        ({"name": "ray", "retries": None}, "engine.retries=None: expected a whole number from 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        engines.checked(settings)


def test_the_default_engine_computes_in_this_process(monkeypatch):
    with engines.start({}) as engine:
        assert isinstance(engine, engines.Inline)
    assert runner.fill.__annotations__["engine"] is engines.Engine
