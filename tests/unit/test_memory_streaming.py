"""Streamed blocks: any mixture of resident and streamed blocks computes the same bits, with late copies too."""

import itertools
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxlab.checkpoints import CheckpointError, load_transformer, save_transformer
from fluxlab.checkpoints.networks import TRANSFORMER
from fluxlab.checkpoints.read import open_weights
from fluxlab.memory import modulations, residency
from fluxlab.memory.costs import is_modulation
from fluxlab.memory.load import load_ends
from fluxlab.memory.modulations import Conditions
from fluxlab.memory.plan import Plan
from fluxlab.memory.ring import DirectEngine, Reader, Ring
from fluxlab.memory.scatter import spread
from fluxlab.memory.source import WeightSource
from fluxlab.memory.turns import Turns
from fluxlab.model import Flux, Flux2, Flux2Params, FluxParams
from tests import families

PARAMS = FluxParams(8, 8, 12, 10, 32, 4.0, 2, 2, 3, (4, 6, 6), 10000, True, True)
PARAMS2 = Flux2Params(8, 8, 10, 32, 2.0, 2, 2, 3, (4, 4, 4, 4), 2000, True)
BLOCKS = PARAMS.depth + PARAMS.depth_single_blocks


def open_transformer(path, dtype=None, engine=None) -> residency.Residency:
    return load_ends(open_weights(TRANSFORMER, path, dtype=dtype, device="cpu", unread=True), engine=engine)


def plan(*resident: int) -> Plan:
    return Plan("cpu", True, BLOCKS, resident, 1, "first", "device")


class LateEngine(DirectEngine):
    """Copies in a thread, after a delay. Until then the target holds NaN, as does one that is overwritten too early.

    A mark of the computation is its number: a buffer may be overwritten only after what was computed since it was
    filled.
    """

    def __init__(self, delay: float = 0.002):
        super().__init__(torch.device("cpu"))
        self.delay, self.copies, self.number = delay, 0, 0
        self.filled = {}  # the computation's number when a buffer was filled last

    def device(self, size):
        buffer = super().device(size)
        self.filled.pop(buffer.data_ptr(), None)  # the memory of a buffer that was freed
        return buffer

    def copy(self, target, source, after):
        key = target.data_ptr()
        if key in self.filled:
            assert after > self.filled[key], "a buffer is overwritten without waiting for what computes from it"
        self.filled[key] = self.number
        target.fill_(0xFF)  # NaN in every float
        done = threading.Event()
        self.copies += 1

        @torch.inference_mode()
        def work():
            time.sleep(self.delay)
            target.copy_(source)
            done.set()

        threading.Thread(target=work).start()
        return done

    def wait(self, mark):
        assert mark.wait(10)

    def computed(self):
        self.number += 1
        return self.number

    def finish(self, mark):
        if mark is not None:
            self.wait(mark)


