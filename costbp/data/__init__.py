"""From the rows of a task to encoded batches: sources, splits, encoding, images, caches."""
