"""Training pruned models until they do again what their originals do."""
