"""Reports on a finished run folder: the page, attention images, W&B. Nothing here loads a model."""