@pytest.fixture(scope="module", params=[(Flux, PARAMS), (Flux2, PARAMS2)], ids=families.NAMES)
def model(request) -> Flux | Flux2:
    torch.manual_seed(0)
    build, params = request.param
    flux = build(params).eval().requires_grad_(False)
    for name, weight in flux.named_parameters():
        weight.normal_(0, 0.25 if weight.ndim > 1 else 0.1)
        if name.endswith("norm.scale"):
            weight.add_(1.5)
    return flux


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The model as one file, as sharded Diffusers folder, in bf16, and in both float8 types."""
    folder = tmp_path_factory.mktemp("streaming")
    save_transformer(model, folder / "fp32.safetensors")
    save_transformer(model, folder / "diffusers", layout="diffusers", max_shard_size=60_000)
    for name, dtype in (("bf16", torch.bfloat16), ("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        cast = {key: weight.to(dtype) for key, weight in load_file(folder / "fp32.safetensors").items()}
        save_file(cast, folder / f"{name}.safetensors", metadata=_metadata(folder / "fp32.safetensors"))
    return folder


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def inputs(flux: Flux | Flux2, batch: int = 2, dtype=torch.float32, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(batch, *shape, generator=g)  # noqa: E731
    axes = len(flux.params.axes_dim)
    return {
        "img": draw(12, 8).to(dtype),
        "img_ids": draw(12, axes),
        "txt": draw(5, 10).to(dtype),
        "txt_ids": draw(5, axes),
        "timesteps": torch.linspace(1, 0.2, batch),
        **({"y": draw(12).to(dtype)} if isinstance(flux, Flux) else {}),
        "guidance": torch.linspace(1, 4, batch),
    }


def conditioned(x: dict, t: float | None = None) -> tuple:
    """Return the arguments of `conditioning`, with all times replaced by `t`."""
    times = x["timesteps"] if t is None else torch.full_like(x["timesteps"], t)
    return times, *(x[key] for key in ("y", "guidance") if key in x)


def run(placed: residency.Residency, x: dict, key="a") -> torch.Tensor:
    conditions = Conditions((0.5,), lambda _: conditioned(x), len(x["timesteps"]))
    steps = placed.modulations(key, lambda: conditions)
    return placed.flux(**x, modulations=steps.at(0.5))


CASES = [
    ("fp32.safetensors", None),
    ("diffusers", None),
    ("fp32.safetensors", torch.bfloat16),
    ("bf16.safetensors", None),
    ("bf16.safetensors", torch.float32),
    ("e4m3.safetensors", None),
    ("e5m2.safetensors", torch.float32),
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("late", [False, True])
@torch.inference_mode()
def test_every_mixture_computes_the_same_bits(files, name, dtype, late, monkeypatch):
    whole = load_transformer(files / name, dtype=dtype)
    x = inputs(whole, dtype=whole.img_in.weight.dtype)
    expected = whole(**x)
    assert expected.isfinite().all()
    if late:  # without it, a CPU computes from the pages of the file
        monkeypatch.setattr("fluxlab.memory.load.is_mapped", lambda opened: False)
        monkeypatch.setattr(residency, "CPU_SLOTS", 2)
        monkeypatch.setattr(residency, "CPU_DEPTH", 3)
    for count in (0, 2, 3, BLOCKS):
        engine = LateEngine() if late else None
        placed = open_transformer(files / name, dtype=dtype, engine=engine)
        assert placed.mapped == (not late and name != "diffusers" and dtype is None and "e" not in name[:1])
        placed.place(plan(*spread(count, BLOCKS)))
        for _ in range(2):
            assert torch.equal(run(placed, x), expected)
        placed.close()
    if late:
        assert engine.copies >= BLOCKS


@torch.inference_mode()
def test_blocks_without_weights_are_an_error(files, monkeypatch):
    monkeypatch.setattr("fluxlab.memory.load.is_mapped", lambda opened: False)
    placed = open_transformer(files / "fp32.safetensors")
    placed.place(plan(1))
    x = inputs(placed.flux)
    run(placed, x)
    blocks = placed.blocks
    assert not any(weight.is_meta for name, weight in blocks[1].named_parameters() if "mod" not in name)
    for i in (0, 2, 3, 4):
        assert all(weight.is_meta for weight in blocks[i].parameters())
    with pytest.raises(RuntimeError, match="pass modulations="):
        placed.flux(**x)


@torch.inference_mode()
def test_a_plan_may_change(files, model, monkeypatch):
    monkeypatch.setattr("fluxlab.memory.load.is_mapped", lambda opened: False)
    placed = open_transformer(files / "fp32.safetensors", engine=LateEngine(0.001))
    x = inputs(model)
    expected = load_transformer(files / "fp32.safetensors")(**x)
    for resident in [(1, 3), (), (0, 1, 2, 3, 4), (2,), (1, 4)]:
        placed.place(plan(*resident))
        assert len(placed._buffers) <= len(resident)
        assert torch.equal(run(placed, x), expected)
        placed.release_ring()


@torch.inference_mode()
def test_modulations_are_those_of_a_forward(files):
    whole = load_transformer(files / "bf16.safetensors")
    placed = open_transformer(files / "e4m3.safetensors")
    same = open_transformer(files / "bf16.safetensors")
    for streamed, flux in ((same, whole), (placed, load_transformer(files / "e4m3.safetensors"))):
        for batch in (1, 3):
            x = inputs(flux, batch, torch.bfloat16)
            conditions = Conditions((1.0, 0.5), lambda t, x=x: conditioned(x, t), 2 * batch)
            steps = streamed.modulations(batch, lambda c=conditions: c)
            for t in (1.0, 0.5, 0.25):  # the last one is not in the schedule
                expected = flux.modulations(flux.conditioning(*conditioned(x, t)))
                for got, want in zip(steps.at(t), expected, strict=True):
                    for a, b in zip(got, want, strict=True):
                        for left, right in zip(a, b, strict=True):
                            assert (left is None and right is None) or torch.equal(left, right)


@torch.inference_mode()
def test_tables_of_announced_batches_are_made_together(files, monkeypatch):
    placed = open_transformer(files / "fp32.safetensors")
    batches = {}
    for key in range(5):
        x = inputs(placed.flux, 2, seed=key)
        batches[key] = Conditions((1.0, 0.5), lambda t, x=x: conditioned(x, t), 4)
        placed.known.announce(key, lambda key=key: batches[key])
    for key in range(5):
        placed.modulations(key, lambda key=key: batches[key]).at(1.0)
    assert placed.known.made == 1
    monkeypatch.setattr(modulations, "KEPT", 2 * placed.known._bytes(batches[0]))
    other = open_transformer(files / "fp32.safetensors")
    for key in range(5):
        other.known.announce(key, lambda key=key: batches[key])
    for key in range(5):
        steps = other.modulations(key, lambda key=key: batches[key])
        expected = placed.modulations(key, lambda key=key: batches[key])
        for a, b in zip(steps.at(0.5), expected.at(0.5), strict=True):
            assert all(
                torch.equal(p.shift, q.shift) and torch.equal(p.scale, q.scale) for p, q in zip(a, b, strict=True)
            )
    assert other.known.made == 3  # two batches at a time


def test_names_of_modulations_cover_a_table(model):
    layers = model.modulation_layers(model.params)
    width = sum(model.get_submodule(name).out_features for name in layers)
    assert width == sum(layers.values()) * 32
    blocks = model.split_modulations(torch.arange(float(width))[None], model.params)
    assert len(blocks) == BLOCKS + 1
    own = blocks if isinstance(model, Flux) else [blocks[0], blocks[2], blocks[-1]]  # FLUX.2 shares the others
    columns = [part[0, 0] for block in own for affine in block for part in affine if part is not None]
    assert torch.equal(torch.cat(columns), torch.arange(float(width)))
    assert {name.rpartition(".")[0] for name in model.state_dict() if is_modulation(name)} == set(layers)


@torch.inference_mode()
def test_damaged_weights_are_found_when_a_block_is_used(files, tmp_path, monkeypatch):
    weights = load_file(files / "fp32.safetensors")
    spoilt = {name: weight.clone() for name, weight in weights.items()}
    spoilt["single_blocks.1.linear1.weight"][3, 2] = float("nan")
    save_file(spoilt, tmp_path / "x.safetensors", metadata=_metadata(files / "fp32.safetensors"))
    for mapped in (True, False):
        with monkeypatch.context() as patch:
            if not mapped:
                patch.setattr("fluxlab.memory.load.is_mapped", lambda opened: False)
            placed = open_transformer(tmp_path / "x.safetensors")
            placed.place(plan(1))
            with pytest.raises(CheckpointError, match=r"single_blocks\.1\.linear1\.weight holds 1 values") as error:
                run(placed, inputs(placed.flux))
            assert len(str(error.value).splitlines()) == 1
            placed.close()


def test_a_file_that_shrinks(files, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((files / "fp32.safetensors").read_bytes())
    placed = open_transformer(path, dtype=torch.bfloat16)
    path.write_bytes(path.read_bytes()[:60_000])
    placed.place(plan())
    with pytest.raises(OSError, match="ends before byte"), torch.inference_mode():
        run(placed, inputs(placed.flux, dtype=torch.bfloat16))
    placed.close()


# --- turns -------------------------------------------------------------------------------------


def visits(tasks: list[list[int]]) -> list[tuple[int, int]]:
    """Return (block, task) in the order in which tasks that go through these blocks are served."""
    turns, order = Turns(BLOCKS), []

    def task(i: int):
        for block in tasks[i]:
            turns.arrive(block)
            order.append((block, i))
        return i

    assert turns.run([lambda i=i: task(i) for i in range(len(tasks))]) == list(range(len(tasks)))
    return order


def test_tasks_go_through_each_block_in_turn():
    assert visits([[0, 1, 2], [0, 1, 2]]) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    two_steps = [*range(BLOCKS), *range(BLOCKS)]
    order = visits([two_steps, two_steps, list(range(BLOCKS))])
    loads = 1 + sum(a[0] != b[0] for a, b in itertools.pairwise(order))
    assert loads == 2 * BLOCKS


def test_an_error_stops_the_other_tasks():
    turns, seen = Turns(BLOCKS), []

    def good(i):
        for block in range(BLOCKS):
            turns.arrive(block)
            seen.append((i, block))

    def bad():
        turns.arrive(0)
        turns.arrive(1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        turns.run([lambda: good(0), bad, lambda: good(2)])
    assert max(block for _, block in seen) == 1
    assert threading.active_count() < 20


@torch.inference_mode()
def test_batches_together_load_each_block_once(files, monkeypatch):
    monkeypatch.setattr("fluxlab.memory.load.is_mapped", lambda opened: False)
    monkeypatch.setattr(residency, "CPU_SLOTS", 2)
    whole = load_transformer(files / "e4m3.safetensors")
    engine = LateEngine(0.001)
    placed = open_transformer(files / "e4m3.safetensors", engine=engine)
    placed.place(plan(1, 3))
    xs = [inputs(whole, batch, torch.bfloat16, seed) for seed, batch in enumerate((1, 2, 3))]
    expected = [whole(**x) for x in xs]

    def sample(i):
        with torch.inference_mode():
            return [run(placed, xs[i], key=i) for _ in range(4)]

    taken = []
    take = Ring.take
    monkeypatch.setattr(Ring, "take", lambda self, block: taken.append(block) or take(self, block))
    for results, want in zip(placed.together([lambda i=i: sample(i) for i in range(3)]), expected, strict=True):
        assert all(torch.equal(result, want) for result in results)
    assert taken == [0, 2, 4] * 4
    placed.close()


def test_new_threads_compute_with_as_many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert Turns(BLOCKS).run([torch.get_num_threads, torch.get_num_threads]) == [1, 1]
    finally:
        torch.set_num_threads(before)


# --- the ring ----------------------------------------------------------------------------------


def fill(unit: int, buffer: torch.Tensor, run) -> None:
    buffer.fill_(unit)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_ring_returns_the_blocks_that_are_asked_for(slots, depth):
    engine = LateEngine(0.0005)
    ring = Ring((1, 2, 5, 6), fill, [8] * 7, engine, slots, depth)
    for block in [1, 2, 5, 6, 1, 2, 1, 5, 6, 1, 1]:  # also out of order
        _, buffer = ring.take(block)
        assert (buffer == block).all()
        ring.give_back()
    ring.close()


def test_a_reader_raises_what_a_read_raises():
    def failing(unit, buffer, run):
        if unit == 2:
            raise OSError("gone")

    reader = Reader([1, 2], failing, DirectEngine(torch.device("cpu")), [0, 4, 4], 2)
    reader.get()
    with pytest.raises(OSError, match="gone"):
        reader.get()
    reader.close()


def test_the_source_reads_what_a_file_holds(files):
    with open(files / "fp32.safetensors", "rb") as file:
        whole = file.read()
    placed = open_transformer(files / "diffusers")
    assert isinstance(placed.source, WeightSource)
    state = load_transformer(files / "fp32.safetensors").state_dict()
    covered = set()
    for i, unit in enumerate(placed.source.units):
        buffer = torch.empty(unit.size, dtype=torch.uint8)
        placed.source.read(i, buffer)
        for name, weight in unit.views(buffer).items():
            assert torch.equal(weight, state[f"{unit.prefix}{name}"])
            assert weight.data_ptr() % 64 == buffer.data_ptr() % 64
            covered.add(f"{unit.prefix}{name}")
    assert covered == {name for name in state if "blocks" in name or is_modulation(name)}
    assert len(whole) > sum(placed.source.stored_blocks)
    assert replace(plan(), resident=(1,)).streamed == (0, 2, 3, 4)
