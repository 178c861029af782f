"""The default engine: one batch after the other, in this process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from fluxlab import placement, stopping
from fluxlab.checkpoints import dtype_of
from fluxlab.conditioning import Texts
from fluxlab.config import ModelRow
from fluxlab.experiment import captures, runner
from fluxlab.experiment.cells import Batch, Settings, in_one_forward
from fluxlab.experiment.engine import Done
from fluxlab.experiment.notes import MOST_NOTES, notes
from fluxlab.experiment.settings import device_of, resolve, threads_of
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import Store
from fluxlab.memory.plan import Plan
from fluxlab.pipeline import Pipeline
from fluxlab.positions import region_prompts
from fluxlab.probes import Probe, concept_words

Load = Callable[[ModelRow, torch.dtype | None, str, Texts], Pipeline]


class Inline:
    """Computes batches in this process. load: `fluxlab.loading.load_row`, or what returns a pipeline instead."""

    def __init__(self, load: Load):
        self.load = load
        self.pipe: Pipeline | None = None
        self._said: Plan | None = None

    def settle(
        self, experiment: Experiment, known: Settings | None, batch_tokens: int | None, threads: int | None
    ) -> Settings:
        """See `Engine.settle`."""
        device = device_of(experiment, known)
        self._load(experiment, device, threads_of(device, known, threads))
        return resolve(experiment, self.pipe, known, batch_tokens, threads)

    def check(self, experiment: Experiment, settings: Settings, fixed: bool) -> list[str]:
        """See `Engine.check`."""
        pipe = self.loaded(experiment, settings)
        runner.check(experiment, pipe, settings)
        captures.check(experiment, pipe, settings, fixed=fixed)
        return notes(experiment, pipe, settings, most=MOST_NOTES)

    def loaded(self, experiment: Experiment, settings: Settings) -> Pipeline:
        """Return the model, loaded at the first call."""
        if self.pipe is None:
            self._load(experiment, settings.device, settings.threads)
        return self.pipe

    def _load(self, experiment: Experiment, device: str, count: int) -> None:
        """Load the model. Its text encoders compute with the threads of the run, which their last bits depend on."""
        dtype = dtype_of(experiment.dtype, experiment.model)
        with threads(count):
            self.pipe = self.load(experiment.model, dtype, device, texts_of(experiment))

    def compute(
        self, experiment: Experiment, settings: Settings, store: Store, batches: Sequence[Batch]
    ) -> Iterator[Done]:
        """See `Engine.compute`."""
        with threads(settings.threads):
            together = self._prepare(experiment, settings, batches)
            for start in range(0, len(batches), together):
                if stopping.asked():
                    return
                group = batches[start : start + together]
                tasks = [
                    partial(runner.run_batch, self.pipe, settings, store, batch.cells, batch.folder, experiment)
                    for batch in group
                ]
                failures = self.pipe.streaming.together(tasks) if len(tasks) > 1 else [tasks[0]()]
                yield from map(Done, group, failures)

    def _prepare(self, experiment: Experiment, settings: Settings, batches: Sequence[Batch]) -> int:
        """Place the weights for the largest batch, print how, and return how many batches go through streamed blocks
        in turn.
        """
        if not batches:
            return 1
        work = [runner.with_sources_of(batch.cells) for batch in batches]
        prompts = [[cell.prompt for cell in group] for group in work]
        most = max(in_one_forward(group, settings) for group in work)
        asked = (
            settings.sampling,
            max(prompts, key=len),
            Probe(experiment.capture) if experiment.captures else None,
            len(batches),
            runner.most_further_tokens(experiment, settings),
            most,
        )
        plan = self.pipe.prepare(*asked) or placement.resident_plan(self.pipe, lambda: self.pipe.workload(*asked))
        self.pipe.announce(prompts, settings.sampling, most)
        if plan is None:
            return 1
        same = replace(plan, phases={}, free=None)  # what the process and others use changes while a run goes on
        if same != self._said:
            print(f"memory: {plan.describe()}", flush=True)
            self._said = same
        return plan.together


def texts_of(experiment: Experiment) -> Texts:
    """Return what a run of the experiment encodes: its prompts, negative ones too, and the words that it compares."""
    s = experiment.sampling
    true_cfg = experiment.model.true_cfg if s.true_cfg is None else s.true_cfg
    negatives = () if true_cfg in (None, 1) else (s.negative_prompt or "",)
    further = [prompt for program in experiment.variants.values() for prompt in region_prompts(program)]
    prompts, words = (*experiment.prompts, *further, *negatives), concept_words(experiment.capture)
    return Texts(prompts, s.max_sequence_length, s.truncate, s.unknown_words, words)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with a number of threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
