"""A pruned checkpoint on the Hub: its model card from what was measured, and the upload."""
