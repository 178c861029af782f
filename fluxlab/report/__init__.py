"""Reports on a finished run folder: the page, pictures of attention, W&B. Nothing here loads a model."""
