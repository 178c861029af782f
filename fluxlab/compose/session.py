"""A separate Hydra session for a block, independent of other users of Hydra in the process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase

from fluxlab.compose import yaml_source
from fluxlab.config import config_folder

_GLOBALS = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)
"""Where Hydra keeps the state of an application."""

_lock = threading.RLock()


@contextmanager
def hydra_session(schema: type, schema_name: str, folder: Path | None = None) -> Iterator[ConfigLoader]:
    """Initialize Hydra with fluxlab's configs and those of `folder`, for the time of a block.

    Configs refer to the dataclass `schema` as `schema_name`. Hydra keeps its state in globals: one thread at a time is
    in such a block, and afterwards the Hydra of the calling program is as it was.
    """
    with _lock:
        saved = {kind: Singleton._instances.pop(kind) for kind in _GLOBALS if kind in Singleton._instances}
        store = ConfigStore.instance()
        repository, before = store.repo, (yaml_source.active, yaml_source.folders)
        store.repo = dict(repository)
        yaml_source.active, yaml_source.folders = True, [folder] if folder else []
        try:
            store.store(name=schema_name, node=schema)
            with initialize_config_dir(str(config_folder()), job_name="fluxlab", version_base="1.3"):
                yield GlobalHydra.instance().config_loader()
        finally:
            yaml_source.active, yaml_source.folders = before
            store.repo = repository
            for kind in _GLOBALS:
                Singleton._instances.pop(kind, None)
            Singleton._instances.update(saved)
