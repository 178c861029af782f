"""Which schedule a model of FLUX.2 samples with: all share one rule. A distilled model, by its index, has 4 steps."""

from dataclasses import asdict

from fluxlab import checkpoints, sampling
from fluxlab.checkpoints.files import read_json
from fluxlab.config import ModelRow
from fluxlab.errors import UserError
from fluxlab.families.flux2 import SCHEDULE, Schedule2
from fluxlab.model import Flux2Params
from fluxlab.schedules.decision import Decision, read_settings


def decide(row: ModelRow, found: "checkpoints.Found | None", params: Flux2Params) -> Decision:
    """Decide as `fluxlab.schedules.decide` says. `like` of the row is for FLUX.1 only."""
    if row.like is not None:
        raise UserError(f"model.like {row.like!r}: says how FLUX.1 samples; leave it out for FLUX.2")
    folder = found.path if found is not None and found.kind == "pipeline" else None
    index = folder / "model_index.json" if folder else None
    distilled = bool(index and index.is_file() and read_json(index).get("is_distilled"))
    kind = {"like": "klein" if distilled else "flux2", "steps": 4 if distilled else 50, "distilled": distilled}
    if row.schedule is not None:
        return Decision(read_settings(row.schedule, "model.schedule"), why="as model.schedule says", **kind)
    if folder and (folder / "scheduler").is_dir():
        read = sampling.read_schedule(folder / "scheduler")
        return Decision(Schedule2(**asdict(read)), why=f"as {folder / 'scheduler'} says", **kind)
    return Decision(SCHEDULE, why="as FLUX.2's", **kind)
